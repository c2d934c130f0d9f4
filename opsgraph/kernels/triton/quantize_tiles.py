"""Kernels that make a tensor tile by tile and write its quantized copies.

What is quantized, SOURCE, is the tensor x itself, the output of a norm whose statistics are known,
or of an activation: in fp32, rounded to x's dtype, as the unfused kernels store it.
"""

import triton
import triton.language as tl

from .activations import _gate, _load, _load_biased
from .norm_kernels import _affine
from .ptx import rounded
from .quantize_kernels import (
    column_scales,
    current_scale,
    encode,
    largest,
    magnitude,
    rows_of,
    scale_of,
    scaled,
    square_scale,
    store_amax,
    store_copies,
    store_row_copy,
    store_shared,
    store_tensor_scale,
)
from .quantize_pairs import amax_bits, largest_of, quarters, store_pair_blocks, store_pairs


@triton.jit
def _source(
    x, bias, weight, mean, rstd, row, cols, rows, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, SOURCE: tl.constexpr, FUNCTION: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    ZERO_CENTERED: tl.constexpr,
):  # fmt: skip
    """The tile at row `[R, 1]` and cols `[1, C]`, zero outside the tensor."""
    inside, col_mask = row < rows, cols < WIDTH
    mask = inside & col_mask
    at = row.to(tl.int64) * x_stride * UNIT + cols
    if SOURCE == "activation":
        value = _load_biased(x, bias, at, cols, mask, col_mask, True)
        dtype: tl.constexpr = x.dtype.element_ty
        if GATED:
            b = _load_biased(x, bias, at + WIDTH, cols + WIDTH, mask, col_mask, True)
            value = _gate(value, b, dtype, FUNCTION, GATED, ALPHA, LIMIT, OFFSET)
        else:
            value, _, _ = FUNCTION(value, ALPHA, dtype)
    else:
        value = _load(x, at, mask, True)
    if SOURCE == "plain":
        return value
    if SOURCE == "norm":
        if mean is not None:
            value -= _load(mean, row, inside)
        scale = _load(rstd, row, inside)
        value = _affine(value, scale, weight, bias, cols, col_mask, ZERO_CENTERED)
    return tl.where(mask, rounded(value, x.dtype.element_ty), 0.0)


@triton.jit(do_not_specialize=["rows", "x_stride"])
def copy_kernel(
    x, bias, weight, mean, rstd, row_data, row_scale, col_data, col_scale, given, amax, col_amax,
    rows, x_stride, ROW_UNIT: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    SOURCE: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, OFFSET: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, FOURS: tl.constexpr, SCALING: tl.constexpr,
    BLOCK: tl.constexpr, E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    NATIVE: tl.constexpr, LAST_FIRST: tl.constexpr,
):  # fmt: skip
    """A tile's copies, its amax, and its columns' amaxes (`[tiles down, WIDTH]`), if asked.

    LAST_FIRST: whether programs begin with the last tile.
    """
    rows *= ROW_UNIT
    blocks: tl.constexpr = (WIDTH + C - 1) // C
    program = tl.num_programs(0) - 1 - tl.program_id(0) if LAST_FIRST else tl.program_id(0)
    tile, first_col = program // blocks, (program % blocks) * C
    first_row = tile * R
    multiplier = current_scale(given, row_scale, SCALING, E5M2, EPS, POWER_OF_TWO)
    value = _source(
        x, bias, weight, mean, rstd, rows_of(first_row, R, FOURS)[:, None],
        first_col + tl.arange(0, C)[None, :], rows, x_stride, UNIT, WIDTH, SOURCE, FUNCTION, GATED,
        ALPHA, LIMIT, OFFSET, ZERO_CENTERED,
    )  # fmt: skip
    if amax is not None:
        store_amax(value, amax + tl.program_id(0))
    if col_amax is not None:
        cols = first_col + tl.arange(0, C)
        bits = tl.max(magnitude(value), 0).to(tl.float32, bitcast=True)
        tl.store(col_amax + tile.to(tl.int64) * WIDTH + cols, bits, cols < WIDTH)
    store_copies(
        value, multiplier, first_row, first_col, rows, WIDTH, WIDTH, row_data, row_scale, col_data,
        col_scale, given, R, C, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE, FOURS,
    )  # fmt: skip
    store_tensor_scale(multiplier, row_scale, col_scale, SCALING)


