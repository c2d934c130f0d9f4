"""Quantize and QuantizeGrad by the C++ kernels for the CPU, and activations quantized by theirs."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ...fuser import register
from ...kernels.formats import Copies, Format
from ...kernels.lazy import Lazy
from ...ops import Bias, Quantize
from ...ops.activations import Activation, GatedActivation, Params
from ...ops.quantized_grouped import QuantizedGroupedLinear
from ...precision.quantizers import Quantized, Quantizer, RowQuantizer, TensorQuantizer, transposed
from ..quantizing import (
    KERNELS,
    Kernel,
    Quantizes,
    QuantizesGradient,
    QuantizesValue,
    as_quantized,
    format_of,
)
from ..quantizing import quantize as by_rule
from .passes import CPU

build = Lazy("cpu.build")
kernels = Lazy("cpu.quantize")


def _names(quantizer: Quantizer, names: Collection[str]) -> Collection[str]:
    """What kernels are to write of what is named.

    Where the column copy is the transpose it is a view of the row copy, as in the reference: the
    products that read it were faster so than of bytes that were written transposed.
    """
    both = quantizer.shared and "col" in names
    return {"row", *names} - {"col"} if both else names


def _quantized(
    quantizer: Quantizer, copies: Copies, dtype: torch.dtype, names: Collection[str]
) -> Quantized:
    """The value with the copies that are named."""
    value = as_quantized(quantizer, copies, dtype)
    if quantizer.shared and "col" in names and value.row is not None:
        value = value._replace(col=transposed(value.row))
    return value


def quantize(
    quantizer: Quantizer, x: Tensor, scale: Tensor | None, names: Collection[str]
) -> tuple[Quantized, Tensor | None]:
    """The copies of x that are named, and its amax."""
    copies = kernels.quantize(x, format_of(quantizer), scale, _names(quantizer, names))
    return _quantized(quantizer, copies, x.dtype, names), copies.amax


KERNELS["cpu"] = Kernel((Format,), CPU.dtypes, quantize, lambda: build.reason("quantize"))


@register
class QuantizeCPU(CPU, QuantizesValue):
    """Quantize alone."""


@register
class QuantizeGradCPU(CPU, QuantizesGradient):
    """QuantizeGrad alone."""


@register
class ActivationQuantizeCPU(CPU, Quantizes):
    """[Bias,] activation and Quantize: tiles of the activation are quantized out of the cache."""

    pattern = dict(bias=Bias | None, act=Activation | GatedActivation, q=Quantize)
    saves, wants = ("act_x", "q_amax"), dict(q_amax="amax")

    def reject(self, act: Any, q: Any) -> str | None:  # type: ignore[override]
        if type(q.quantizer) in (RowQuantizer, TensorQuantizer):
            return "its kernel quantizes tiles before the amax of a row or of the tensor is known"
        if act.function[2]:
            return "its kernel does not interleave"
        return super().reject(q)

    def fwd(
        self, x: Tensor, bias_bias: Tensor | None, act_kernel: str, act_params: Params, q: Any,
        q_scale: Tensor | None, want: Collection[str],
    ) -> Any:  # fmt: skip
        copies, pre = kernels.activation_quantize(
            x, act_kernel, format_of(q.quantizer), act_params, bias_bias, "act_x" in want, q_scale,
            _names(q.quantizer, want),
        )  # fmt: skip
        return _quantized(q.quantizer, copies, x.dtype, want), (pre, copies.amax)


@register
class GroupedQuantizeCPU(CPU):
    """A grouped linear whose groups' operands the kernels quantize."""

    pattern, wants = dict(fc=QuantizedGroupedLinear), dict(fc_weight="weight", fc_bias="bias")

    def reject(self, fc: Any) -> str | None:
        if not any(isinstance(format_of(q), Format) for q in fc.quantizers):
            return f"its kernels do not write {fc.quantizers[0].storage.name}"
        return KERNELS[self.backend].why_not()

    def fwd(
        self, x: Tensor, fc: Any, fc_split_sizes: Tensor, fc_weight: Tensor, fc_bias: Tensor | None
    ) -> Any:
        return fc.forward_by(_by_kernel, x, fc_split_sizes, fc_weight, fc_bias)

    def bwd(
        self, dy: Tensor, fc: Any, fc_x: Tensor, fc_split_sizes: Tensor, fc_weight: Tensor,
        fc_bias: Tensor | None, fc_weight_stored: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        return fc.backward_by(
            _by_kernel, dy, fc_x, fc_split_sizes, fc_weight, fc_bias, fc_weight_stored, want
        )


def _by_kernel(quantizer: Quantizer, x: Tensor, copies: Collection[str]) -> Quantized:
    """By the kernel, or by the quantizer's formulas where that writes no such format."""
    return by_rule(("cpu",), quantizer, x, None, copies)[0]
