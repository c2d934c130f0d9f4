"""Fusers over PyTorch's own calls, for any device: cublasLt on CUDA, oneDNN and MKL on the CPU."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fuser import Fuser, register
from ..kernels.reference import activations, norms
from ..kernels.reference.scales import beyond
from ..op import Op, Spec
from ..ops import GELU, Add, BasicLinear, Bias, ConstantScale, ReLU, RMSNorm, ScaledAdd, Tee
from ..ops.activations import Function, GatedActivation


@register
class LinearBias(Fuser):
    """`x @ weight.T + bias`, the bias in the GEMM's epilogue."""

    backend, pattern = "aten", dict(fc=BasicLinear, bias=Bias)

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor) -> Any:
        return F.linear(x, fc_weight, bias_bias), ()


@register
class LinearBiasActivation(Fuser):
    """GEMM, bias and GELU or ReLU in one call; it cannot hand out the pre-activation."""

    backend, pattern = "aten", dict(fc=BasicLinear, bias=Bias, act=GELU | ReLU)

    def reject(self, fc: Op, bias: Op, act: Any, x: Spec) -> str | None:
        epilogue = (
            "gelu" if x.device.type == "cuda" else "gelu_erf"
        )  # found by trying, see the tests
        if act.kind not in ("relu", epilogue):
            return f"on {x.device.type} the library's epilogue is {epilogue}, not {act.kind}"
        if x.device.type == "cuda" and x.dtype == torch.float64:
            return "cublasLt has no such epilogue in fp64"
        return None

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor, act_kernel: str) -> Any:
        gelu = act_kernel != "relu"
        return torch._addmm_activation(bias_bias, x, fc_weight.t(), use_gelu=gelu), ()


@register
class LinearBiasAdd(Fuser):
    """`x @ weight.T + bias + other`: without a bias the sum is in the GEMM's accumulator."""

    backend, pattern = "aten", dict(fc=BasicLinear, bias=Bias | None, add=Add)

    def reject(self, bias: Op | None, x: Spec) -> str | None:
        if bias is not None and x.device.type == "cuda":
            return "on cuda the add after a bias is a kernel of its own"
        return None

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor | None, add_other: Tensor) -> Any:
        if bias_bias is None:
            return torch.addmm(add_other, x, fc_weight.t()), ()
        return F.linear(x, fc_weight, bias_bias).add_(add_other), ()


@register
class LinearScaleAdd(Fuser):
    """`scale * x @ weight.T (+ other)`: factor and sum are the GEMM's alpha and beta."""

    backend, pattern = "aten", dict(fc=BasicLinear, scale=ConstantScale, add=Add | None)

    def reject(self, scale: Any, x: Spec) -> str | None:
        return beyond(x.dtype, scale.scale)

    def fwd(
        self, x: Tensor, fc_weight: Tensor, scale_scale: float, add_other: Tensor | None
    ) -> Any:
        other = x.new_empty(()) if add_other is None else add_other
        beta = 0 if add_other is None else 1
        return torch.addmm(other, x, fc_weight.t(), beta=beta, alpha=scale_scale), ()


@register
class LinearScaledAdd(Fuser):
    """`(scale *) x @ weight.T + factor * other`: the GEMM's alpha and beta."""

    backend = "aten"
    pattern = dict(fc=BasicLinear, scale=ConstantScale | None, add=ScaledAdd)

    def reject(self, scale: Any, add: Any, x: Spec) -> str | None:
        return beyond(x.dtype, scale and scale.scale, add.scale)

    def fwd(
        self, x: Tensor, fc_weight: Tensor, scale_scale: float | None, add_other: Tensor,
        add_scale: float,
    ) -> Any:  # fmt: skip
        alpha = 1.0 if scale_scale is None else scale_scale
        return torch.addmm(add_other, x, fc_weight.t(), beta=add_scale, alpha=alpha), ()


@register
class ScaleAdd(Fuser):
    """`scale * x + other` in one pass."""

    backend, pattern, promotes = "aten", dict(scale=ConstantScale, add=Add), True

    def reject(self, scale: Any, x: Spec) -> str | None:
        return beyond(x.dtype, scale.scale)

    def fwd(self, x: Tensor, scale_scale: float, add_other: Tensor) -> Any:
        return torch.add(add_other, x, alpha=scale_scale), ()


@register
class LinearScaleBackward(Fuser):
    """Backward of a linear and a scale: the factor is the GEMM's alpha."""

    backend, pattern = "aten", dict(fc=BasicLinear, scale=ConstantScale)

    def reject(self, fc: Op, scale: Any, x: Spec) -> str | None:
        if getattr(fc, "accumulate_into_main_grad", False):
            return "the weight gradient goes into main_grad"
        return beyond(x.dtype, scale.scale)

    def wgrad(self, dy: Tensor, fc_x: Tensor, scale_scale: float) -> Any:
        return _scaled_product(dy.t(), fc_x, scale_scale)

    def dgrad(self, dy: Tensor, fc_weight: Tensor, scale_scale: float) -> Any:
        return _scaled_product(dy, fc_weight, scale_scale)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


@register
class TeeLinearBackward(Fuser):
    """Backward of a linear whose input is also handed out: that gradient is the GEMM's beta."""

    backend, pattern = "aten", dict(tee=Tee, fc=BasicLinear)

    def wgrad(self, dy: Tensor, fc_x: Tensor) -> Any:
        return dy.t() @ fc_x

    def dgrad(self, dy: Tensor, tee_d: Tensor, fc_weight: Tensor) -> Any:
        return torch.addmm(tee_d, dy, fc_weight)


@register
class RMSNormLinearBackward(Fuser):
    """Backward of RMSNorm and the linear after it, whose input is made again on the way."""

    backend, pattern, gives = "aten", dict(norm=RMSNorm, fc=BasicLinear), ("fc_x",)

    def reject(self, x: Spec) -> str | None:
        if x.device.type != "cpu":
            return f"on {x.device.type} its passes are kernels of their own; it is for the CPU"
        return None

    def bwd(
        self, dy: Tensor, norm_x: Tensor, norm_rstd: Tensor, norm_weight: Tensor | None,
        norm_zero_centered_gamma: int, norm_normalized_dtype: str | None, fc_weight: Tensor,
        want: Collection[str],
    ) -> Any:  # fmt: skip
        wanted = "x" in want, "norm_weight" in want, "fc_weight" in want
        dx, dnorm, y = norms.rmsnorm_backward(
            dy @ fc_weight, norm_x, norm_rstd, norm_weight, norm_zero_centered_gamma, *wanted,
            norm_normalized_dtype,
        )  # fmt: skip
        return dx, (dnorm, y)


@register
class GatedLinearBackward(Fuser):
    """Backward of a gated activation and the linear after it.

    The linear's input is computed again in the pass that computes the activation's gradient.
    """

    backend, pattern, gives = "aten", dict(act=GatedActivation, fc=BasicLinear), ("fc_x",)

    def bwd(
        self, dy: Tensor, act_x: Tensor, fc_weight: Tensor, act_function: Function,
        want: Collection[str],
    ) -> Any:  # fmt: skip
        gives = "fc_weight" in want
        dx, y = activations.activation_backward_and_y(dy @ fc_weight, act_x, *act_function, gives)
        return dx, (y,)
