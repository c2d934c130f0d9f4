"""L2 normalization, over the last dimension."""

from typing import Any

import torch
from torch import Tensor

from ..guards.validation import epsilon, size
from ..kernels.reference import norms
from ..op import ROWS, Op, Spec


class L2Normalization(Op):
    """`y = x * rsqrt(sum(x^2) + eps)` over the last dimension, x of any width.

    seq_length and micro_batch_size are hints and change nothing.
    """

    keeps_width = True
    saves = ("scale",)
    constants = ("eps",)

    def __init__(
        self,
        eps: float = 1e-6,
        *,
        seq_length: int | None = None,
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        self.eps = epsilon(who, "eps", eps)
        size(who, "seq_length", seq_length)
        size(who, "micro_batch_size", micro_batch_size)

    def reject(self, x: Spec) -> str | None:
        epsilon(type(self).__name__, "eps", self.eps)
        return None

    def out(self, x: Spec) -> Spec:
        return x

    def saved(self, x: Spec) -> dict[str, Spec]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return {"scale": Spec((ROWS, 1), dtype, x.device)}

    def fwd(self, x: Tensor, eps: float) -> Any:
        y, scale = norms.l2norm_forward(x, eps)
        return y, (scale,)

    def bwd(self, dy: Tensor, x: Tensor, scale: Tensor) -> Any:
        return norms.l2norm_backward(dy, x, scale), ()
