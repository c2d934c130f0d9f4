"""Kernels that make a tensor tile by tile and write its quantized copies.

What is quantized, SOURCE, is the tensor x itself, the output of a norm whose statistics are known,
or of an activation: in fp32, rounded to x's dtype, as the unfused kernels store it.
"""

import triton
import triton.language as tl

from .activations import _backward, _gate, _gate_backward, _load, _load_biased
from .norm_kernels import _affine
from .quantize_kernels import encode, magnitude, scale_of, scaled_within, store_amax, store_copies


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
        value = _load_biased(x, bias, at, cols, mask, col_mask)
        if GATED:
            b = _load_biased(x, bias, at + WIDTH, cols + WIDTH, mask, col_mask)
            value = _gate(value, b, FUNCTION, ALPHA, LIMIT, OFFSET)
        else:
            value, _, _ = FUNCTION(value, ALPHA)
    else:
        value = _load(x, at, mask)
    if SOURCE == "norm":
        if mean is not None:
            value -= _load(mean, row, inside)
        scale = _load(rstd, row, inside)
        value = _affine(value, scale, weight, bias, cols, col_mask, ZERO_CENTERED)
    return tl.where(mask, value.to(x.dtype.element_ty).to(tl.float32), 0.0)


@triton.jit(do_not_specialize=["rows", "x_stride"])
def copy_kernel(
    x, bias, weight, mean, rstd, row_data, row_scale, col_data, col_scale, given, amax, col_amax,
    rows, x_stride, ROW_UNIT: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    SOURCE: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr,
    LIMIT: tl.constexpr, OFFSET: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr, SCALING: tl.constexpr, BLOCK: tl.constexpr,
    E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A tile's copies, its amax, and its columns' amaxes (`[tiles down, WIDTH]`), if asked."""
    rows *= ROW_UNIT
    blocks: tl.constexpr = (WIDTH + C - 1) // C
    tile, first_col = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * C
    first_row = tile * R
    value = _source(
        x, bias, weight, mean, rstd, first_row + tl.arange(0, R)[:, None],
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
        value, first_row, first_col, rows, WIDTH, WIDTH, row_data, row_scale, col_data, col_scale,
        given, R, C, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
    )  # fmt: skip


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
        codes = encode(scaled_within(value, multiplier), E5M2, NATIVE)
        tl.store(data + row.to(tl.int64) * WIDTH + cols, codes, (row < rows) & (cols < WIDTH))


@triton.jit
def _gradients(
    dy, x, first_row, first_col, rows, dy_stride, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """A tile of y, da and db (da again unless gated), zero outside the tensor."""
    row = first_row + tl.arange(0, R)[:, None]
    cols = first_col + tl.arange(0, C)[None, :]
    mask = (row < rows) & (cols < WIDTH)
    grad = _load(dy, row.to(tl.int64) * dy_stride * UNIT + cols, mask)
    at = row.to(tl.int64) * x_stride * UNIT + cols
    a = _load(x, at, mask)
    if GATED:
        b = _load(x, at + WIDTH, mask)
        value, da, db = _gate_backward(grad, a, b, FUNCTION, ALPHA, LIMIT, OFFSET)
    else:
        value, da = _backward(grad, a, FUNCTION, ALPHA)
        db = da
    da, db = tl.where(mask, da, 0.0), tl.where(mask, db, 0.0)
    return tl.where(mask, value, 0.0), da, db


@triton.jit
def _store_output(
    dy, x, row_data, row_scale, col_data, col_scale, given, amax, sums, first_row, first_col, rows,
    dy_stride, x_stride, OUTPUT: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, R: tl.constexpr, C: tl.constexpr, SCALING: tl.constexpr,
    BLOCK: tl.constexpr, E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """A tile of OUTPUT "y", "da" or "db": its column sums, its amax and its copies."""
    y, da, db = _gradients(
        dy, x, first_row, first_col, rows, dy_stride, x_stride, UNIT, WIDTH, FUNCTION, GATED,
        ALPHA, LIMIT, OFFSET, R, C,
    )  # fmt: skip
    value = y if OUTPUT == "y" else da if OUTPUT == "da" else db
    width: tl.constexpr = WIDTH * 2 if GATED and OUTPUT != "y" else WIDTH
    offset: tl.constexpr = WIDTH if OUTPUT == "db" else 0
    if sums is not None:
        cols = first_col + tl.arange(0, C)
        tl.store(sums + offset + cols, tl.sum(value, 0), cols < WIDTH)
    value = value.to(x.dtype.element_ty).to(tl.float32)
    if amax is not None:
        store_amax(value, amax)
    store_copies(
        value, first_row, first_col + offset, rows, WIDTH + offset, width, row_data, row_scale,
        col_data, col_scale, given, R, C, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
    )  # fmt: skip


@triton.jit
def _store_parts(
    dy, x, row_data, row_scale, col_data, col_scale, given, amax, sums, first_row, first_col, rows,
    dy_stride, x_stride, OUTPUT: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    SCALING: tl.constexpr, BLOCK: tl.constexpr, E5M2: tl.constexpr, EPS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`_store_output` of a tile, whole, or of its parts: see `activation_backward_kernel`."""
    if PARTS == 1:
        _store_output(
            dy, x, row_data, row_scale, col_data, col_scale, given, amax, sums, first_row,
            first_col, rows, dy_stride, x_stride, OUTPUT, UNIT, WIDTH, FUNCTION, GATED, ALPHA,
            LIMIT, OFFSET, R, C, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
        )  # fmt: skip
    else:
        for part in tl.static_range(PARTS):
            if row_data is not None or sums is not None:
                _store_output(
                    dy, x, row_data, row_scale, None, None, None, None, sums,
                    first_row + part * (R // PARTS), first_col, rows, dy_stride, x_stride, OUTPUT,
                    UNIT, WIDTH, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, R // PARTS, C, SCALING,
                    BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
                )  # fmt: skip
            if sums is not None:
                sums += WIDTH * 2 if GATED else WIDTH
            if col_data is not None:
                _store_output(
                    dy, x, None, None, col_data, col_scale, None, None, None, first_row,
                    first_col + part * (C // PARTS), rows, dy_stride, x_stride, OUTPUT,
                    UNIT, WIDTH, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, R, C // PARTS, SCALING,
                    BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
                )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "dy_stride", "x_stride"])
def activation_backward_kernel(
    dy, x, dx_row, dx_row_scale, dx_col, dx_col_scale, dx_given, dx_amax,
    y_row, y_row_scale, y_col, y_col_scale, y_given, y_amax, dbias, rows, dy_stride, x_stride,
    ROW_UNIT: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, FUNCTION: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    PARTS: tl.constexpr, R: tl.constexpr, C: tl.constexpr, SCALING: tl.constexpr,
    BLOCK: tl.constexpr, E5M2: tl.constexpr, Y_E5M2: tl.constexpr, EPS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One tile of dx (for a gated kind one of each half), of y, and their column sums for dbias.

    Each is made anew from dy and x, which the cache holds: to keep all three would spill. So would
    blocks of 1 x 128 and of 128 x 1 in one tile: with PARTS 2 the row copy is written from upper
    and lower halves of it, the column copy from left and right ones.
    """
    rows *= ROW_UNIT
    blocks: tl.constexpr = (WIDTH + C - 1) // C
    total: tl.constexpr = WIDTH * 2 if GATED else WIDTH
    tile, first_col = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * C
    first_row = tile * R
    if dbias is not None:
        dbias += tile.to(tl.int64) * PARTS * total
    if dx_amax is not None:
        dx_amax += tl.program_id(0)
    if y_amax is not None:
        y_amax += tl.program_id(0)
    _store_parts(
        dy, x, dx_row, dx_row_scale, dx_col, dx_col_scale, dx_given, dx_amax, dbias, first_row,
        first_col, rows, dy_stride, x_stride, "da", UNIT, WIDTH, FUNCTION, GATED, ALPHA,
        LIMIT, OFFSET, PARTS, R, C, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
    )  # fmt: skip
    if GATED:
        if dx_amax is not None:
            dx_amax += tl.num_programs(0)
        _store_parts(
            dy, x, dx_row, dx_row_scale, dx_col, dx_col_scale, dx_given, dx_amax, dbias, first_row,
            first_col, rows, dy_stride, x_stride, "db", UNIT, WIDTH, FUNCTION, GATED, ALPHA,
            LIMIT, OFFSET, PARTS, R, C, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
        )  # fmt: skip
    if y_row is not None or y_col is not None or y_amax is not None:
        _store_parts(
            dy, x, y_row, y_row_scale, y_col, y_col_scale, y_given, y_amax, None, first_row,
            first_col, rows, dy_stride, x_stride, "y", UNIT, WIDTH, FUNCTION, GATED, ALPHA,
            LIMIT, OFFSET, PARTS, R, C, SCALING, BLOCK, Y_E5M2, EPS, POWER_OF_TWO, NATIVE,
        )  # fmt: skip
