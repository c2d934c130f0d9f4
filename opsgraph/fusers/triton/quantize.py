"""Fusers that absorb Quantize and QuantizeGrad: what a GEMM reads is written by what makes it."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from ...base.backend import backends
from ...fuser import register
from ...kernels.formats import NVFP4, Format, alike
from ...kernels.lazy import Lazy
from ...kernels.triton import interpreting
from ...op import Spec, Storage
from ...ops import Add, BasicLinear, Bias, LayerNorm, Quantize, QuantizeGrad, RMSNorm
from ...ops.activations import Activation, GatedActivation, Params
from ...precision.quantizers import Quantized, Quantizer, RowQuantizer
from ..cublaslt.products import (
    reject_gradient_formats,
    reject_product,
    scaled_product,
    scaled_wgrad,
)
from ..quantizing import (
    KERNELS,
    Kernel,
    Quantizes,
    QuantizesGradient,
    QuantizesValue,
    as_quantized,
    format_of,
)
from .passes import ActivationFuser, Triton

kernels = Lazy("triton.quantize")
norm_kernels = Lazy("triton.quantize_norms")
backward = Lazy("triton.quantize_backward")


def quantize(
    quantizer: Quantizer, x: Tensor, scale: Tensor | None, names: Collection[str]
) -> tuple[Quantized, Tensor | None]:
    """The copies of x that are named, and its amax."""
    copies = kernels.quantize(x, format_of(quantizer), scale, tuple(names))
    return as_quantized(quantizer, copies, x.dtype), copies.amax


KERNELS["triton"] = Kernel((Format, NVFP4), Triton.dtypes, quantize)


@register
class QuantizeKernel(Triton, QuantizesValue):
    """Quantize alone."""


@register
class QuantizeGradKernel(Triton, QuantizesGradient):
    """QuantizeGrad alone."""


@register
class NormQuantize(Triton, Quantizes):
    """[Residual add,] norm and Quantize; hands out the sum, the normalized value is not stored."""

    pattern = dict(add=Add | None, norm=RMSNorm | LayerNorm, q=Quantize)
    saves = ("norm_x", "norm_mean", "norm_rstd", "q_amax")
    wants = dict(norm_mean="mean", norm_rstd="rstd", q_amax="amax")

    def reject(self, norm: Any, q: Any) -> str | None:  # type: ignore[override]
        """Why its kernel cannot, or None."""
        if norm.normalized_dtype is not None:
            return f"its kernel does not round by normalized_dtype={norm.normalized_dtype!r}"
        return super().reject(q)

    def fwd(
        self, x: Tensor, add_other: Tensor | None, norm_weight: Tensor | None,
        norm_bias: Tensor | None, norm_eps: float, norm_zero_centered_gamma: int,
        norm_center: bool, q: Any, q_scale: Tensor | None, want: Collection[str],
    ) -> Any:  # fmt: skip
        copies, mean, rstd, total = norm_kernels.norm_quantize(
            x, norm_weight, norm_bias, norm_eps, format_of(q.quantizer), norm_zero_centered_gamma,
            add_other, norm_center, q_scale, want,
        )  # fmt: skip
        return as_quantized(q.quantizer, copies, x.dtype), (total, mean, rstd, copies.amax)

    def again(
        self, norm_x: Tensor, norm_mean: Tensor | None, norm_rstd: Tensor,
        norm_weight: Tensor | None, norm_bias: Tensor | None, norm_zero_centered_gamma: int,
        q: Any, q_scale: Tensor | None, want: Collection[str],
    ) -> Any:  # fmt: skip
        """The copies once more: x is not read for its statistics."""
        copies = norm_kernels.norm_quantize_again(
            norm_x, norm_mean, norm_rstd, norm_weight, norm_bias, format_of(q.quantizer),
            norm_zero_centered_gamma, q_scale, want,
        )  # fmt: skip
        return as_quantized(q.quantizer, copies, norm_x.dtype)


@register
class ActivationQuantize(ActivationFuser, Quantizes):
    """An activation, plain or gated, and Quantize; the activation is not stored."""

    pattern, saves = dict(act=Activation | GatedActivation, q=Quantize), ("q_amax",)
    wants = dict(q_amax="amax")

    def reject(self, act: Any, q: Any) -> str | None:  # type: ignore[override]
        return ActivationFuser.reject(self, act) or Quantizes.reject(self, q)

    def fwd(
        self, x: Tensor, act_kernel: str, act_params: Params, q: Any, q_scale: Tensor | None,
        want: Collection[str],
    ) -> Any:  # fmt: skip
        copies = kernels.activation_quantize(
            x, act_kernel, format_of(q.quantizer), act_params, scale=q_scale, want=want
        )
        return as_quantized(q.quantizer, copies, x.dtype), (copies.amax,)


class _BackwardQuantize(ActivationFuser, Quantizes):
    """What quantizes an activation's gradient."""

    def reject(self, grad: Any, act: Any, x: Spec) -> str | None:  # type: ignore[override]
        """Why its kernel cannot, or None."""
        if reason := ActivationFuser.reject(self, act) or Quantizes.reject(self, grad):
            return reason
        if isinstance(grad.quantizer, RowQuantizer):
            return "its kernel does not scale by rows"
        if act.out(x).width != x.width and x.width // 2 % 128:
            return f"its kernel wants halves of a multiple of 128, not {x.width // 2}"
        return None


