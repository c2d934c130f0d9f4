"""Kernels that make a tensor, or an activation's gradient, tile by tile and write NVFP4 copies.

The bits are those of `opsgraph.kernels.reference.nvfp4`, which says the formulas. The column copy
is the row copy of the transposed tile, with a random Hadamard transform before it if asked.
"""

import triton
import triton.language as tl

from .dropout import random_bits
from .gradient_tiles import gradients
from .quantize_kernels import FP32_MAX, INFINITY_BITS, encode, magnitude, scaled, store_amax
from .quantize_tiles import _source

MINUS = tl.constexpr(0x243F)
"""Signs of the Hadamard transform, as in the reference."""


@triton.jit
def _butterfly(value, R: tl.constexpr, C: tl.constexpr, D: tl.constexpr):
    """Sums and differences of columns D apart."""
    pairs = tl.trans(tl.reshape(value, [R, C // (2 * D), 2, D]), (0, 1, 3, 2))
    first, second = tl.split(pairs)
    made = tl.trans(tl.join(first + second, first - second), (0, 1, 3, 2))
    return tl.reshape(made, [R, C])


@triton.jit
def _hadamard(value, R: tl.constexpr, C: tl.constexpr):
    bit = (MINUS >> (15 - tl.arange(0, C) % 16)) & 1
    value *= (1 - 2 * bit).to(tl.float32)[None, :]
    value = _butterfly(value, R, C, 8)
    value = _butterfly(value, R, C, 4)
    value = _butterfly(value, R, C, 2)
    return _butterfly(value, R, C, 1) * 0.25


@triton.jit
def _e2m1(value, seed, index):
    """The codes of fp32, uint8; a NaN counts as 6. With a seed they are rounded stochastically."""
    bits = magnitude(value)
    sign = tl.where(bits > INFINITY_BITS, 0, (value.to(tl.int32, bitcast=True) >> 28) & 8)
    size = tl.where(bits > INFINITY_BITS, 6.0, tl.minimum(tl.abs(value), 6.0))
    exponent = tl.maximum(size.to(tl.int32, bitcast=True) >> 23, 127)
    steps = size * ((255 - exponent) << 23).to(tl.float32, bitcast=True)
    whole = steps.to(tl.int32)
    rest = steps - whole.to(tl.float32)
    if seed is None:
        up = (rest > 0.5) | ((rest == 0.5) & ((whole & 1) == 1))
    else:
        up = random_bits(seed, index).to(tl.float32) * 5.9604644775390625e-08 < rest
    return (whole + up.to(tl.int32) + 2 * (exponent - 127) | sign).to(tl.uint8)


@triton.jit
def _scale(bits, amax):
    """Of blocks: the E4M3 scale's bits, int32, and what the data is multiplied by."""
    multiplier = tl.minimum(tl.div_rn(tl.full([], 2688.0, tl.float32), amax), FP32_MAX)
    multiplier = tl.where((amax > 0) & (magnitude(amax) < INFINITY_BITS), multiplier, 1.0)
    product = scaled(bits.to(tl.float32, bitcast=True), multiplier)
    code = encode(tl.div_rn(product, tl.full(product.shape, 6.0, tl.float32)), False, False)
    code = code.to(tl.int32) & 0x7F
    normal = (((code >> 3) + 120) << 23 | (code & 7) << 20).to(tl.float32, bitcast=True)
    d = tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)
    factor = tl.minimum(tl.div_rn(tl.zeros_like(d) + multiplier, d), FP32_MAX)
    return code, tl.where(code == 0x7F, float("nan"), factor)


@triton.jit
def _store(
    value, data, scale, amax, seed, first_row, first_col, end_row, end_col, cols,
    HEIGHT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile of a row copy `cols` wide, up to (end_row, end_col); amax is the whole tensor's."""
    blocks = tl.cdiv(cols, 16)
    tiles = tl.reshape(value, [R // HEIGHT, HEIGHT, C // 16, 16])
    code, factor = _scale(tl.max(tl.max(magnitude(tiles), 3), 1), tl.load(amax))
    down = first_row // HEIGHT + tl.arange(0, R // HEIGHT)[:, None]
    block = first_col // 16 + tl.arange(0, C // 16)[None, :]
    mask = (down < tl.cdiv(end_row, HEIGHT)) & (block < tl.cdiv(end_col, 16))
    tl.store(scale + down.to(tl.int64) * blocks + block, code.to(tl.uint8), mask)
    row = first_row.to(tl.int64) + tl.arange(0, R)[:, None]
    col = first_col + tl.arange(0, C)[None, :]
    value = tl.reshape(tiles * factor[:, None, :, None], [R, C])
    q = _e2m1(value, seed, row * (blocks * 16) + col)
    low, high = tl.split(tl.reshape(q, [R, C // 2, 2]))
    byte = first_col // 2 + tl.arange(0, C // 2)[None, :]
    inside = (row < end_row) & (byte < tl.cdiv(end_col, 16) * 8)
    tl.store(data + row * (blocks * 8) + byte, low | (high << 4), inside)


@triton.jit
def _store_copies(
    value, amax, turned_amax, row_data, row_scale, row_amax, row_seed,
    col_data, col_scale, col_amax, col_seed, first_row, first_col, rows, end_col, width,
    HADAMARD: tl.constexpr, HEIGHT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile's amax, that of its columns' transform, and its copies, where there is a place."""
    if amax is not None:
        store_amax(value, amax)
    if row_data is not None:
        _store(
            value, row_data, row_scale, row_amax, row_seed, first_row, first_col, rows, end_col,
            width, HEIGHT, R, C,
        )  # fmt: skip
    if turned_amax is not None or col_data is not None:
        value = tl.trans(value)
        if HADAMARD:
            value = _hadamard(value, C, R)
        if turned_amax is not None:
            store_amax(value, turned_amax)
        if col_data is not None:
            _store(
                value, col_data, col_scale, col_amax, col_seed, first_col, first_row, end_col,
                rows, rows, HEIGHT, C, R,
            )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "x_stride"])
def nvfp4_kernel(
    x, bias, weight, mean, rstd, amax, turned_amax, row_data, row_scale, row_amax, row_seed,
    col_data, col_scale, col_amax, col_seed, rows, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, SOURCE: tl.constexpr, FUNCTION: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    ZERO_CENTERED: tl.constexpr, HADAMARD: tl.constexpr, HEIGHT: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile of a source: its amaxes, or its copies once the whole tensor's are known."""
    across: tl.constexpr = (WIDTH + C - 1) // C
    tile = tl.program_id(0)
    first_row, first_col = (tile // across) * R, (tile % across) * C
    value = _source(
        x, bias, weight, mean, rstd, first_row + tl.arange(0, R)[:, None],
        first_col + tl.arange(0, C)[None, :], rows, x_stride, UNIT, WIDTH, SOURCE, FUNCTION, GATED,
        ALPHA, LIMIT, OFFSET, ZERO_CENTERED,
    )  # fmt: skip
    if amax is not None:
        amax += tile
    if turned_amax is not None:
        turned_amax += tile
    _store_copies(
        value, amax, turned_amax, row_data, row_scale, row_amax, row_seed, col_data, col_scale,
        col_amax, col_seed, first_row, first_col, rows, WIDTH, WIDTH, HADAMARD, HEIGHT, R, C,
    )  # fmt: skip


@triton.jit
def _store_output(
    dy, x, amax, turned_amax, row_data, row_scale, row_amax, row_seed,
    col_data, col_scale, col_amax, col_seed, sums, first_row, first_col, rows, dy_stride, x_stride,
    tile, OUTPUT: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, FUNCTION: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    HADAMARD: tl.constexpr, HEIGHT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile of OUTPUT "y", "da" or "db": its column sums, its amaxes or its copies."""
    y, da, db = gradients(
        dy, x, first_row, first_col, rows, dy_stride, x_stride, UNIT, WIDTH, FUNCTION, GATED,
        ALPHA, LIMIT, OFFSET, R, C,
    )  # fmt: skip
    value = y if OUTPUT == "y" else da if OUTPUT == "da" else db
    width: tl.constexpr = WIDTH * 2 if GATED and OUTPUT != "y" else WIDTH
    offset: tl.constexpr = WIDTH if OUTPUT == "db" else 0
    if sums is not None:
        cols = first_col + tl.arange(0, C)
        tl.store(sums + offset + cols, tl.sum(value, 0), cols < WIDTH)
    if amax is not None:
        amax += tile
    if turned_amax is not None:
        turned_amax += tile
    _store_copies(
        value.to(x.dtype.element_ty).to(tl.float32), amax, turned_amax, row_data, row_scale,
        row_amax, row_seed, col_data, col_scale, col_amax, col_seed, first_row, first_col + offset,
        rows, WIDTH + offset, width, HADAMARD, HEIGHT, R, C,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "dy_stride", "x_stride"])
def nvfp4_backward_kernel(
    dy, x, dx_amax, dx_turned_amax, dx_row, dx_row_scale, dx_row_amax, dx_row_seed,
    dx_col, dx_col_scale, dx_col_amax, dx_col_seed, y_amax, y_turned_amax, y_row, y_row_scale,
    y_row_amax, y_row_seed, y_col, y_col_scale, y_col_amax, y_col_seed, sums,
    rows, dy_stride, x_stride, UNIT: tl.constexpr, WIDTH: tl.constexpr, FUNCTION: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    HADAMARD: tl.constexpr, HEIGHT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """One tile of dx (for a gated kind one of each half) and of y, the activation again.

    Each is made anew from dy and x, which the cache holds: to keep all three would spill.
    """
    across: tl.constexpr = (WIDTH + C - 1) // C
    tile = tl.program_id(0)
    down, first_row, first_col = tile // across, (tile // across) * R, (tile % across) * C
    if sums is not None:
        sums += down.to(tl.int64) * (WIDTH * 2 if GATED else WIDTH)
    _store_output(
        dy, x, dx_amax, dx_turned_amax, dx_row, dx_row_scale, dx_row_amax, dx_row_seed, dx_col,
        dx_col_scale, dx_col_amax, dx_col_seed, sums, first_row, first_col, rows, dy_stride,
        x_stride, tile, "da", UNIT, WIDTH, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, HADAMARD, HEIGHT,
        R, C,
    )  # fmt: skip
    if GATED:
        _store_output(
            dy, x, dx_amax, dx_turned_amax, dx_row, dx_row_scale, dx_row_amax, dx_row_seed, dx_col,
            dx_col_scale, dx_col_amax, dx_col_seed, sums, first_row, first_col, rows, dy_stride,
            x_stride, tile + tl.num_programs(0), "db", UNIT, WIDTH, FUNCTION, GATED, ALPHA, LIMIT,
            OFFSET, HADAMARD, HEIGHT, R, C,
        )  # fmt: skip
    if y_amax is not None or y_turned_amax is not None or y_row is not None or y_col is not None:
        _store_output(
            dy, x, y_amax, y_turned_amax, y_row, y_row_scale, y_row_amax, y_row_seed, y_col,
            y_col_scale, y_col_amax, y_col_seed, None, first_row, first_col, rows, dy_stride,
            x_stride, tile, "y", UNIT, WIDTH, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, HADAMARD,
            HEIGHT, R, C,
        )  # fmt: skip
