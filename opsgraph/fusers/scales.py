"""LayerScale by the kernels of a backend, with the residual add after it."""

from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor

from ..fuser import Fuser
from ..ops import Add, LayerScale


class ScaleForward(Fuser):
    """A scale for each column [and residual add], of two dtypes too. kernels: `scale_forward`."""

    kernels: ClassVar[Any]
    pattern, promotes = dict(scale=LayerScale, add=Add | None), True

    def fwd(self, x: Tensor, scale_weight: Tensor, add_other: Tensor | None) -> Any:
        return self.kernels.scale_forward(x, scale_weight, add_other), ()


class ScaleGradients(Fuser):
    """Backward of a scale for each column: both gradients in one pass."""

    kernels: ClassVar[Any]
    pattern = dict(scale=LayerScale)
    wants = dict(scale_weight="weight")

    def bwd(self, dy: Tensor, scale_x: Tensor, scale_weight: Tensor, want: Collection[str]) -> Any:
        dx, dweight = self.kernels.scale_backward(dy, scale_x, scale_weight, want)
        return dx, (dweight,)
