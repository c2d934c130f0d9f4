"""Kernels that make a tensor tile by tile and write its NVFP4 copies.

The bits are those of `opsgraph.kernels.reference.nvfp4`, which says the formulas. The column copy
is the row copy of the transposed tile, with a random Hadamard transform before it if asked.
"""

import triton
import triton.language as tl

from .dropout import random_bits
from .quantize_kernels import FP32_MAX, INFINITY_BITS, encode, magnitude, store_amax
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
    product = bits.to(tl.float32, bitcast=True) * multiplier
    code = encode(tl.div_rn(product, tl.full(product.shape, 6.0, tl.float32)), False, False)
    code = code.to(tl.int32) & 0x7F
    normal = (((code >> 3) + 120) << 23 | (code & 7) << 20).to(tl.float32, bitcast=True)
    d = tl.where(code < 8, code.to(tl.float32) * 0.001953125, normal)
    factor = tl.minimum(tl.div_rn(tl.zeros_like(d) + multiplier, d), FP32_MAX)
    return code, tl.where(code == 0x7F, float("nan"), factor)


@triton.jit
def _store(
    value, amax, seed, data, scale, first_row, first_col, rows, cols,
    HEIGHT: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile of the row copy of `[rows, cols]`."""
    blocks = tl.cdiv(cols, 16)
    tiles = tl.reshape(value, [R // HEIGHT, HEIGHT, C // 16, 16])
    code, factor = _scale(tl.max(tl.max(magnitude(tiles), 3), 1), tl.load(amax))
    down = first_row // HEIGHT + tl.arange(0, R // HEIGHT)[:, None]
    block = first_col // 16 + tl.arange(0, C // 16)[None, :]
    mask = (down < tl.cdiv(rows, HEIGHT)) & (block < blocks)
    tl.store(scale + down.to(tl.int64) * blocks + block, code.to(tl.uint8), mask)
    row = first_row.to(tl.int64) + tl.arange(0, R)[:, None]
    col = first_col + tl.arange(0, C)[None, :]
    value = tl.reshape(tiles * factor[:, None, :, None], [R, C])
    q = _e2m1(value, seed, row * (blocks * 16) + col)
    low, high = tl.split(tl.reshape(q, [R, C // 2, 2]))
    byte = first_col // 2 + tl.arange(0, C // 2)[None, :]
    inside = (row < rows) & (byte < blocks * 8)
    tl.store(data + row * (blocks * 8) + byte, low | (high << 4), inside)


@triton.jit(do_not_specialize=["rows", "x_stride"])
def nvfp4_amax_kernel(
    x, bias, weight, mean, rstd, amax, turned_amax, rows, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, SOURCE: tl.constexpr, FUNCTION: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    ZERO_CENTERED: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile's amax, and that of its columns' Hadamard transform."""
    across: tl.constexpr = (WIDTH + C - 1) // C
    tile = tl.program_id(0)
    row = (tile // across) * R + tl.arange(0, R)[:, None]
    col = (tile % across) * C + tl.arange(0, C)[None, :]
    value = _source(
        x, bias, weight, mean, rstd, row, col, rows, x_stride, UNIT, WIDTH, SOURCE, FUNCTION,
        GATED, ALPHA, LIMIT, OFFSET, ZERO_CENTERED,
    )  # fmt: skip
    if amax is not None:
        store_amax(value, amax + tile)
    if turned_amax is not None:
        store_amax(_hadamard(tl.trans(value), C, R), turned_amax + tile)


@triton.jit(do_not_specialize=["rows", "x_stride"])
def nvfp4_kernel(
    x, bias, weight, mean, rstd, row_data, row_scale, row_amax, row_seed,
    col_data, col_scale, col_amax, col_seed, rows, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, SOURCE: tl.constexpr, FUNCTION: tl.constexpr,
    GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, OFFSET: tl.constexpr,
    ZERO_CENTERED: tl.constexpr, HADAMARD: tl.constexpr, HEIGHT: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile's copies, with the amaxes of the whole tensor that each is made of."""
    across: tl.constexpr = (WIDTH + C - 1) // C
    first_row, first_col = (tl.program_id(0) // across) * R, (tl.program_id(0) % across) * C
    value = _source(
        x, bias, weight, mean, rstd, first_row + tl.arange(0, R)[:, None],
        first_col + tl.arange(0, C)[None, :], rows, x_stride, UNIT, WIDTH, SOURCE, FUNCTION, GATED,
        ALPHA, LIMIT, OFFSET, ZERO_CENTERED,
    )  # fmt: skip
    if row_data is not None:
        _store(
            value, row_amax, row_seed, row_data, row_scale, first_row, first_col, rows, WIDTH,
            HEIGHT, R, C,
        )  # fmt: skip
    if col_data is not None:
        value = tl.trans(value)
        if HADAMARD:
            value = _hadamard(value, C, R)
        _store(
            value, col_amax, col_seed, col_data, col_scale, first_col, first_row, WIDTH, rows,
            HEIGHT, C, R,
        )  # fmt: skip