@triton.jit(do_not_specialize=["rows", "x_stride"])
def rows_kernel(
    x, bias, weight, mean, rstd, data, scale, rows, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, SOURCE: tl.constexpr, FUNCTION: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    ZERO_CENTERED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The row copy with one scale per row: the rows are made twice, the second time from cache."""
    row = tl.program_id(0) * R + tl.arange(0, R)[:, None]
    bits = tl.zeros([R, C], tl.int32)
    for start in tl.range(0, WIDTH, C):
        value = _source(
            x, bias, weight, mean, rstd, row, start + tl.arange(0, C)[None, :], rows, x_stride,
            UNIT, WIDTH, SOURCE, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, ZERO_CENTERED,
        )  # fmt: skip
        bits = tl.maximum(bits, magnitude(value))
    multiplier = scale_of(tl.max(bits, 1, keep_dims=True), E5M2, EPS, POWER_OF_TWO)
    tl.store(scale + row, multiplier, row < rows)
    for start in tl.range(0, WIDTH, C):
        cols = start + tl.arange(0, C)[None, :]
        value = _source(
            x, bias, weight, mean, rstd, row, cols, rows, x_stride,
            UNIT, WIDTH, SOURCE, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, ZERO_CENTERED,
        )  # fmt: skip
        codes = encode(scaled(value, multiplier), E5M2, NATIVE)
        tl.store(data + row.to(tl.int64) * WIDTH + cols, codes, (row < rows) & (cols < WIDTH))


@triton.jit(do_not_specialize=["rows", "x_stride"])
def blocks_kernel(
    x, bias, weight, mean, rstd, row_data, row_scale, row_inverse, col_data, col_scale, col_inverse,
    rows, x_stride, ROW_UNIT: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    SOURCE: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, OFFSET: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    BLOCK: tl.constexpr, R: tl.constexpr, COL_R: tl.constexpr, STAGES: tl.constexpr,
    FOURS: tl.constexpr, SCALING: tl.constexpr,
    E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The copies of BLOCK x BLOCK with scales "blocks" or "square".

    R rows at a time give the row copy and the amaxes that the rest is scaled by. That rest, the
    column copy or all of a square, is made COL_R rows at a time, of what the cache then holds: to
    keep the whole tile in registers would leave no room for a second program to load meanwhile.
    """
    rows *= ROW_UNIT
    across: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    down, col = tl.program_id(0) // across, tl.program_id(0) % across
    first_col = col * BLOCK
    cols = first_col + tl.arange(0, BLOCK)
    bits = tl.zeros([R, BLOCK], tl.int32)
    for start in tl.range(0, BLOCK, R, num_stages=STAGES):
        first_row = down * BLOCK + start
        row = first_row + tl.arange(0, R)[:, None]
        value = _source(
            x, bias, weight, mean, rstd, row, cols[None, :], rows, x_stride, UNIT, WIDTH, SOURCE,
            FUNCTION, GATED, ALPHA, LIMIT, OFFSET, ZERO_CENTERED,
        )  # fmt: skip
        if col_data is not None or SCALING == "square":
            bits = tl.maximum(bits, magnitude(value))
        if row_data is not None and SCALING == "blocks":
            store_row_copy(
                value, first_row, first_col, rows, WIDTH, WIDTH, row_data, row_scale, row_inverse,
                None, R, BLOCK, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
            )  # fmt: skip
    if SCALING == "square":
        multiplier = square_scale(
            largest(bits), down, col, rows, WIDTH, row_scale, row_inverse, col_scale, col_inverse,
            BLOCK, E5M2, EPS, POWER_OF_TWO,
        )  # fmt: skip
    elif col_data is not None:
        multiplier = column_scales(
            bits, cols, WIDTH, down, rows, col_scale, col_inverse, BLOCK, E5M2, EPS, POWER_OF_TWO
        )
    if SCALING == "square" or col_data is not None:
        # From the last rows up: those are in the nearest cache still.
        for start in tl.range(0, BLOCK, COL_R, num_stages=STAGES):
            first_row = down * BLOCK + BLOCK - COL_R - start
            row = rows_of(first_row, COL_R, FOURS)[:, None]
            value = _source(
                x, bias, weight, mean, rstd, row, cols[None, :], rows, x_stride, UNIT, WIDTH,
                SOURCE, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, ZERO_CENTERED,
            )  # fmt: skip
            store_shared(
                value, multiplier, first_row, first_col, rows, WIDTH, WIDTH,
                row_data if SCALING == "square" else None, col_data, COL_R, BLOCK, E5M2, NATIVE,
                FOURS,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "x_stride"])
def pairs_kernel(
    x, bias, weight, mean, rstd, row_data, row_scale, row_inverse, col_data, col_scale, col_inverse,
    rows, x_stride, ROW_UNIT: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    SOURCE: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, OFFSET: tl.constexpr, ZERO_CENTERED: tl.constexpr, BLOCK: tl.constexpr,
    SCALING: tl.constexpr, E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """`blocks_kernel` of bf16, "square" or "blocks" of powers of two: a block is in registers."""
    rows *= ROW_UNIT
    across: tl.constexpr = WIDTH // BLOCK
    down, first_col = tl.program_id(0) // across, tl.program_id(0) % across * BLOCK
    value = _source(
        x, bias, weight, mean, rstd, rows_of(down * BLOCK, BLOCK, True)[:, None],
        first_col + tl.arange(0, BLOCK)[None, :], rows, x_stride, UNIT, WIDTH, SOURCE, FUNCTION,
        GATED, ALPHA, LIMIT, OFFSET, ZERO_CENTERED,
    )  # fmt: skip
    tile = quarters(value, BLOCK, BLOCK)
    if SCALING == "square":
        multiplier = square_scale(
            amax_bits(largest_of(tile)), down, first_col // BLOCK, rows, WIDTH, row_scale,
            row_inverse, col_scale, col_inverse, BLOCK, E5M2, EPS, POWER_OF_TWO,
        )  # fmt: skip
        store_pairs(
            tile, multiplier, down * BLOCK, first_col, rows, WIDTH, WIDTH, row_data, col_data,
            BLOCK, BLOCK, E5M2,
        )  # fmt: skip
    else:
        store_pair_blocks(
            tile, down, first_col, rows, WIDTH, row_data, row_scale, row_inverse, col_data,
            col_scale, col_inverse, BLOCK, E5M2,
        )  # fmt: skip


@triton.jit(do_not_specialize=["count"])
def amax_kernel(x, amax, count, UNIT: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr):
    """Partial amaxes of a contiguous tensor: of as many pieces of BLOCK elements."""
    count = count.to(tl.int64) * UNIT
    bits = tl.zeros([BLOCK], tl.int32)
    for piece in tl.range(0, PIECES, num_stages=3):
        at = (tl.program_id(0).to(tl.int64) * PIECES + piece) * BLOCK + tl.arange(0, BLOCK)
        bits = tl.maximum(bits, magnitude(tl.load(x + at, at < count, other=0.0).to(tl.float32)))
    tl.store(amax + tl.program_id(0), tl.max(bits, 0).to(tl.float32, bitcast=True))
