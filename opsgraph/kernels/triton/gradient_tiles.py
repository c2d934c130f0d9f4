"""Tiles of an activation and of its gradients, in fp32, from dy and x in memory."""

import triton
import triton.language as tl

from .activations import _backward, _gate_backward
from .ptx import widened
from .quantize_kernels import rows_of


@triton.jit
def loaded(
    dy, x, first_row, first_col, end, dy_stride, x_stride, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    GATED: tl.constexpr, R: tl.constexpr, C: tl.constexpr, FOURS: tl.constexpr = 0,
):  # fmt: skip
    """A tile of dy and x, and of x's second half if gated, as in memory; zero from row end on."""
    row = rows_of(first_row, R, FOURS)[:, None]
    cols = first_col + tl.arange(0, C)[None, :]
    mask = (row < end) & (cols < WIDTH)
    there = row.to(tl.int64) * dy_stride * UNIT + cols
    at = row.to(tl.int64) * x_stride * UNIT + cols
    if FOURS:
        there, at = tl.max_contiguous(there, [1, FOURS]), tl.max_contiguous(at, [1, FOURS])
    grad, a = tl.load(dy + there, mask, other=0.0), tl.load(x + at, mask, other=0.0)
    b = a
    if GATED:
        b = tl.load(x + at + WIDTH, mask, other=0.0)
    return grad, a, b


@triton.jit
def gradients_of(
    grad, a, b, DTYPE: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """y, da and db (da again unless gated) of what is in fp32 already."""
    if GATED:
        return _gate_backward(grad, a, b, DTYPE, FUNCTION, GATED, ALPHA, LIMIT, OFFSET)
    else:
        value, da = _backward(grad, a, DTYPE, FUNCTION, ALPHA)
        return value, da, da


@triton.jit
def gradients(
    dy, x, first_row, first_col, rows, dy_stride, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, FOURS: tl.constexpr = 0,
):  # fmt: skip
    """A tile of y, da and db (da again unless gated).

    Outside the tensor they are zero, as all kinds' are where dy and x are.
    """
    grad, a, b = loaded(
        dy, x, first_row, first_col, rows, dy_stride, x_stride, UNIT, WIDTH, GATED, R, C, FOURS
    )
    grad, a, b = widened(grad), widened(a), widened(b)
    tl.debug_barrier()  # else the loads are spread over the computation, and wait one by one
    return gradients_of(grad, a, b, x.dtype.element_ty, FUNCTION, GATED, ALPHA, LIMIT, OFFSET)
