"""Scaled GEMMs on the tensor cores' FP8 units: they take what Quantize wrote, with its scales.

`torch._scaled_mm` multiplies by the scales that it is given, where ours divide: it gets 1 / scale.
Formats that it is not known to take on this chip stay with the reference, which emulates them.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..fuser import Fuser, register
from ..op import Op
from ..ops import BasicLinear, Bias
from ..ops.main_grad import add_to_main_grad
from ..ops.scaled_gemm import product
from ..quantizers import Copy, Quantized
from ..spec import Spec, Storage

TENSOR, ROWS = ("e4m3", "e5m2"), ("e4m3r", "e5m2r")
ALIGNMENT = 16


def _formats(first: str, second: str) -> str | None:
    """Why two formats cannot be multiplied, or None."""
    if first.startswith("e5m2") and second.startswith("e5m2"):
        return "no unit multiplies E5M2 by E5M2"
    if not any(first in family and second in family for family in (TENSOR, ROWS)):
        return f"{first} by {second} is emulated"
    return None


def _bytes(data: Tensor, columns: int) -> Tensor:
    """FP8 data, row by row in memory, filled up with zeros to a multiple of the alignment."""
    missing = -columns % ALIGNMENT
    if missing:
        return torch.nn.functional.pad(data.view(torch.uint8), (0, missing)).view(data.dtype)
    return data.contiguous()


def scaled_mm(
    a: Copy | None, b: Copy | None, dtype: torch.dtype, fast: bool = False,
    bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`a @ b.T (+ bias)` of FP8 copies `[rows, depth]` and `[cols, depth]`, in dtype.

    fast: accumulate in the tensor core's own, shorter sums, as forward passes may.
    """
    assert a is not None and b is not None  # noqa: PT018
    rows, depth = a.data.shape
    if not rows * depth * b.data.size(0):
        made = torch.zeros(rows, b.data.size(0), dtype=dtype, device=a.data.device)
        return made if bias is None else made + bias
    left, right = _bytes(a.data, depth), _bytes(b.data, depth).t()
    scale_a, scale_b = a.scale.reciprocal(), b.scale.reciprocal()
    if scale_b.dim():
        scale_b = scale_b.t()
    return torch._scaled_mm(
        left, right, scale_a, scale_b, bias=bias, out_dtype=dtype, use_fast_accum=fast
    )


def scaled_product(a: Copy | None, b: Copy | None, dtype: torch.dtype) -> Tensor:
    """`scaled_mm` on a GPU; elsewhere, where Triton interprets, what it stands for."""
    assert a is not None and b is not None  # noqa: PT018
    if a.data.is_cuda:
        return scaled_mm(a, b, dtype)
    return product(a, b, dtype)


def weight_gradient(dy: Quantized, x: Quantized, fc: Any, weight: Tensor) -> Tensor | None:
    """`dy.T @ x`, or into the weight's main_grad."""
    found = scaled_product(dy.col, x.col, dy.dtype)
    if fc.accumulate_into_main_grad:
        return add_to_main_grad(found, weight, fc.overwrite_main_grad)
    return found


def reject_gradient_formats(x: Storage, weight: Storage, dy: Storage | None) -> str | None:
    """Why the two products of a backward cannot be scaled GEMMs, or None."""
    if dy is None:
        return "the recipe leaves the gradient in high precision"
    return _formats(dy.name, weight.name) or _formats(dy.name, x.name)


class _Scaled(Fuser):
    backend, quantized = "cublaslt", True

    def reject_formats(self, x: Storage, weight: Storage, dy: Storage | None) -> str | None:
        """Why it cannot multiply such operands, or None."""
        return _formats(x.name, weight.name)


def _dtype(x: Spec) -> str | None:
    rows = x.storage is not None and x.storage.name in ROWS
    if rows and x.dtype != torch.bfloat16:
        return f"with scales by rows it writes bf16, not {x.dtype}"
    if x.dtype == torch.float64:
        return "it does not write fp64"
    return None


@register
class ScaledLinear(_Scaled):
    """`x @ weight.T (+ bias)` of quantized x and weight, the bias in the GEMM's epilogue."""

    pattern = dict(fc=BasicLinear, bias=Bias | None)

    def reject(self, bias: Op | None, x: Spec) -> str | None:
        if bias is not None and x.dtype == torch.float32:
            return "its epilogue adds no fp32 bias"
        return _dtype(x)

    def fwd(self, x: Quantized, fc_weight: Quantized, bias_bias: Tensor | None) -> Any:
        return scaled_mm(x.row, fc_weight.row, x.dtype, True, bias_bias), ()


@register
class ScaledLinearBackward(_Scaled):
    """The data and the weight gradient, of quantized gradients."""

    pattern = dict(fc=BasicLinear)

    def reject_formats(self, x: Storage, weight: Storage, dy: Storage | None) -> str | None:
        return reject_gradient_formats(x, weight, dy)

    def reject(self, x: Spec) -> str | None:
        return _dtype(x)

    def bwd(
        self, dy: Quantized, fc: Any, fc_x: Quantized, fc_weight: Quantized,
        fc_weight_stored: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        dx = scaled_mm(dy.row, fc_weight.col, dy.dtype) if "x" in want else None
        weighs = "fc_weight" in want
        return dx, (weight_gradient(dy, fc_x, fc, fc_weight_stored) if weighs else None,)
