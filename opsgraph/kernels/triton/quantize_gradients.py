"""Kernels that make an activation's gradient tile by tile, and the activation, and quantize both.

Both are rounded to x's dtype first, as the kernels that store them would.
"""

import triton
import triton.language as tl

from .gradient_tiles import gradients, gradients_of, loaded
from .ptx import rounded, widened
from .quantize_kernels import (
    column_scales,
    current_scale,
    largest,
    magnitude,
    square_scale,
    store_copies,
    store_row_copy,
    store_tensor_scale,
)
from .quantize_pairs import (
    amax_bits,
    larger,
    largest_of,
    magnitudes_of,
    powers_of,
    quarters,
    store_known_columns,
    store_paired_rows,
    store_pairs,
)


@triton.jit
def _rounded(value, x):
    return rounded(value, x.dtype.element_ty)


@triton.jit
def _most(bits, R: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr):
    """A tile's largest; of one among several, only of 8 neighbours each, which one thread has."""
    if TILES == 1:
        return largest(bits)
    else:
        return tl.max(tl.reshape(bits, [R, C // 8, 8]), 2)


@triton.jit(do_not_specialize=["rows", "dy_stride", "x_stride"])
def activation_backward_kernel(
    dy, x, dx_row, dx_row_scale, dx_col, dx_col_scale, dx_given, dx_amax,
    y_row, y_row_scale, y_col, y_col_scale, y_given, y_amax, dbias, rows, dy_stride, x_stride,
    ROW_UNIT: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, FUNCTION: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    FOURS: tl.constexpr, SCALING: tl.constexpr, BLOCK: tl.constexpr, E5M2: tl.constexpr,
    Y_E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr, NATIVE: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """Tiles of dx (for a gated kind of each half) and of y, TILES of them down, from one reading.

    Scales are "tensor", with amaxes, or "mx"; dbias takes dx's column sums over each tile. With
    "blocks" and "square" it follows `activation_backward_blocks_kernel`, whose scales are given.
    PAIRS: whether a tile is bf16 with FOURS and taken as `quantize_pairs` does: with "tensor", and
    with "blocks" of powers of two.
    """
    rows *= ROW_UNIT
    across: tl.constexpr = (WIDTH + C - 1) // C
    total: tl.constexpr = WIDTH * 2 if GATED else WIDTH
    KNOWN: tl.constexpr = SCALING == "blocks" or SCALING == "square"
    STORED: tl.constexpr = "tensor" if KNOWN else SCALING
    part, first_col = tl.program_id(0) // across, (tl.program_id(0) % across) * C
    dx_bits = tl.full([], 0, tl.int32)
    y_bits = dx_bits
    if TILES > 1:
        dx_bits = tl.zeros([R, C // 8], tl.int32)
        y_bits = tl.zeros([R, C // 8], tl.int32)
    dx_multiplier = current_scale(dx_given, dx_row_scale, SCALING, E5M2, EPS, POWER_OF_TWO)
    y_multiplier = current_scale(y_given, y_row_scale, SCALING, Y_E5M2, EPS, POWER_OF_TWO)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        first_row = (part * TILES + tile) * R
        if KNOWN:
            a_multiplier = _known_scale(
                dx_given, dx_col, first_row, first_col, rows, total, C, SCALING, BLOCK
            )
            b_multiplier = _known_scale(
                dx_given, dx_col, first_row, first_col + WIDTH, rows, total, C, SCALING, BLOCK
            )
            c_multiplier = _known_scale(
                y_given, y_col, first_row, first_col, rows, WIDTH, C, SCALING, BLOCK
            )
            if PAIRS:
                a_multiplier, b_multiplier = powers_of(a_multiplier, C), powers_of(b_multiplier, C)
                c_multiplier = powers_of(c_multiplier, C)
        else:
            a_multiplier, b_multiplier, c_multiplier = dx_multiplier, dx_multiplier, y_multiplier
        y, da, db = gradients(
            dy, x, first_row, first_col, rows, dy_stride, x_stride, UNIT, WIDTH, FUNCTION, GATED,
            ALPHA, LIMIT, OFFSET, R, C, FOURS,
        )  # fmt: skip
        if dbias is not None:
            _store_sums(da, db, dbias, part * TILES + tile, first_col, WIDTH, GATED, C)
        if PAIRS and KNOWN:
            first, second, made = quarters(da, R, C), quarters(db, R, C), quarters(y, R, C)
            store_known_columns(
                first, a_multiplier, first_row, first_col, rows, WIDTH, dx_col, R, C, E5M2
            )
            if GATED:
                store_known_columns(
                    second, b_multiplier, first_row, first_col + WIDTH, rows, total, dx_col, R, C,
                    E5M2,
                )  # fmt: skip
            store_known_columns(
                made, c_multiplier, first_row, first_col, rows, WIDTH, y_col, R, C, Y_E5M2
            )
        elif PAIRS:
            dx_bits, y_bits = _store_all(
                y, da, db, a_multiplier, c_multiplier, first_row, first_col, rows, dx_row, dx_col,
                dx_amax, y_row, y_col, y_amax, WIDTH, GATED, R, C, E5M2, Y_E5M2,
            )  # fmt: skip
        else:
            y, da, db = _rounded(y, x), _rounded(da, x), _rounded(db, x)
            if dx_amax is not None:
                bits = magnitude(da)
                if GATED:
                    bits = tl.maximum(bits, magnitude(db))
                dx_bits = tl.maximum(dx_bits, _most(bits, R, C, TILES))
            if y_amax is not None:
                y_bits = tl.maximum(y_bits, _most(magnitude(y), R, C, TILES))
            store_copies(
                da, a_multiplier, first_row, first_col, rows, WIDTH, total, dx_row, dx_row_scale,
                dx_col, dx_col_scale, dx_given, R, C, STORED, BLOCK, E5M2, EPS, POWER_OF_TWO,
                NATIVE, FOURS,
            )  # fmt: skip
            if GATED:
                store_copies(
                    db, b_multiplier, first_row, first_col + WIDTH, rows, total, total, dx_row,
                    dx_row_scale, dx_col, dx_col_scale, dx_given, R, C, STORED, BLOCK, E5M2, EPS,
                    POWER_OF_TWO, NATIVE, FOURS,
                )  # fmt: skip
            store_copies(
                y, c_multiplier, first_row, first_col, rows, WIDTH, WIDTH, y_row, y_row_scale,
                y_col, y_col_scale, y_given, R, C, STORED, BLOCK, Y_E5M2, EPS, POWER_OF_TWO, NATIVE,
                FOURS,
            )  # fmt: skip
    if TILES > 1:
        dx_bits, y_bits = largest(dx_bits), largest(y_bits)
    if dx_amax is not None:
        tl.store(dx_amax + tl.program_id(0), dx_bits.to(tl.float32, bitcast=True))
    if y_amax is not None:
        tl.store(y_amax + tl.program_id(0), y_bits.to(tl.float32, bitcast=True))
    store_tensor_scale(dx_multiplier, dx_row_scale, dx_col_scale, SCALING)
    store_tensor_scale(y_multiplier, y_row_scale, y_col_scale, SCALING)


@triton.jit
def _store_all(
    y, da, db, dx_multiplier, y_multiplier, first_row, first_col, rows, dx_row, dx_col, dx_amax,
    y_row, y_col, y_amax, WIDTH: tl.constexpr, GATED: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, E5M2: tl.constexpr, Y_E5M2: tl.constexpr,
):  # fmt: skip
    """The copies of a tile, in pairs; returns the bits of its amaxes, 0 for what is not asked."""
    total: tl.constexpr = WIDTH * 2 if GATED else WIDTH
    dx_bits = tl.full([], 0, tl.int32)
    y_bits = dx_bits
    first = quarters(da, R, C)
    if GATED:
        second = quarters(db, R, C)
    if dx_amax is not None:
        bits = largest_of(first)
        if GATED:
            bits = larger(bits, largest_of(second))
        dx_bits = amax_bits(bits)
    store_pairs(
        first, dx_multiplier, first_row, first_col, rows, WIDTH, total, dx_row, dx_col, R, C, E5M2
    )
    if GATED:
        store_pairs(
            second, dx_multiplier, first_row, first_col + WIDTH, rows, total, total, dx_row, dx_col,
            R, C, E5M2,
        )  # fmt: skip
    if y_row is not None or y_col is not None or y_amax is not None:
        made = quarters(y, R, C)
        if y_amax is not None:
            y_bits = amax_bits(largest_of(made))
        store_pairs(
            made, y_multiplier, first_row, first_col, rows, WIDTH, WIDTH, y_row, y_col, R, C, Y_E5M2
        )
    return dx_bits, y_bits


@triton.jit
def _known_scale(
    given, col, first_row, first_col, rows, width, C: tl.constexpr, SCALING: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The multipliers of a tile's columns, `[1, C]`, or of the square that it lies in, `[1, 1]`.

    given: those of columns, `[blocks down, width]`; of "square" the scales of the column copy, or
    of the row copy, where there is no other.
    """
    row_block = first_row // BLOCK
    if given is None:
        return tl.full([1, 1], 1.0, tl.float32)
    elif SCALING == "blocks":
        cols = first_col + tl.arange(0, C)[None, :]
        return tl.load(given + row_block.to(tl.int64) * width + cols, cols < width, other=1.0)
    else:
        col_block = first_col // BLOCK
        if col is not None:
            at = col_block * tl.cdiv(rows, BLOCK) + row_block
        else:
            at = row_block * tl.cdiv(width, BLOCK) + col_block
        return tl.full([1, 1], 1.0, tl.float32) * tl.load(given + at)


@triton.jit
def _store_sums(
    a_sum, b_sum, dbias, part, first_col, WIDTH: tl.constexpr, GATED: tl.constexpr, C: tl.constexpr
):
    cols = first_col + tl.arange(0, C)
    sums = dbias + part.to(tl.int64) * (WIDTH * 2 if GATED else WIDTH) + cols
    tl.store(sums, tl.sum(a_sum, 0), cols < WIDTH)
    if GATED:
        tl.store(sums + WIDTH, tl.sum(b_sum, 0), cols < WIDTH)


@triton.jit(do_not_specialize=["rows", "dy_stride", "x_stride"])
def activation_backward_blocks_kernel(
    dy, x, dx_row, dx_row_scale, dx_row_inverse, dx_col_scale, dx_col_inverse, dx_columns,
    y_row, y_row_scale, y_row_inverse, y_col_scale, y_col_inverse, y_columns,
    dbias, rows, dy_stride, x_stride,
    ROW_UNIT: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, FUNCTION: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    R: tl.constexpr, STAGES: tl.constexpr, SCALING: tl.constexpr, BLOCK: tl.constexpr,
    E5M2: tl.constexpr, Y_E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    NATIVE: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """The scales of BLOCK x BLOCK of dx (of each half of it) and of y, and row copies of "blocks".

    Column copies, and all of "square", need the amaxes of the whole block first: it is faster to
    read dy and x again, in another kernel, than to hold as much as a block in registers.
    PAIRS: whether tiles are bf16, taken two values to a word, with "blocks" of powers of two. That
    leaves registers for the rows that come next.
    """
    rows *= ROW_UNIT
    across: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    total: tl.constexpr = WIDTH * 2 if GATED else WIDTH
    down, col = tl.program_id(0) // across, tl.program_id(0) % across
    first_col = col * BLOCK
    cols = first_col + tl.arange(0, BLOCK)
    SQUARE: tl.constexpr = SCALING == "square"
    DX_LATER: tl.constexpr = dx_col_scale is not None or (SQUARE and dx_row_scale is not None)
    Y_LATER: tl.constexpr = y_col_scale is not None or (SQUARE and y_row_scale is not None)
    a_bits = tl.zeros([R, BLOCK // 2 if PAIRS else BLOCK], tl.int32)
    b_bits, y_bits = a_bits, a_bits
    a_sum = tl.zeros([R, BLOCK], tl.float32)
    b_sum = tl.zeros([R, BLOCK], tl.float32)
    end = tl.minimum(rows, down * BLOCK + BLOCK)
    if PAIRS:
        grad, a, b = loaded(
            dy, x, down * BLOCK, first_col, end, dy_stride, x_stride, UNIT, WIDTH, GATED, R, BLOCK
        )
    for start in tl.range(0, BLOCK, R, num_stages=STAGES):
        first_row = down * BLOCK + start
        if PAIRS:
            next_grad, next_a, next_b = loaded(
                dy, x, first_row + R, first_col, end, dy_stride, x_stride, UNIT, WIDTH, GATED, R,
                BLOCK,
            )  # fmt: skip
            y, da, db = gradients_of(
                widened(grad), widened(a), widened(b), x.dtype.element_ty, FUNCTION, GATED, ALPHA,
                LIMIT, OFFSET,
            )  # fmt: skip
            grad, a, b = next_grad, next_a, next_b
        else:
            y, da, db = gradients(
                dy, x, first_row, first_col, rows, dy_stride, x_stride, UNIT, WIDTH, FUNCTION,
                GATED, ALPHA, LIMIT, OFFSET, R, BLOCK,
            )  # fmt: skip
        if dbias is not None:
            a_sum += da
            if GATED:
                b_sum += db
        if PAIRS:
            a_bits = store_paired_rows(
                da, a_bits, first_row, first_col, rows, total, dx_row, dx_row_scale, dx_row_inverse,
                R, BLOCK, E5M2,
            )  # fmt: skip
            if GATED:
                b_bits = store_paired_rows(
                    db, b_bits, first_row, first_col + WIDTH, rows, total, dx_row, dx_row_scale,
                    dx_row_inverse, R, BLOCK, E5M2,
                )  # fmt: skip
            y_bits = store_paired_rows(
                y, y_bits, first_row, first_col, rows, WIDTH, y_row, y_row_scale, y_row_inverse, R,
                BLOCK, Y_E5M2,
            )  # fmt: skip
        else:
            y, da, db = _rounded(y, x), _rounded(da, x), _rounded(db, x)
            if DX_LATER:
                a_bits = tl.maximum(a_bits, magnitude(da))
                if GATED:
                    b_bits = tl.maximum(b_bits, magnitude(db))
            if Y_LATER:
                y_bits = tl.maximum(y_bits, magnitude(y))
        if SCALING == "blocks" and not PAIRS:
            if dx_row is not None:
                store_row_copy(
                    da, first_row, first_col, rows, WIDTH, total, dx_row, dx_row_scale,
                    dx_row_inverse, None, R, BLOCK, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
                )  # fmt: skip
                if GATED:
                    store_row_copy(
                        db, first_row, first_col + WIDTH, rows, total, total, dx_row, dx_row_scale,
                        dx_row_inverse, None, R, BLOCK, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO,
                        NATIVE,
                    )  # fmt: skip
            if y_row is not None:
                store_row_copy(
                    y, first_row, first_col, rows, WIDTH, WIDTH, y_row, y_row_scale, y_row_inverse,
                    None, R, BLOCK, SCALING, BLOCK, Y_E5M2, EPS, POWER_OF_TWO, NATIVE,
                )  # fmt: skip
    if PAIRS:
        a_bits, b_bits = magnitudes_of(a_bits, R, BLOCK), magnitudes_of(b_bits, R, BLOCK)
        y_bits = magnitudes_of(y_bits, R, BLOCK)
    if dbias is not None:
        _store_sums(a_sum, b_sum, dbias, down, first_col, WIDTH, GATED, BLOCK)
    if DX_LATER:
        _store_later_scale(
            a_bits, cols, total, down, col, rows, dx_row_scale, dx_row_inverse, dx_col_scale,
            dx_col_inverse, dx_columns, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO,
        )  # fmt: skip
        if GATED:
            _store_later_scale(
                b_bits, cols + WIDTH, total, down, col + WIDTH // BLOCK, rows, dx_row_scale,
                dx_row_inverse, dx_col_scale, dx_col_inverse, dx_columns, SCALING, BLOCK, E5M2, EPS,
                POWER_OF_TWO,
            )  # fmt: skip
    if Y_LATER:
        _store_later_scale(
            y_bits, cols, WIDTH, down, col, rows, y_row_scale, y_row_inverse, y_col_scale,
            y_col_inverse, y_columns, SCALING, BLOCK, Y_E5M2, EPS, POWER_OF_TWO,
        )  # fmt: skip


@triton.jit
def _store_later_scale(
    bits, cols, width, down, col, rows, row_scale, row_inverse, col_scale, col_inverse, columns,
    SCALING: tl.constexpr, BLOCK: tl.constexpr, E5M2: tl.constexpr, EPS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """The scales that the amaxes of all of a block give; columns: see `_known_scale`."""
    if SCALING == "square":
        square_scale(
            largest(bits), down, col, rows, width, row_scale, row_inverse, col_scale, col_inverse,
            BLOCK, E5M2, EPS, POWER_OF_TWO,
        )  # fmt: skip
    else:
        multiplier = column_scales(
            bits, cols, width, down, rows, col_scale, col_inverse, BLOCK, E5M2, EPS, POWER_OF_TWO
        )
        at = down.to(tl.int64) * width + cols[None, :]
        tl.store(columns + at, multiplier, cols[None, :] < width)
