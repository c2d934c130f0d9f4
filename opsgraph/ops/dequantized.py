"""A linear layer whose frozen weight is a tensor of another class, as torchao stores int8 ones."""

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..base.errors import OpError
from ..op import Op
from .linear import Linear


def dequantizes(weight: Any) -> bool:
    """Whether a weight does not train, and is of a class that says what it stands for."""
    return is_stored(weight) and not weight.requires_grad


def is_stored(weight: Any) -> bool:
    """Whether a weight is of a class that says what it stands for."""
    return getattr(type(weight), "dequantize", Tensor.dequantize) is not Tensor.dequantize


class DequantizedLinear(Linear):
    """`y = x @ dequantize(weight).T + bias`, made by `Linear.of(layer)`.

    The product is that of the weight's class, `F.linear(x, weight)`. The backward dequantizes the
    weight for as long as it multiplies, and reads no input. No fuser takes the product.
    """

    gemm = True

    def fwd(self, x: Tensor, weight: Tensor) -> tuple[Tensor, tuple[()]]:
        return F.linear(x, weight), ()

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return dy @ weight.dequantize().to(dy.dtype)

    def wgrad(self, dy: Tensor, x: Tensor) -> Any:  # type: ignore[override]
        raise OpError(type(self).__name__, "a weight that wants a gradient", "a frozen one")

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return ()
