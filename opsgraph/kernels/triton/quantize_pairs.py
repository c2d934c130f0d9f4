"""Tiles of bf16 values, two neighbours of a row to a word, and their quantized copies.

That halves what a tile takes of the registers, and amaxes and powers of two take an instruction for
two values. A tile `[R, C]` is one with FOURS (`quantize_kernels.rows_of`), of `[R, C // 2]` words;
its quarters are the words of the first, second, third and fourth of neighbouring rows. The copies
have the bits that `quantize_kernels` gives them.
"""

import triton
import triton.language as tl

from .ptx import PTX
from .quantize_kernels import _TURN, encode, scaled, store_data

_PAIR = tl.constexpr("cvt.rn.bf16x2.f32 $0, $2, $1;")
_LARGER = tl.constexpr("max.NaN.bf16x2 $0, $1, $2;")
_FINITE = tl.constexpr("{.reg .b32 zero; mov.b32 zero, 0; fma.rn.bf16x2 $0, $1, zero, $1;}")
_LOW, _HIGH = "shl.b32 %s, %s, 16; ", "and.b32 %s, %s, 0xffff0000; "
_CONVERT = (
    "cvt.rn.satfinite.KINDx2.f32 low, b, a; cvt.rn.satfinite.KINDx2.f32 high, d, c; "
    "mov.b32 $%d, {low, high}; "
)
_REGISTERS = "{.reg .b32 p, q, r, s, a, b, c, d; .reg .b16 low, high; "
_SPREAD = _LOW % ("a", "p") + _HIGH % ("b", "p") + _LOW % ("c", "q") + _HIGH % ("d", "q")
_TENSOR = (
    _REGISTERS + "mov.b32 p, $1; mov.b32 q, $2; " + _SPREAD
    + "".join(f"mul.f32 {x}, {x}, $3; " for x in "abcd") + _CONVERT % 0 + "}"
)  # fmt: skip
"""Two words and a factor, fp32, to four codes."""
_ROW = (
    _REGISTERS + "mul.rn.bf16x2 p, $1, $3; mul.rn.bf16x2 q, $2, $3; " + _SPREAD + _CONVERT % 0 + "}"
)
"""Two words and a pair of factors to four codes."""
_COLUMNS = (
    _REGISTERS + "".join(f"mul.rn.bf16x2 {x}, ${i}, $6; " for i, x in enumerate("pqrs", 2))
    + "".join(_LOW % both for both in zip("abcd", "pqrs", strict=True)) + _CONVERT % 0
    + "".join(_HIGH % both for both in zip("abcd", "pqrs", strict=True)) + _CONVERT % 1 + "}"
)  # fmt: skip
"""Four words, one below the other, and a pair of factors to the four codes of either column."""


def _of_kinds(text: str) -> tuple[tl.constexpr, tl.constexpr]:
    """For E4M3 and for E5M2."""
    return tl.constexpr(text.replace("KIND", "e4m3")), tl.constexpr(text.replace("KIND", "e5m2"))


_TENSOR_E4M3, _TENSOR_E5M2 = _of_kinds(_TENSOR)
_ROW_E4M3, _ROW_E5M2 = _of_kinds(_ROW)
_COLUMNS_E4M3, _COLUMNS_E5M2 = _of_kinds(_COLUMNS)


@triton.jit
def _pair(low, high):
    """Two values of bf16, given by their bits as fp32's, in a word."""
    return ((low >> 16) & 0xFFFF) | (high & -65536)


