"""Fusers that absorb Quantize and QuantizeGrad: what a GEMM reads is written by what makes it."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ...backend import backends, interpreting
from ...fuser import register
from ...kernels.formats import NVFP4, Format, alike
from ...op import Op, Spec, Storage
from ...ops import Add, BasicLinear, Bias, LayerNorm, Quantize, QuantizeGrad, RMSNorm
from ...ops.activations import Activation, GatedActivation, Params
from ...precision.quantizers import Quantized, Quantizer, RowQuantizer
from ..cublaslt.products import (
    reject_gradient_formats,
    reject_product,
    scaled_product,
    scaled_wgrad,
)
from ..lazy import Lazy
from ..quantizing import (
    KERNELS,
    Kernel,
    QuantizesGradient,
    QuantizesValue,
    as_quantized,
    format_of,
)
from .passes import Triton, _dtype, reject_activation

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

kernels = Lazy("triton.quantize")
norm_kernels = Lazy("triton.quantize_norms")
backward = Lazy("triton.quantize_backward")


def quantize(
    quantizer: Quantizer, x: Tensor, scale: Tensor | None, names: Collection[str]
) -> tuple[Quantized, Tensor | None]:
    """The copies of x that are named, and its amax."""
    made = kernels.quantize(x, format_of(quantizer), scale, tuple(names))
    return as_quantized(quantizer, made, x.dtype), made.amax


KERNELS["triton"] = Kernel((Format, NVFP4), DTYPES, quantize)


def _rejects(q: Any, x: Spec) -> str | None:
    if format_of(q.quantizer) is None:
        return f"its kernels do not write {q.quantizer.storage.name}"
    return _dtype(x)


class _Quantizing(Triton):
    """What all of them refuse."""

    def reject(self, q: Op, x: Spec) -> str | None:  # type: ignore[override]
        return _rejects(q, x)


@register
class QuantizeKernel(_Quantizing, QuantizesValue):
    """Quantize alone."""


@register
class QuantizeGradKernel(_Quantizing, QuantizesGradient):
    """QuantizeGrad alone."""


@register
class NormQuantize(_Quantizing):
    """[Residual add,] norm and Quantize; hands out the sum, the normalized value is not stored."""

    pattern = dict(add=Add | None, norm=RMSNorm | LayerNorm, q=Quantize)
    saves = ("norm_x", "norm_mean", "norm_rstd", "q_amax")
    wants = dict(norm_mean="mean", norm_rstd="rstd", q_amax="amax")

    def fwd(
        self, x: Tensor, add_other: Tensor | None, norm_weight: Tensor | None,
        norm_bias: Tensor | None, norm_eps: float, norm_zero_centered_gamma: bool,
        norm_center: bool, q: Any, q_scale: Tensor | None, want: Collection[str],
    ) -> Any:  # fmt: skip
        copies, mean, rstd, total = norm_kernels.norm_quantize(
            x, norm_weight, norm_bias, norm_eps, format_of(q.quantizer), norm_zero_centered_gamma,
            add_other, norm_center, q_scale, want,
        )  # fmt: skip
        return as_quantized(q.quantizer, copies, x.dtype), (total, mean, rstd, copies.amax)


@register
class ActivationQuantize(_Quantizing):
    """An activation, plain or gated, and Quantize; the activation is not stored."""

    pattern, saves = dict(act=Activation | GatedActivation, q=Quantize), ("q_amax",)
    wants = dict(q_amax="amax")

    def reject(self, act: Op, q: Op, x: Spec) -> str | None:  # type: ignore[override]
        return reject_activation(act, x) or _rejects(q, x)

    def fwd(
        self, x: Tensor, act_kernel: str, act_params: Params, q: Any, q_scale: Tensor | None,
        want: Collection[str],
    ) -> Any:  # fmt: skip
        made = kernels.activation_quantize(
            x, act_kernel, format_of(q.quantizer), act_params, scale=q_scale, want=want
        )
        return as_quantized(q.quantizer, made, x.dtype), (made.amax,)


def reject_backward(q: Any, act: Any, x: Spec) -> str | None:
    """Why the kernel of an activation's gradient cannot quantize it, or None."""
    if reason := reject_activation(act, x) or _rejects(q, x):
        return reason
    if isinstance(q.quantizer, RowQuantizer):
        return "its kernel does not scale by rows"
    if act.out(x).width != x.width and x.width // 2 % 128:
        return f"its kernel wants halves of a multiple of 128, not {x.width // 2}"
    return None


@register
class ActivationBackwardQuantize(_Quantizing):
    """Backward of [bias and] activation, quantized for the linear before, with the bias's sums."""

    pattern = dict(q=QuantizeGrad, bias=Bias | None, act=Activation | GatedActivation)
    wants = dict(q_scale="amax", bias_bias="bias")

    def reject(self, q: Any, act: Any, x: Spec) -> str | None:  # type: ignore[override]
        return reject_backward(q, act, x)

    def bwd(
        self, dy: Tensor, q: Any, q_scale: Tensor | None, bias_bias: Tensor | None, act_x: Tensor,
        act_kernel: str, act_params: Params, want: Collection[str],
    ) -> Any:  # fmt: skip
        dtype = bias_bias.dtype if bias_bias is not None and "bias" in want else None
        made, _, dbias = backward.activation_backward_quantize(
            dy, act_x, act_kernel, format_of(q.quantizer), act_params, q_scale, want, dbias=dtype
        )
        dx = as_quantized(q.quantizer, made, dy.dtype)
        return dx, (made.amax, dbias)


@register
class ActivationLinearBackwardQuantize(Triton):
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
        if reason := reject_backward(grad, act, x) or reject_product(fc, stored):
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
        made, y, dbias = backward.activation_backward_quantize(
            dact, act_x, act_kernel, format_of(grad.quantizer), act_params, grad_scale, want,
            format_of(q.quantizer), q_scale, ("col",) if weighs else (), dtype,
        )  # fmt: skip
        dweight = None
        if weighs:
            again = as_quantized(q.quantizer, y, dy.dtype)
            dweight = fc.wgrad_by(scaled_wgrad, dy, again, fc_weight_stored)
        dx = as_quantized(grad.quantizer, made, dy.dtype)
        return dx, (made.amax, dbias, None, dweight)