@register
class ActivationBackwardQuantize(_BackwardQuantize):
    """Backward of [bias and] activation, quantized for the linear before, with the bias's sums."""

    pattern = dict(grad=QuantizeGrad, bias=Bias | None, act=Activation | GatedActivation)
    wants = dict(grad_scale="amax", bias_bias="bias")

    def bwd(
        self, dy: Tensor, grad: Any, grad_scale: Tensor | None, bias_bias: Tensor | None,
        act_x: Tensor, act_kernel: str, act_params: Params, want: Collection[str],
    ) -> Any:  # fmt: skip
        dtype = bias_bias.dtype if bias_bias is not None and "bias" in want else None
        copies, _, dbias = backward.activation_backward_quantize(
            dy, act_x, act_kernel, format_of(grad.quantizer), act_params, grad_scale, want,
            dbias=dtype,
        )  # fmt: skip
        dx = as_quantized(grad.quantizer, copies, dy.dtype)
        return dx, (copies.amax, dbias)


@register
class ActivationLinearBackwardQuantize(_BackwardQuantize):
    """Backward of [bias,] activation and linear, with the linear's input made again on the way.

    Between the two scaled GEMMs one pass reads the pre-activation once: it writes that gradient,
    quantized for the linear before, the linear's input, quantized for the weight gradient, and
    the bias's sums.
    """

    quantized = True
    pattern = dict(
        grad=QuantizeGrad,
        bias=Bias | None,
        act=Activation | GatedActivation,
        q=Quantize,
        fc=BasicLinear,
    )
    wants = dict(grad_scale="amax", bias_bias="bias")

    def reject_formats(self, x: Storage, weight: Storage, dy: Storage | None) -> str | None:
        """Why it cannot multiply such operands, or None."""
        return reject_gradient_formats(x, weight, dy)

    def reject(  # type: ignore[override]
        self, grad: Any, act: Any, q: Any, fc: Any, x: Spec
    ) -> str | None:
        stored = x.stored(q.quantizer.storage)
        if reason := super().reject(grad, act, x) or reject_product(fc, stored):
            return reason
        first, second = format_of(grad.quantizer), format_of(q.quantizer)
        if first is None or second is None or not alike(first, second):
            return "its kernel scales the gradient and the activation in one way"
        if isinstance(second, NVFP4) and second.stochastic:
            return "it draws the gradient's random numbers alone"
        absent = None if interpreting() else backends()["cublaslt"].why_not_on(x.device)
        return None if absent is None else f"its GEMMs are cublaslt's: {absent}"

    def bwd(
        self, dy: Quantized, grad: Any, grad_scale: Tensor | None, bias_bias: Tensor | None,
        act_x: Tensor, act_kernel: str, act_params: Params, q: Any, q_scale: Tensor | None,
        fc: Any, fc_weight: Quantized, fc_weight_stored: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        dtype = bias_bias.dtype if bias_bias is not None and "bias" in want else None
        weighs = "fc_weight" in want
        dact = scaled_product(dy.row, fc_weight.col, dy.dtype)
        copies, y, dbias = backward.activation_backward_quantize(
            dact, act_x, act_kernel, format_of(grad.quantizer), act_params, grad_scale, want,
            format_of(q.quantizer), q_scale, ("col",) if weighs else (), dtype,
        )  # fmt: skip
        dweight = None
        if weighs:
            again = as_quantized(q.quantizer, y, dy.dtype)
            dweight = fc.wgrad_by(scaled_wgrad, dy, again, fc_weight_stored)
        dx = as_quantized(grad.quantizer, copies, dy.dtype)
        return dx, (copies.amax, dbias, None, dweight)