@triton.jit
def _low(pair):
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(pair):
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _paired(value, R: tl.constexpr, C: tl.constexpr):
    """fp32 `[R, C]`, rounded, as words `[R, C // 2]`."""
    low, high = tl.split(tl.reshape(value, [R, C // 2, 2]))
    if PTX:
        return tl.inline_asm_elementwise(_PAIR, "=r,f,f", [low, high], tl.int32, True, 1)
    else:  # by way of fp32, as others here round: Triton's interpreter has its own subnormals
        low = low.to(tl.bfloat16).to(tl.float32).to(tl.int32, bitcast=True)
        high = high.to(tl.bfloat16).to(tl.float32).to(tl.int32, bitcast=True)
        return _pair(low, high)


@triton.jit
def quarters(value, R: tl.constexpr, C: tl.constexpr):
    """fp32 `[R, C]` with FOURS, rounded: its four quarters, `[R // 4, C // 2]` words."""
    pairs = _paired(value, R, C)
    even, odd = tl.split(tl.permute(tl.reshape(pairs, [2, 2, R // 4, C // 2]), 2, 3, 0, 1))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def larger(one, other):
    """Of magnitudes, in pairs; a NaN is larger than all."""
    if PTX:
        return tl.inline_asm_elementwise(_LARGER, "=r,r,r", [one, other], tl.int32, True, 1)
    else:
        low = tl.maximum(one & 0xFFFF, other & 0xFFFF)
        return low | (tl.maximum(one >> 16, other >> 16) << 16)


@triton.jit
def largest_of(tile):
    """The larger magnitudes of quarters, in pairs."""
    one = larger(tile[0] & 0x7FFF7FFF, tile[1] & 0x7FFF7FFF)
    return larger(one, larger(tile[2] & 0x7FFF7FFF, tile[3] & 0x7FFF7FFF))


@triton.jit
def _largest_along(pairs, AXIS: tl.constexpr):
    """The larger of magnitudes in each half."""
    if PTX:
        return tl.reduce(pairs, AXIS, larger)
    else:
        return tl.max(pairs & 0xFFFF, AXIS) | (tl.max(pairs >> 16, AXIS) << 16)


@triton.jit
def _both(pair):
    """The larger of a pair, twice."""
    return larger(pair, ((pair >> 16) & 0xFFFF) | (pair << 16))


@triton.jit
def amax_bits(pairs):
    """The bits of the largest of magnitudes, as one fp32's, int32 `[]`."""
    return tl.max(tl.ravel(_both(pairs)), 0) & -65536


@triton.jit
def _finite(pairs):
    """Infinity becomes NaN: a conversion would saturate it."""
    if PTX:
        return tl.inline_asm_elementwise(_FINITE, "=r,r", [pairs], tl.int32, True, 1)
    else:
        return pairs


@triton.jit
def _byte(value, multiplier, E5M2: tl.constexpr):
    return encode(scaled(value, multiplier), E5M2, False).to(tl.int32)


@triton.jit
def _word(a, b, c, d, multiplier, E5M2: tl.constexpr):
    """Four values, fp32, to four codes."""
    word = _byte(a, multiplier, E5M2) | (_byte(b, multiplier, E5M2) << 8)
    return word | (_byte(c, multiplier, E5M2) << 16) | (_byte(d, multiplier, E5M2) << 24)


@triton.jit
def _codes(pairs, multiplier, R: tl.constexpr, C: tl.constexpr, E5M2: tl.constexpr):
    """Words of four codes, `[R // 4, C // 4]`, of a quarter; multiplier: fp32 `[]`."""
    one, other = tl.split(tl.reshape(_finite(pairs), [R // 4, C // 4, 2]))
    factor = tl.broadcast_to(multiplier, one.shape)
    if PTX:
        CODES: tl.constexpr = _TENSOR_E5M2 if E5M2 else _TENSOR_E4M3
        return tl.inline_asm_elementwise(CODES, "=r,r,r,f", [one, other, factor], tl.int32, True, 1)
    else:
        return _word(_low(one), _high(one), _low(other), _high(other), factor, E5M2)


@triton.jit
def _store_rows(
    a, b, c, d, first_row, first_col, end_row, end_col, width, data, R: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Words of codes of quarters; rows, columns and the width in fours."""
    words = data.to(tl.pointer_type(tl.int32), bitcast=True)
    row = first_row + tl.arange(0, R // 4)[:, None] * 4
    cols = first_col // 4 + tl.arange(0, C // 4)[None, :]
    words += row.to(tl.int64) * (width // 4) + cols
    there = (row < end_row) & (cols < end_col // 4)
    tl.store(words, a, there)
    tl.store(words + width // 4, b, there)
    tl.store(words + width // 4 * 2, c, there)
    tl.store(words + width // 4 * 3, d, there)


@triton.jit
def _turned(a, b, c, d):
    """Four words of codes of a row each to four of a column each."""
    if PTX:
        return tl.inline_asm_elementwise(
            _TURN, "=&r,=&r,=&r,=&r,r,r,r,r", [a, b, c, d],
            (tl.int32, tl.int32, tl.int32, tl.int32), True, 1,
        )  # fmt: skip
    else:
        return (
            _taken(a, b, c, d, 0), _taken(a, b, c, d, 8), _taken(a, b, c, d, 16),
            _taken(a, b, c, d, 24),
        )  # fmt: skip


@triton.jit
def _taken(a, b, c, d, SHIFT: tl.constexpr):
    low = ((a >> SHIFT) & 0xFF) | (((b >> SHIFT) & 0xFF) << 8)
    return low | (((c >> SHIFT) & 0xFF) << 16) | (((d >> SHIFT) & 0xFF) << 24)


@triton.jit
def store_pairs(
    tile, multiplier, first_row, first_col, rows, end_col, width, row_data, col_data,
    R: tl.constexpr, C: tl.constexpr, E5M2: tl.constexpr,
):  # fmt: skip
    """The copies of a tile with one scale, given by its quarters."""
    if row_data is not None or col_data is not None:
        a = _codes(tile[0], multiplier, R, C, E5M2)
        b = _codes(tile[1], multiplier, R, C, E5M2)
        c = _codes(tile[2], multiplier, R, C, E5M2)
        d = _codes(tile[3], multiplier, R, C, E5M2)
        if row_data is not None:
            _store_rows(a, b, c, d, first_row, first_col, rows, end_col, width, row_data, R, C)
        if col_data is not None:
            first, second, third, fourth = _turned(a, b, c, d)
            codes = tl.join(tl.join(first, third), tl.join(second, fourth))
            words = col_data.to(tl.pointer_type(tl.int32), bitcast=True)
            store_data(
                tl.trans(tl.reshape(codes, [R // 4, C])), first_col, first_row // 4, end_col,
                rows // 4, rows // 4, words, C, R // 4,
            )  # fmt: skip


@triton.jit
def _powers(bits, E5M2: tl.constexpr):
    """`quantize_kernels.scale_of` of pairs of amaxes, in pairs: 1.75 * 2^n / amax, a power of two.

    In each half: 31 carries into bf16's exponent what lies above 1.75.
    """
    TOP: tl.constexpr = -2038397312 if E5M2 else -2097118464  # 269 and 262 as exponents
    LEAST: tl.constexpr = 0x07800780 if E5M2 else 0x04000400  # that of which 2^127 comes
    exponent = larger((bits + 0x001F001F) & -8323200, LEAST)
    special = ((bits + 0x00800080) | (-2147450880 - bits)) & -2147450880  # 0 or not finite
    mask = ((special >> 15) & 0x00010001) * 0xFFFF
    return ((TOP - exponent) & ~mask) | (mask & 0x3F803F80)


@triton.jit
def _inverses(powers):
    """1 / power of pairs; of 2^127 it is subnormal."""
    inverse = 0x7F007F00 - powers
    return inverse | ((((-2147450880 - inverse) & -2147450880) >> 9) & 0x00400040)


@triton.jit
def _row_powers(pairs, E5M2: tl.constexpr):
    """Those of rows one block wide, each the same in both halves."""
    return _powers(_both(_largest_along(pairs & 0x7FFF7FFF, 1)), E5M2)


@triton.jit
def _row_codes(pairs, powers, R: tl.constexpr, BLOCK: tl.constexpr, E5M2: tl.constexpr):
    """Words of four codes of R rows one block wide, `[R, BLOCK // 4]`; powers: `[R, 1]`."""
    one, other = tl.split(tl.reshape(_finite(pairs), [R, BLOCK // 4, 2]))
    factor = tl.broadcast_to(powers, one.shape)
    if PTX:
        CODES: tl.constexpr = _ROW_E5M2 if E5M2 else _ROW_E4M3
        return tl.inline_asm_elementwise(CODES, "=r,r,r,r", [one, other, factor], tl.int32, True, 1)
    else:
        return _word(_low(one), _high(one), _low(other), _high(other), _low(factor), E5M2)


@triton.jit
def _column_codes(tile, powers, E5M2: tl.constexpr):
    """Words of the four codes of the first and of the second columns of a tile's pairs.

    powers: `[1, C // 2]`, in pairs.
    """
    a, b, c, d = _finite(tile[0]), _finite(tile[1]), _finite(tile[2]), _finite(tile[3])
    factor = tl.broadcast_to(powers, a.shape)
    if PTX:
        CODES: tl.constexpr = _COLUMNS_E5M2 if E5M2 else _COLUMNS_E4M3
        return tl.inline_asm_elementwise(
            CODES, "=&r,=&r,r,r,r,r,r", [a, b, c, d, factor], (tl.int32, tl.int32), True, 1
        )
    else:
        low = _word(_low(a), _low(b), _low(c), _low(d), _low(factor), E5M2)
        return low, _word(_high(a), _high(b), _high(c), _high(d), _high(factor), E5M2)


@triton.jit
def store_paired_rows(
    value, bits, first_row, first_col, rows, width, data, scale, inverse, R: tl.constexpr,
    BLOCK: tl.constexpr, E5M2: tl.constexpr,
):  # fmt: skip
    """The row copy "blocks" of fp32 `[R, BLOCK]`; returns the larger of bits and its magnitudes.

    bits: `[R, BLOCK // 2]`, in pairs. Scales are powers of two, as in `store_pair_blocks`.
    """
    pairs = _paired(value, R, BLOCK)
    if data is not None:
        powers = _row_powers(pairs, E5M2)[:, None]
        row, block = first_row + tl.arange(0, R)[:, None], first_col // BLOCK
        there = row < rows
        at = row.to(tl.int64) * (width // BLOCK) + block
        tl.store(scale + at, _low(powers), there)
        at = block.to(tl.int64) * (tl.cdiv(rows, 4) * 4) + row
        tl.store(inverse + at, _low(_inverses(powers)), there)
        codes = _row_codes(pairs, powers, R, BLOCK, E5M2)
        words = data.to(tl.pointer_type(tl.int32), bitcast=True)
        end = width // 4
        store_data(codes, first_row, first_col // 4, rows, end, end, words, R, BLOCK // 4)
    return larger(bits, pairs & 0x7FFF7FFF)


@triton.jit
def magnitudes_of(pairs, R: tl.constexpr, C: tl.constexpr):
    """Magnitudes in pairs, `[R, C // 2]`, as fp32's bits `[R, C]`."""
    return tl.reshape(tl.join(pairs << 16, pairs & -65536), [R, C])


@triton.jit
def store_pair_blocks(
    tile, down, first_col, rows, width, row_data, row_scale, row_inverse, col_data, col_scale,
    col_inverse, BLOCK: tl.constexpr, E5M2: tl.constexpr,
):  # fmt: skip
    """The copies "blocks" of BLOCK x BLOCK, given by its quarters, with scales of powers of two.

    bf16 times a power of two is exact, or so small that FP8 has 0 for it: pairs are multiplied.
    """
    first_row = down * BLOCK
    if col_data is not None:
        columns = _powers(_largest_along(largest_of(tile), 0), E5M2)
    if row_data is not None:
        first, second = _row_powers(tile[0], E5M2), _row_powers(tile[1], E5M2)
        third, fourth = _row_powers(tile[2], E5M2), _row_powers(tile[3], E5M2)
        # All at once: a store of its own for each would take a barrier each.
        powers = tl.join(tl.join(first, third), tl.join(second, fourth))
        powers = tl.reshape(powers, [BLOCK])
        row = first_row + tl.arange(0, BLOCK)
        at = row.to(tl.int64) * (width // BLOCK) + first_col // BLOCK
        tl.store(row_scale + at, _low(powers), row < rows)
        at = (first_col // BLOCK).to(tl.int64) * (tl.cdiv(rows, 4) * 4) + row
        tl.store(row_inverse + at, _low(_inverses(powers)), row < rows)
    if row_data is not None:
        _store_rows(
            _row_codes(tile[0], first[:, None], BLOCK // 4, BLOCK, E5M2),
            _row_codes(tile[1], second[:, None], BLOCK // 4, BLOCK, E5M2),
            _row_codes(tile[2], third[:, None], BLOCK // 4, BLOCK, E5M2),
            _row_codes(tile[3], fourth[:, None], BLOCK // 4, BLOCK, E5M2),
            first_row, first_col, rows, width, width, row_data, BLOCK, BLOCK,
        )  # fmt: skip
    if col_data is not None:
        inverses = _inverses(columns)
        cols = first_col + tl.arange(0, BLOCK)
        scales = tl.reshape(tl.join(_low(columns), _high(columns)), [BLOCK])
        tl.store(col_scale + cols.to(tl.int64) * tl.cdiv(rows, BLOCK) + down, scales)
        scales = tl.reshape(tl.join(_low(inverses), _high(inverses)), [BLOCK])
        tl.store(col_inverse + down.to(tl.int64) * width + cols, scales)
        _store_pair_columns(
            tile, columns[None, :], first_row, first_col, rows, width, col_data, BLOCK, BLOCK, E5M2
        )


@triton.jit
def _store_pair_columns(
    tile, powers, first_row, first_col, rows, end_col, data, R: tl.constexpr, C: tl.constexpr,
    E5M2: tl.constexpr,
):  # fmt: skip
    low, high = _column_codes(tile, powers, E5M2)
    codes = tl.reshape(tl.join(low, high), [R // 4, C])
    words = data.to(tl.pointer_type(tl.int32), bitcast=True)
    store_data(
        tl.trans(codes), first_col, first_row // 4, end_col, rows // 4, rows // 4, words, C, R // 4
    )


@triton.jit
def powers_of(multiplier, C: tl.constexpr):
    """Powers of two `[1, C]`, fp32, in pairs; what else there is stands for nothing to store."""
    bits = multiplier.to(tl.int32, bitcast=True)
    if multiplier.shape[1] == C:
        low, high = tl.split(tl.reshape(bits, [1, C // 2, 2]))
        return _pair(low, high)
    else:
        return bits


@triton.jit
def store_known_columns(
    tile, powers, first_row, first_col, rows, end_col, data, R: tl.constexpr, C: tl.constexpr,
    E5M2: tl.constexpr,
):  # fmt: skip
    """The column copy by powers of two, in pairs, that are known."""
    if data is not None:
        _store_pair_columns(tile, powers, first_row, first_col, rows, end_col, data, R, C, E5M2)
