"""Activations, plain and gated, forward and backward, with the bias on either side.

A kind is a row of `functions.KINDS`. Formulas: plain `y = f(x)`; gated `y = f(a) * b` with `a` the
first half of the columns. GATED says whether a kind gates: 1, and 2 more where factors and what
they are multiplied with are rounded as PyTorch would store them, 4 more where the gate is the
second half, 8 more where f(a) is clamped, not a. One kernel per direction serves every kind.
"""

from collections.abc import Collection
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import around, configured
from .functions import constants
from .launch import (
    ceil_div,
    launch,
    multiprocessors,
    on_device_of,
    packed,
    room,
    row_major,
    stride_unit,
    sum_partials,
)
from .ptx import rounded, widened

# The compiler fuses multiply-adds differently in the two kernels; without, the activation that the
# backward computes again equals the forward's bit for bit. The kernels wait for memory either way.
FUSION = {"enable_fp_fusion": False}


@cache
def config(width: int) -> dict[str, int]:
    """Compile options for `width` columns on each side of the gate.

    A block that divides the width needs no column mask and wastes no lanes.
    """
    block = _block(width, (1024, 512, 256))
    return {"BLOCK": block, "ROWS": max(1, min(32, 2048 // block)), "num_warps": 4}


@cache
def summing_config(width: int, gated: int) -> dict[str, int]:
    """Compile options of the backward that sums a bias gradient too."""
    block = _block(width, (512, 256))
    tile, warps = (2048, 4) if gated else (512, 2)  # measured on an H200
    return {"BLOCK": block, "ROWS": max(1, min(32, tile // block)), "num_warps": warps}


def _block(width: int, sizes: tuple[int, ...]) -> int:
    return next((b for b in sizes if width % b == 0), min(sizes[0], triton.next_power_of_2(width)))


@cache
def _configs(width: int, summing: bool, kind: str, *_: Any) -> tuple[dict[str, int], ...]:
    usual = summing_config(width, constants(kind)["GATED"]) if summing else config(width)
    return around(usual, ROWS=(1, 64), num_warps=(2, 16))


@triton.jit
def _load(x, offset, mask, PAIRS: tl.constexpr = False):
    """PAIRS: whether each thread has two neighbours or more."""
    value = tl.load(x + offset, mask, other=0.0)
    return widened(value) if PAIRS else value.to(tl.float32)


@triton.jit
def _step(value, DTYPE: tl.constexpr, GATED: tl.constexpr):
    """A factor or a product, rounded to DTYPE where PyTorch would store it."""
    if GATED & 2:
        return rounded(value, DTYPE)
    else:
        return value


@triton.jit
def _factors(
    a, b, DTYPE: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """f(a), its slope, where da is 0 whatever it is multiplied with, and g(b)."""
    if LIMIT is None:
        value, slope, off = FUNCTION(a, ALPHA, DTYPE)
        return _step(value, DTYPE, GATED), slope, off, b
    else:
        if GATED & 8:
            made, slope, _ = FUNCTION(a, ALPHA, DTYPE)
            off = made > LIMIT
            value = tl.where(off, LIMIT, made)
        else:
            off = a > LIMIT
            value, slope, _ = FUNCTION(tl.where(off, LIMIT, a), ALPHA, DTYPE)
        line = tl.where(b > LIMIT, LIMIT, tl.where(b < -LIMIT, -LIMIT, b)) + OFFSET
        return _step(value, DTYPE, GATED), slope, off, _step(line, DTYPE, GATED)


@triton.jit
def _gate(
    first, second, DTYPE: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """y of the two halves, which have DTYPE in memory."""
    if GATED & 4:
        value, _, _, line = _factors(
            second, first, DTYPE, FUNCTION, GATED, ALPHA, LIMIT, OFFSET
        )  # fmt: skip
    else:
        value, _, _, line = _factors(first, second, DTYPE, FUNCTION, GATED, ALPHA, LIMIT, OFFSET)
    return value * line


@triton.jit
def _gate_backward(
    grad, first, second, DTYPE: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """y, and the gradients of the two halves."""
    if GATED & 4:
        a, b = second, first
    else:
        a, b = first, second
    value, slope, off, line = _factors(a, b, DTYPE, FUNCTION, GATED, ALPHA, LIMIT, OFFSET)
    da = tl.where(off, 0.0, _step(grad * line, DTYPE, GATED) * slope)
    db = _step(value * grad, DTYPE, GATED)
    if LIMIT is not None:
        db = tl.where(tl.abs(b) > LIMIT, 0.0, db)
    if GATED & 4:
        return value * line, db, da
    else:
        return value * line, da, db


@triton.jit
def _backward(grad, x, DTYPE: tl.constexpr, FUNCTION: tl.constexpr, ALPHA: tl.constexpr):
    """y, dx"""
    value, slope, off = FUNCTION(x, ALPHA, DTYPE)
    return value, tl.where(off, 0.0, slope * grad)


@triton.jit
def _load_biased(x, bias, offset, cols, mask, col_mask, PAIRS: tl.constexpr = False):
    value = _load(x, offset, mask, PAIRS)
    if bias is not None:
        value = (value + _load(bias, cols, col_mask)).to(x.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _first(cols, INTERLEAVE: tl.constexpr):
    """Where the columns of y have their first value in x: halves, or blocks in turns."""
    if INTERLEAVE is None:
        return cols
    else:
        return cols + cols // INTERLEAVE * INTERLEAVE


@triton.jit(do_not_specialize=["rows", "x_stride"])
def forward_kernel(
    x, bias, y, rows, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, INTERLEAVE: tl.constexpr = None,
):  # fmt: skip
    gap: tl.constexpr = WIDTH if INTERLEAVE is None else INTERLEAVE
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    tile = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = tl.arange(0, ROWS)[:, None].to(tl.int64) + tile * ROWS
    mask = (row < rows) & (cols < WIDTH)
    first = _first(cols, INTERLEAVE)
    at = row * x_stride * UNIT + first
    a = _load_biased(x, bias, at, first, mask, cols < WIDTH)
    dtype: tl.constexpr = x.dtype.element_ty
    if GATED:
        b = _load_biased(x, bias, at + gap, first + gap, mask, cols < WIDTH)
        out = _gate(a, b, dtype, FUNCTION, GATED, ALPHA, LIMIT, OFFSET)
    else:
        out, _, _ = FUNCTION(a, ALPHA, dtype)
    tl.store(y + row * WIDTH + cols, out.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "dy_stride", "x_stride"])
def backward_kernel(
    dy, x, dx, y, dbias, rows, dy_stride, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, OVER: tl.constexpr,
    INTERLEAVE: tl.constexpr = None,
):  # fmt: skip
    """A block of columns over a share of the rows: all of them in one step unless summing dbias.

    OVER: whether dx may be x or y be dy; all of a tile is then read before any of it is written.
    """
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    total: tl.constexpr = WIDTH * 2 if GATED else WIDTH
    dtype: tl.constexpr = x.dtype.element_ty
    gap: tl.constexpr = WIDTH if INTERLEAVE is None else INTERLEAVE
    share = tl.program_id(0) // blocks
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    first = _first(cols, INTERLEAVE)
    a_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    b_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(
        share, tl.cdiv(rows, ROWS), tl.num_programs(0) // blocks, num_stages=STAGES
    ):
        row = tl.arange(0, ROWS)[:, None].to(tl.int64) + tile * ROWS
        mask = (row < rows) & (cols < WIDTH)
        grad = _load(dy, row * dy_stride * UNIT + cols, mask)
        at = row * x_stride * UNIT + first
        a = _load(x, at, mask)
        if GATED:
            b = _load(x, at + gap, mask)
            if OVER:
                tl.debug_barrier()
            value, da, db = _gate_backward(
                grad, a, b, dtype, FUNCTION, GATED, ALPHA, LIMIT, OFFSET
            )  # fmt: skip
            if dx is not None:
                tl.store(dx + row * total + gap + first, db.to(dx.dtype.element_ty), mask)
            if dbias is not None:
                b_sum += db
        else:
            if OVER:
                tl.debug_barrier()
            value, da = _backward(grad, a, dtype, FUNCTION, ALPHA)
        if dx is not None:
            tl.store(dx + row * total + first, da.to(dx.dtype.element_ty), mask)
        if y is not None:
            tl.store(y + row * WIDTH + cols, value.to(y.dtype.element_ty), mask)
        if dbias is not None:
            a_sum += da
    if dbias is not None:
        columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
        partial = dbias + share.to(tl.int64) * total + _first(columns, INTERLEAVE)
        tl.store(partial, tl.sum(a_sum, 0), columns < WIDTH)
        if GATED:
            tl.store(partial + gap, tl.sum(b_sum, 0), columns < WIDTH)


def _output_width(x: Tensor, kind: str, gated: int) -> int:
    if gated and x.size(1) % 2:
        raise ValueError(f"{kind} halves its input's width, which is odd: {x.size(1)}")
    return x.size(1) // 2 if gated else x.size(1)


def activation_forward(
    x: Tensor, kind: str, params: tuple[float, ...] = (), bias: Tensor | None = None,
    interleave: int | None = None,
) -> Tensor:  # fmt: skip
    """`y = f(x + bias)`, or `f(a) * b` with a, b the halves of `x + bias`.

    interleave: gate and value alternate in blocks of `interleave` columns.

    x: `[rows, width]`; y: `[rows, width]`, or `[rows, width / 2]` for gated kinds, of x's dtype.
    bias: `[width]`; the sum is rounded to x's dtype. kind: a key of `KINDS`, with the words of
    `reference.activations.Form` after it. params: for clamped_swiglu (limit, alpha, offset), by
    default (7.0, 1.702, 1.0). Raises ValueError.
    """
    flags = constants(kind, params)
    width = _output_width(x, kind, flags["GATED"])
    rows = x.size(0)
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x = row_major(x)
    bias = packed(bias)
    unit = stride_unit(x)
    key = width, False, kind, x.dtype, bias is not None
    options = configured("activation_forward", key, _configs)
    grid = (ceil_div(rows, options["ROWS"]) * ceil_div(width, options["BLOCK"]),)
    with on_device_of(x):
        launch(
            forward_kernel, grid,
            x, bias, y, rows, x.stride(0) // unit,
            UNIT=unit, WIDTH=width, INTERLEAVE=interleave,
            **flags, **options, **FUSION,
        )  # fmt: skip
    return y


def activation_backward(
    dy: Tensor, x: Tensor, kind: str, params: tuple[float, ...] = (),
    want: Collection[str] = ("x",), bias_dtype: torch.dtype | None = None,
    to: tuple[Tensor | None, Tensor | None] = (None, None), interleave: int | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradient of `activation_forward` by its input, in one pass over dy and x.

    x: the pre-activation (bias included). Returns (dx like x, y, dbias), None for what is not in
    want ("x", "y", "bias"): y is the activation, computed again; dbias `[width of x]` is the column
    sum of the unrounded dx, in fp32 and in a fixed order, then cast to bias_dtype or x's dtype.
    to: memory for dx and y, which may be x and dy; used if it is contiguous and of x's dtype.
    """
    flags = constants(kind, params)
    width = _output_width(x, kind, flags["GATED"])
    rows, total = x.shape
    dx = room(to[0], x, total) if "x" in want else None
    y = room(to[1], x, width) if "y" in want else None
    dbias = partials = None
    if "bias" in want:
        new = torch.empty if x.numel() else torch.zeros
        dbias = new(total, dtype=bias_dtype or x.dtype, device=x.device)
    if not x.numel() or (dx is None and y is None and dbias is None):
        return dx, y, dbias
    dy, x = row_major(dy), row_major(x)
    unit = stride_unit(dy, x)
    key = width, dbias is not None, kind, x.dtype, y is not None
    options = configured("activation_backward", key, _configs)
    blocks, shares = ceil_div(width, options["BLOCK"]), ceil_div(rows, options["ROWS"])
    if dbias is not None:
        programs = multiprocessors(x.device) * (4 if flags["GATED"] else 16)
        shares = min(shares, max(1, programs // blocks))
        partials = torch.empty(shares, total, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        launch(
            backward_kernel, (shares * blocks,),
            dy, x, dx, y, partials, rows, dy.stride(0) // unit, x.stride(0) // unit,
            UNIT=unit, WIDTH=width, STAGES=1 if dbias is None else 2,
            OVER=any(each is not None for each in to), INTERLEAVE=interleave,
            **flags, **options, **FUSION,
        )  # fmt: skip
        sum_partials(partials, dbias, None, None)
    return dx, y, dbias
