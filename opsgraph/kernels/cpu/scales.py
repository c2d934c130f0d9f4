"""A scale for each column, with the residual add after it. Formulas: `kernels/reference/scales.py`.

Tensors are `[rows, width]`, fp32 or bf16, their rows at any stride; results are contiguous.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from ..reference import scales as reference
from .launch import DTYPES, Kernel, address, direct, floats, lines, rows_of
from .memory import empty

_FIELDS = "6q 3P P 3q 2P P"  # struct Scale in source/scales.h
_forward_kernel = Kernel("opsgraph_scale_forward", _FIELDS, "scales")
_backward_kernel = Kernel("opsgraph_scale_backward", _FIELDS, "scales")


def scale_forward(x: Tensor, weight: Tensor, other: Tensor | None = None) -> Tensor:
    """`y = x * weight (+ other)`; weight: `[width]`; other: `[rows, width]` of either dtype."""
    dtypes = {x.dtype, weight.dtype, *(() if other is None else (other.dtype,))}
    if not direct(x, weight, other) or not dtypes <= DTYPES.keys():
        return reference.scale_forward(x, weight, other)
    dtype = reference.dtype_of(x.dtype, weight.dtype)
    added = dtype if other is None else other.dtype
    rows, width = x.shape
    y = empty((rows, width), reference.dtype_of(dtype, added))
    if not y.numel():
        return y
    x, stride = lines(x)
    other, other_stride = (None, 0) if other is None else rows_of(other, y.shape, added)
    factors = floats(weight, width)
    _forward_kernel(
        DTYPES[x.dtype], DTYPES[added], DTYPES[dtype], torch.get_num_threads(), rows, width,
        x.data_ptr(), address(other), 0, address(factors), stride, other_stride, 0, y.data_ptr(),
        0, 0,
    )  # fmt: skip
    return y


def scale_backward(
    dy: Tensor, x: Tensor, weight: Tensor, want: Collection[str] = ("x", "weight")
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `x * weight`, in one pass; None for what is not in want ("x", "weight")."""
    dtype = reference.dtype_of(x.dtype, weight.dtype)
    if not direct(dy, x, weight) or not {x.dtype, weight.dtype} <= DTYPES.keys():
        return reference.scale_backward(dy, x, weight, want)
    rows, width = x.shape
    dx = empty((rows, width), x.dtype) if "x" in want else None
    dweight = empty((width,), torch.float32) if "weight" in want else None
    if rows and width:
        x, stride = lines(x)
        dy, dy_stride = rows_of(dy, (rows, width), dtype)
        factors = floats(weight, width)
        _backward_kernel(
            DTYPES[x.dtype], 0, DTYPES[dtype], torch.get_num_threads(), rows, width, x.data_ptr(),
            0, dy.data_ptr(), address(factors), stride, 0, dy_stride, 0, address(dx),
            address(dweight),
        )  # fmt: skip
    elif dweight is not None:
        dweight.zero_()
    return dx, None if dweight is None else dweight.to(weight.dtype)
