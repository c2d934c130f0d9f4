"""Linear layers on CUDA by the library's fastest algorithm for each product.

What its call computes besides a product is fused: a bias, a sum, a factor, ReLU and tanh GELU.
"""

from typing import Any

import torch
from torch import Tensor

from ...fuser import Fuser, register
from ...kernels.lazy import Lazy
from ...kernels.reference.scales import beyond
from ...op import Spec
from ...ops import GELU, Add, BasicLinear, Bias, ConstantScale, ReLU, Tee

gemm = Lazy("cublaslt.gemm")


class Product(Fuser):
    """A fuser of 16-bit products."""

    backend, dtypes = "cublaslt", (torch.bfloat16, torch.float16)


@register
class Linear(Product):
    """`x @ weight.T (+ bias) (+ other)`."""

    pattern = dict(fc=BasicLinear, bias=Bias | None, add=Add | None)

    def fwd(
        self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor | None, add_other: Tensor | None
    ) -> Any:
        return gemm.matmul(x, fc_weight.t(), bias_bias, add_other), ()


@register
class LinearScale(Product):
    """`scale * x @ weight.T (+ other)`."""

    pattern = dict(fc=BasicLinear, scale=ConstantScale, add=Add | None)

    def reject(self, scale: Any, x: Spec) -> str | None:
        return beyond(x.dtype, scale.scale)

    def fwd(
        self, x: Tensor, fc_weight: Tensor, scale_scale: float, add_other: Tensor | None
    ) -> Any:
        return gemm.matmul(x, fc_weight.t(), None, add_other, scale_scale), ()


@register
class LinearEpilogue(Product):
    """GEMM, bias and GELU or ReLU in one call; it cannot hand out the pre-activation."""

    pattern = dict(fc=BasicLinear, bias=Bias, act=GELU | ReLU)

    def reject(self, act: Any) -> str | None:
        known = gemm.EPILOGUES
        return None if act.kind in known else f"its epilogues are {', '.join(known)}"

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor, act_kernel: str) -> Any:
        return gemm.matmul(x, fc_weight.t(), bias_bias, activation=act_kernel), ()


@register
class LinearBackward(Product):
    """Data and weight gradient, with a factor, and with the gradient of an input that is handed
    out too."""

    pattern = dict(tee=Tee | None, fc=BasicLinear, scale=ConstantScale | None)

    def reject(self, fc: Any, scale: Any, x: Spec) -> str | None:
        if scale is not None and getattr(fc, "accumulate_into_main_grad", False):
            return "the weight gradient goes into main_grad"
        return beyond(x.dtype, scale and scale.scale)

    def wgrad(self, dy: Tensor, fc_x: Tensor, scale_scale: float | None = None) -> Any:
        return gemm.matmul(dy.t(), fc_x, alpha=_factor(scale_scale))

    def dgrad(
        self, dy: Tensor, tee_d: Tensor | None, fc_weight: Tensor, scale_scale: float | None
    ) -> Any:
        return gemm.matmul(dy, fc_weight, None, tee_d, _factor(scale_scale))


def _factor(scale: float | None) -> float:
    return 1.0 if scale is None else scale
