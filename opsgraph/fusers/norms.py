"""RMSNorm and LayerNorm by the kernels of a backend: one class forward, one backward."""

from collections.abc import Collection
from typing import Any, ClassVar

from torch import Tensor

from ..fuser import Fuser
from ..ops import Add, LayerNorm, RMSNorm, Tee


class NormForward(Fuser):
    """[Residual add and] norm in one pass; hands out the sum. kernels: with `norm_forward`."""

    kernels: ClassVar[Any]
    pattern, promotes = dict(add=Add | None, norm=RMSNorm | LayerNorm), True
    saves = ("norm_x", "norm_mean", "norm_rstd")
    wants = dict(norm_mean="mean", norm_rstd="rstd")

    def fwd(
        self, x: Tensor, add_other: Tensor | None, norm_weight: Tensor | None,
        norm_bias: Tensor | None, norm_eps: float, norm_zero_centered_gamma: int,
        norm_center: bool, norm_normalized_dtype: str | None, want: Collection[str],
    ) -> Any:  # fmt: skip
        y, mean, rstd, total = self.kernels.norm_forward(
            x, norm_weight, norm_bias, norm_eps, norm_zero_centered_gamma, add_other, norm_center,
            want, norm_normalized_dtype,
        )  # fmt: skip
        return y, (total, mean, rstd)


class NormGradients(Fuser):
    """Backward of a norm, with the residual's gradient added to dx where there is one."""

    kernels: ClassVar[Any]
    pattern = dict(tee=Tee | None, norm=RMSNorm | LayerNorm)
    wants = dict(norm_weight="weight", norm_bias="bias")

    def bwd(
        self, dy: Tensor, tee_d: Tensor | None, norm_x: Tensor, norm_mean: Tensor | None,
        norm_rstd: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
        norm_zero_centered_gamma: int, norm_normalized_dtype: str | None,
        want: Collection[str],
    ) -> Any:  # fmt: skip
        dx, dweight, dbias, *_ = self.kernels.norm_backward(
            dy, norm_x, norm_mean, norm_rstd, norm_weight, norm_bias, norm_zero_centered_gamma,
            tee_d, want, normalized_dtype=norm_normalized_dtype,
        )  # fmt: skip
        return dx, (dweight, dbias)
