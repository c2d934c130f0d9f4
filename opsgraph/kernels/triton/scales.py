"""A scale for each column [and residual add]. Formulas: `kernels/reference/scales.py`."""

from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.scales import dtype_of
from .activations import FUSION, config
from .launch import (
    ceil_div,
    launch,
    multiprocessors,
    on_device_of,
    packed,
    row_major,
    stride_unit,
    sum_partials,
)
from .ptx import rounded

ROUNDED = {torch.float32: None, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit(do_not_specialize=["rows", "x_stride", "other_stride"])
def scale_kernel(
    x, weight, other, y, rows, x_stride, other_stride, DTYPE: tl.constexpr,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """DTYPE: what the product is rounded to, or None."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = (row < rows) & (cols < WIDTH)
    value = tl.load(x + row * x_stride * UNIT + cols, mask, other=0.0).to(tl.float32)
    value *= tl.load(weight + cols, cols < WIDTH, other=0.0).to(tl.float32)
    if DTYPE is not None:
        value = rounded(value, DTYPE)
    if other is not None:
        added = tl.load(other + row * other_stride * UNIT + cols, mask, other=0.0)
        value += added.to(tl.float32)
    tl.store(y + row * WIDTH + cols, value.to(y.dtype.element_ty), mask)


def scale_forward(x: Tensor, weight: Tensor, other: Tensor | None = None) -> Tensor:
    """`y = x * weight (+ other)`; weight: `[width]`; other: `[rows, width]`, of any dtypes."""
    rows, width = x.shape
    dtype = dtype_of(x.dtype, weight.dtype)
    sums = dtype if other is None else dtype_of(dtype, other.dtype)
    y = torch.empty(rows, width, dtype=sums, device=x.device)
    if not y.numel():
        return y
    x, other, factors = row_major(x), None if other is None else row_major(other), packed(weight)
    unit, options = stride_unit(x, other), config(width)
    grid = (ceil_div(rows, options["ROWS"]) * ceil_div(width, options["BLOCK"]),)
    with on_device_of(x):
        launch(
            scale_kernel, grid,
            x, factors, other, y, rows, x.stride(0) // unit,
            0 if other is None else other.stride(0) // unit,
            DTYPE=ROUNDED[dtype], UNIT=unit, WIDTH=width, **options, **FUSION,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows", "dy_stride", "x_stride"])
def scale_backward_kernel(
    dy, x, weight, dx, partials, rows, dy_stride, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of columns over a share of the rows: all of them in one step unless summing."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    share = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(weight + cols, cols < WIDTH, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(share, tl.cdiv(rows, ROWS), tl.num_programs(0) // blocks, num_stages=2):
        row = tl.arange(0, ROWS)[:, None].to(tl.int64) + tile * ROWS
        mask = (row < rows) & (cols[None, :] < WIDTH)
        at = row * dy_stride * UNIT + cols[None, :]
        grad = tl.load(dy + at, mask, other=0.0).to(tl.float32)
        if dx is not None:
            made = (grad * factor).to(dx.dtype.element_ty)
            tl.store(dx + row * WIDTH + cols[None, :], made, mask)
        if partials is not None:
            value = tl.load(x + row * x_stride * UNIT + cols[None, :], mask, other=0.0)
            total += grad * value.to(tl.float32)
    if partials is not None:
        to = partials + share.to(tl.int64) * WIDTH + cols
        tl.store(to, tl.sum(total, 0), cols < WIDTH)


def scale_backward(
    dy: Tensor, x: Tensor, weight: Tensor, want: Collection[str] = ("x", "weight")
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of `x * weight`, in one pass; None for what is not in want ("x", "weight").

    dweight is summed in fp32 in an order that shapes fix.
    """
    rows, width = x.shape
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device) if "x" in want else None
    dweight = partials = None
    if "weight" in want:
        new = torch.empty if x.numel() else torch.zeros
        dweight = new(width, dtype=weight.dtype, device=x.device)
    if not x.numel() or (dx is None and dweight is None):
        return dx, dweight
    dy, x, factors = row_major(dy), row_major(x), packed(weight)
    unit, options = stride_unit(dy, x), config(width)
    blocks, shares = ceil_div(width, options["BLOCK"]), ceil_div(rows, options["ROWS"])
    if dweight is not None:
        shares = min(shares, max(1, multiprocessors(x.device) * 8 // blocks))
        partials = torch.empty(shares, width, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        launch(
            scale_backward_kernel, (shares * blocks,),
            dy, x, factors, dx, partials, rows, dy.stride(0) // unit, x.stride(0) // unit,
            UNIT=unit, WIDTH=width, **options,
        )  # fmt: skip
        sum_partials(partials, dweight, None, None)
    return dx, dweight
