"""Sums that no other kernel takes along: of a value, a bias and a residual, and of rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.scales import dtype_of
from .activations import config
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


@triton.jit(do_not_specialize=["rows", "x_stride", "other_stride"])
def add_kernel(
    x, bias, other, y, rows, x_stride, other_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = (row < rows) & (cols < WIDTH)
    value = tl.load(x + row * x_stride * UNIT + cols, mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + cols, cols < WIDTH, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    if other is not None:
        added = tl.load(other + row * other_stride * UNIT + cols, mask, other=0.0)
        value += added.to(tl.float32)
    tl.store(y + row * WIDTH + cols, value.to(y.dtype.element_ty), mask)


def add(x: Tensor, other: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """`y = (x + bias) + other`, each sum in fp32 and rounded as PyTorch does it, the first to x's.

    x, other, y: `[rows, width]`, y of the dtype to which PyTorch promotes; bias: `[width]`.
    """
    rows, width = x.shape
    dtype = x.dtype if other is None else dtype_of(x.dtype, other.dtype)
    y = torch.empty(rows, width, dtype=dtype, device=x.device)
    if not y.numel():
        return y
    x, other, bias = row_major(x), None if other is None else row_major(other), packed(bias)
    unit, options = stride_unit(x, other), config(width)
    grid = (ceil_div(rows, options["ROWS"]) * ceil_div(width, options["BLOCK"]),)
    with on_device_of(x):
        launch(
            add_kernel, grid,
            x, bias, other, y, rows, x.stride(0) // unit,
            0 if other is None else other.stride(0) // unit,
            UNIT=unit, WIDTH=width, **options,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows", "x_stride"])
def sum_rows_kernel(
    x, partials, rows, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of columns over a share of the rows."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    share = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(share, tl.cdiv(rows, ROWS), tl.num_programs(0) // blocks, num_stages=2):
        row = tl.arange(0, ROWS)[:, None].to(tl.int64) + tile * ROWS
        mask = (row < rows) & (cols[None, :] < WIDTH)
        at = row * x_stride * UNIT + cols[None, :]
        total += tl.load(x + at, mask, other=0.0).to(tl.float32)
    tl.store(partials + share.to(tl.int64) * WIDTH + cols, tl.sum(total, 0), cols < WIDTH)


def sum_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of x's rows `[rows, width]`, in fp32 and in a fixed order, as `[width]` of dtype."""
    rows, width = x.shape
    if not x.numel():
        return torch.zeros(width, dtype=dtype, device=x.device)
    x, options = row_major(x), config(width) | {"num_warps": 8}
    unit, blocks = stride_unit(x), ceil_div(width, options["BLOCK"])
    shares = ceil_div(rows, options["ROWS"])
    shares = min(shares, max(1, multiprocessors(x.device) * 4 // blocks))
    out = torch.empty(width, dtype=dtype, device=x.device)
    partials = torch.empty(shares, width, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        launch(
            sum_rows_kernel, (shares * blocks,), x, partials, rows, x.stride(0) // unit,
            UNIT=unit, WIDTH=width, **options,
        )  # fmt: skip
        sum_partials(partials, out, None, None)
    return out
