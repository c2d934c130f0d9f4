"""GroupedLinear under a recipe with scales by rows: all groups in one scaled GEMM, on sm_90.

Scales of rows do not know of groups, so all rows are quantized at once. The library wants groups
that are contracted over to be of 16 rows each, which they rarely are: weight gradients are scaled
GEMMs of one group each.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ...fuser import Fuser, register
from ...kernels.formats import E4M3, names_of
from ...ops.grouped import _pieces, bias_gradients, weight_gradients
from ...ops.quantized_grouped import QuantizedGroupedLinear
from ...precision.quantizers import Copy, Quantizer
from ..quantizing import quantize
from .products import Family, native, scaled_product

GROUPED = Family("FP8, a scale per row", names_of("rows", E4M3), (torch.bfloat16,), chip=9)


@register
class ScaledGroupedLinear(Fuser):
    """Forward and data gradient in one launch each, without waiting for the split sizes."""

    backend, pattern = "cublaslt", dict(fc=QuantizedGroupedLinear)
    dtypes = GROUPED.dtypes

    def reject(self, fc: Any) -> str | None:
        names = [quantizer.storage.name for quantizer in fc.quantizers]
        if fc.override is not None:
            return "the recipe leaves the gradient in high precision"
        if set(names) != set(GROUPED.formats):
            return f"groups of {' by '.join(dict.fromkeys(names))} are emulated"
        if reason := GROUPED.why_not():
            return f"groups are emulated: {reason}"
        return None

    def fwd(
        self, x: Tensor, fc: Any, fc_split_sizes: Tensor, fc_weight: Tensor, fc_bias: Tensor | None
    ) -> Any:
        activation, weights, _ = fc.quantizers
        y = _product(activation, x, weights, fc_weight, fc_split_sizes)
        if fc_bias is not None:
            sizes = fc_split_sizes.to(x.device)
            y += fc_bias.repeat_interleave(sizes, 0, output_size=x.shape[0])
        return y, ()

    def bwd(
        self, dy: Tensor, fc: Any, fc_x: Tensor, fc_split_sizes: Tensor, fc_weight: Tensor,
        fc_bias: Tensor | None, fc_weight_stored: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        activation, weights, gradient = fc.quantizers
        dx = dweight = dbias = None
        if "x" in want:
            dx = _product(gradient, dy, weights, fc_weight.transpose(1, 2), fc_split_sizes)
        grads = () if set(want) <= {"x"} else _pieces(dy, fc_split_sizes)
        if "fc_weight" in want:
            pairs = [
                (_rows(gradient, d.t()), _rows(activation, x.t()))
                for d, x in zip(grads, _pieces(fc_x, fc_split_sizes), strict=True)
            ]
            dweight = fc.weigh(weight_gradients, fc, _wgrad, pairs, fc_weight_stored)
        if "fc_bias" in want and fc_bias is not None:
            dbias = bias_gradients(grads, fc_bias)
        return dx, (None, dweight, dbias)


def _wgrad(dy: Copy, x: Copy, sums: bool = False) -> Tensor:
    """`dy.T @ x` of a group: the library writes bfloat16 alone."""
    return scaled_product(dy, x, torch.bfloat16)


def _rows(quantizer: Quantizer, x: Tensor) -> Copy:
    """x with a scale for each row."""
    copy = quantize(("triton",), quantizer, x, None, ("row",))[0].row
    assert copy is not None
    return copy


def _product(
    quantizer: Quantizer, x: Tensor, weights: Quantizer, weight: Tensor, split_sizes: Tensor
) -> Tensor:
    """`x[rows of g] @ weight[g].T`. x: `[rows, depth]`; weight: `[groups, width, depth]`."""
    groups, width, depth = weight.shape
    if not x.numel() * width:
        return x.new_zeros(x.shape[0], width)
    a, b = _rows(quantizer, x), _rows(weights, weight.reshape(groups * width, depth))
    ends = split_sizes.to(x.device).cumsum(0, dtype=torch.int32)
    first, second = (native.inverse_of(copy.scale.t(), copy.scale.size(0)) for copy in (a, b))
    return torch._scaled_grouped_mm(
        a.data, b.data.view(groups, width, depth).transpose(1, 2), first.squeeze(0),
        second.view(groups, width), ends, out_dtype=x.dtype,
    )  # fmt: skip
