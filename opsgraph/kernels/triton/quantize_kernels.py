"""What every quantizing kernel shares: FP8 bytes, scales, and storing a tile's quantized copy.

The bits are those of `opsgraph.kernels.reference.quantize`, which says the formulas. Data is
written as bytes, so that the kernels also run where Triton lacks an FP8 type (sm_80).

A tile is fp32 `[R, C]`, zero outside the tensor. A copy's data has `width` columns; the tile, at
(first_row, first_col), fills it up to (end_row, end_col). The column copy is the row copy of the
transposed tile, with the indices exchanged.

SCALING is "tensor" (the scale is at `given`, or the amax where `scale` is to be written), "rows"
(the row amaxes are at `given`), "square" (one block, the tile) or "blocks" and "mx" (1 x BLOCK).
"""

import triton
import triton.language as tl

FP32_MAX = tl.constexpr(3.4028234663852886e38)
INFINITY_BITS = tl.constexpr(0x7F800000)

_CONVERT = (
    "{.reg .b16 low, high; cvt.rn.satfinite.%s.f32 low, $2, $1; "
    "cvt.rn.satfinite.%s.f32 high, $4, $3; mov.b32 $0, {low, high};}"
)
_TURN = tl.constexpr(
    "{.reg .b32 a, b, c, d; prmt.b32 a, $4, $5, 0x5140; prmt.b32 b, $4, $5, 0x7362; "
    "prmt.b32 c, $6, $7, 0x5140; prmt.b32 d, $6, $7, 0x7362; prmt.b32 $0, a, c, 0x5410; "
    "prmt.b32 $1, a, c, 0x7632; prmt.b32 $2, b, d, 0x5410; prmt.b32 $3, b, d, 0x7632;}"
)
"""Four words of a row each to four of a column each."""
_TO_E4M3, _TO_E5M2 = (tl.constexpr(_CONVERT % (kind, kind)) for kind in ("e4m3x2", "e5m2x2"))


@triton.jit
def magnitude(value):
    """The bits of |value| as int32, which order like the magnitudes, a NaN's above infinity's."""
    return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def largest(bits):
    """The largest of a tile's magnitudes."""
    return tl.max(tl.ravel(bits), 0)


@triton.jit
def store_amax(value, amax):
    """The tile's amax, a NaN if it holds one."""
    tl.store(amax, largest(magnitude(value)).to(tl.float32, bitcast=True))


@triton.jit
def encode(value, E5M2: tl.constexpr, NATIVE: tl.constexpr):
    """fp32 to the bytes of FP8: saturated, rounded to nearest even, 0x7F for a NaN.

    NATIVE: by the conversion of sm_89 and later, four values to a word. Triton's own makes pairs,
    and where both the row and the column copy are stored, ptxas 12.8 puts a pair into a word of one
    and its stack pointer into the other.

    Triton's interpreter rounds differently, so there and on older chips the bits are put together
    here: adding a number whose unit in the last place is FP8's smallest step rounds subnormals, and
    the rest is rounded as an integer.
    """
    if NATIVE:
        CONVERT: tl.constexpr = _TO_E5M2 if E5M2 else _TO_E4M3
        return tl.inline_asm_elementwise(CONVERT, "=r,f,f,f,f", [value], tl.uint8, True, 4)
    else:
        LARGEST: tl.constexpr = 57344.0 if E5M2 else 448.0
        value = tl.clamp(value, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        MANTISSA: tl.constexpr = 2 if E5M2 else 3
        BIAS: tl.constexpr = 15 if E5M2 else 7
        DROPPED: tl.constexpr = 23 - MANTISSA
        STEP_BITS: tl.constexpr = (151 - BIAS - MANTISSA) << 23
        bits = magnitude(value)
        step = tl.full(bits.shape, STEP_BITS, tl.int32).to(tl.float32, bitcast=True)
        tiny = (tl.abs(value) + step).to(tl.int32, bitcast=True) - STEP_BITS
        rounded = bits + ((1 << (DROPPED - 1)) - 1) + ((bits >> DROPPED) & 1)
        normal = (rounded >> DROPPED) - ((127 - BIAS) << MANTISSA)
        code = tl.where(bits < ((128 - BIAS) << 23), tiny, normal)
        code |= (value.to(tl.int32, bitcast=True) >> 24) & 0x80
        return tl.where(bits > INFINITY_BITS, 0x7F, code).to(tl.uint8)


@triton.jit
def scaled(value, multiplier):
    """The product; NaN, where an infinite one would be saturated, for a value that is infinite."""
    return tl.fma(value, tl.broadcast_to(multiplier, value.shape), value * 0.0)


@triton.jit
def scale_of(bits, E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The multiplier of amaxes, given by their bits."""
    if EPS > 0:
        least = tl.full(bits.shape, EPS, tl.float32).to(tl.int32, bitcast=True)
        bits = tl.maximum(bits, least)
    if POWER_OF_TWO:  # 1.75 * 2^n / amax, down to a power of two
        exponent = (
            (269 if E5M2 else 262) - (bits >> 23) - ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
        )
        scale = (tl.minimum(exponent, 254) << 23).to(tl.float32, bitcast=True)
    else:
        top = tl.full(bits.shape, 57344.0 if E5M2 else 448.0, tl.float32)
        scale = tl.minimum(tl.div_rn(top, bits.to(tl.float32, bitcast=True)), FP32_MAX)
    return tl.where((bits > 0) & (bits < INFINITY_BITS), scale, 1.0)


@triton.jit
def e8m0_of(bits, E5M2: tl.constexpr):
    """The int32 E8M0 exponents of amaxes, given by their bits."""
    exponent = (bits >> 23) - (15 if E5M2 else 8) + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    exponent = tl.maximum(exponent, 0)
    special = tl.where(bits > INFINITY_BITS, 255, 254)
    return tl.where(bits < INFINITY_BITS, exponent, special)


@triton.jit
def e8m0_multiplier(exponent):
    """`2^(127 - exponent)`: what MXFP8 multiplies with; subnormal for 254 and NaN for 255."""
    bits = tl.where(exponent == 254, 1 << 22, (254 - exponent) << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def rows_of(first_row, R: tl.constexpr, FOURS: tl.constexpr):
    """The tensor's rows of a tile `[R]`: in order, or with FOURS four neighbours R // 4 apart.

    FOURS is how many columns of four such rows a thread has, or 0: it can then put the bytes of a
    column together to words, which go through shared memory at a quarter of the bytes' cost.
    """
    at = tl.arange(0, R)
    if FOURS:
        at = at % (R // 4) * 4 + at // (R // 4)
    return first_row + at


@triton.jit
def store_data(
    codes, first_row, first_col, end_row, end_col, width, data, R: tl.constexpr, C: tl.constexpr,
    FOURS: tl.constexpr = 0,
):  # fmt: skip
    """The bytes of a tile into data `[.., width]`."""
    row = rows_of(first_row, R, FOURS)[:, None]
    cols = first_col + tl.arange(0, C)[None, :]
    at = row.to(tl.int64) * width + cols
    if FOURS:
        at = tl.max_contiguous(at, [1, FOURS])
    tl.store(data + at, codes, (row < end_row) & (cols < end_col))


@triton.jit
def _words(codes, R: tl.constexpr, C: tl.constexpr, NATIVE: tl.constexpr):
    """Of the bytes of a tile with FOURS: those of four rows as a word, `[R // 4, C]`."""
    fours = tl.permute(tl.reshape(codes, [2, 2, R // 4, C]), 2, 3, 0, 1)
    even, odd = tl.split(fours)
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    if NATIVE:
        return tl.inline_asm_elementwise(
            _TURN, "=&r,=&r,=&r,=&r,r,r,r,r", [first, second, third, fourth], tl.int32, True, 4
        )
    else:
        word = first.to(tl.int32) | (second.to(tl.int32) << 8)
        return word | (third.to(tl.int32) << 16) | (fourth.to(tl.int32) << 24)


@triton.jit
def _store_columns(
    codes, first_row, first_col, rows, end_col, data, R: tl.constexpr, C: tl.constexpr,
    FOURS: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """The bytes of a tile, transposed, into data `[.., rows]`, as words where it is with FOURS."""
    if FOURS:
        words = data.to(tl.pointer_type(tl.int32), bitcast=True)
        codes = _words(codes, R, C, NATIVE)
        store_data(
            tl.trans(codes), first_col, first_row // 4, end_col, rows // 4, rows // 4, words, C,
            R // 4,
        )  # fmt: skip
    else:
        store_data(tl.trans(codes), first_col, first_row, end_col, rows, rows, data, C, R)


@triton.jit
def block_scales(
    bits, SCALING: tl.constexpr, E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr
):
    """Of blocks' amaxes: the multipliers, and the scales as they are stored."""
    if SCALING == "mx":
        exponent = e8m0_of(bits, E5M2)
        return e8m0_multiplier(exponent), exponent.to(tl.uint8)
    else:
        multiplier = scale_of(bits, E5M2, EPS, POWER_OF_TWO)
        return multiplier, multiplier


@triton.jit
def inverse_of(multiplier, POWER_OF_TWO: tl.constexpr = False):
    """1 / multiplier, rounded to nearest; POWER_OF_TWO: of `scale_of`, with 2^127 the largest."""
    if POWER_OF_TWO:
        bits = 0x7F000000 - multiplier.to(tl.int32, bitcast=True)
        return tl.where(bits == 0, 0x00400000, bits).to(tl.float32, bitcast=True)
    else:
        return tl.div_rn(tl.full(multiplier.shape, 1.0, tl.float32), multiplier)


@triton.jit
def store_row_copy(
    value, first_row, first_col, end_row, end_col, width, data, scale, inverse, given,
    R: tl.constexpr, C: tl.constexpr, SCALING: tl.constexpr, BLOCK: tl.constexpr,
    E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Scales "rows", "blocks" and "mx", which run along the tile's rows.

    inverse: where to write those of "blocks", `formats.inverse_shape`.
    """
    row = first_row + tl.arange(0, R)
    if SCALING == "rows":
        bits = magnitude(tl.load(given + row, row < end_row, other=0.0))
        multiplier = scale_of(bits, E5M2, EPS, POWER_OF_TWO)
        # Chosen, not `&`: the interpreter of Triton 3.9 refuses a block's mask and a scalar's.
        tl.store(scale + row, multiplier, row < tl.where(first_col == 0, end_row, 0))
        codes = encode(scaled(value, multiplier[:, None]), E5M2, NATIVE)
    else:
        blocks = tl.reshape(value, [R, C // BLOCK, BLOCK])
        bits = tl.max(magnitude(blocks), 2)
        multiplier, stored = block_scales(bits, SCALING, E5M2, EPS, POWER_OF_TWO)
        block = first_col // BLOCK + tl.arange(0, C // BLOCK)[None, :]
        at = row.to(tl.int64)[:, None] * tl.cdiv(width, BLOCK) + block
        there = (row[:, None] < end_row) & (block * BLOCK < end_col)
        tl.store(scale + at, stored, there)
        if SCALING == "blocks" and inverse is not None:
            at = block.to(tl.int64) * (tl.cdiv(end_row, 4) * 4) + row[:, None]
            tl.store(inverse + at, inverse_of(multiplier, POWER_OF_TWO), there)
        codes = encode(scaled(blocks, multiplier[:, :, None]), E5M2, NATIVE)
        codes = tl.reshape(codes, [R, C])
    store_data(codes, first_row, first_col, end_row, end_col, width, data, R, C)


@triton.jit
def store_col_copy(
    value, first_row, first_col, rows, end_col, data, scale, given,
    R: tl.constexpr, C: tl.constexpr, SCALING: tl.constexpr, BLOCK: tl.constexpr,
    E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`store_row_copy` of the transpose; what is transposed is its bytes."""
    cols = first_col + tl.arange(0, C)
    if SCALING == "rows":
        bits = magnitude(tl.load(given + cols, cols < end_col, other=0.0))
        multiplier = scale_of(bits, E5M2, EPS, POWER_OF_TWO)
        tl.store(scale + cols, multiplier, cols < tl.where(first_row == 0, end_col, 0))
        codes = encode(scaled(value, multiplier[None, :]), E5M2, NATIVE)
    else:
        blocks = tl.reshape(value, [R // BLOCK, BLOCK, C])
        bits = tl.max(magnitude(blocks), 1)
        multiplier, stored = block_scales(bits, SCALING, E5M2, EPS, POWER_OF_TWO)
        block = first_row // BLOCK + tl.arange(0, R // BLOCK)[:, None]
        at = cols.to(tl.int64)[None, :] * tl.cdiv(rows, BLOCK) + block
        tl.store(scale + at, stored, (cols[None, :] < end_col) & (block * BLOCK < rows))
        codes = encode(scaled(blocks, multiplier[:, None, :]), E5M2, NATIVE)
        codes = tl.reshape(codes, [R, C])
    store_data(tl.trans(codes), first_col, first_row, end_col, rows, rows, data, C, R)


@triton.jit
def current_scale(
    given, scale, SCALING: tl.constexpr, E5M2: tl.constexpr, EPS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """The multiplier of scaling "tensor", before the tile: given, or by the amax that is given."""
    if SCALING == "tensor" and scale is not None:
        return scale_of(magnitude(tl.load(given)), E5M2, EPS, POWER_OF_TWO)
    elif SCALING == "tensor" and given is not None:
        return tl.load(given)
    else:
        return tl.full([], 1.0, tl.float32)


@triton.jit
def store_tensor_scale(multiplier, scale, inverse, SCALING: tl.constexpr):
    """The scale if it is made here, and 1 / scale: by the first program, after its tile."""
    if SCALING == "tensor" and (scale is not None or inverse is not None):
        if tl.program_id(0) == 0:
            if scale is not None:
                tl.store(scale, multiplier)
            if inverse is not None:
                tl.store(inverse, inverse_of(multiplier))


@triton.jit
def _store_square(multiplier, row, col, across, scale, inverse):
    """The scale of the block at (row, col), of `across` in a row, and 1 / scale.

    The last block's program fills its row of inverses up to fours with ones.
    """
    tl.store(scale + row * across + col, multiplier)
    four = tl.arange(0, 4)
    filled = tl.cdiv(across, 4) * 4
    value = tl.where(four == 0, inverse_of(multiplier), 1.0)
    last = tl.where(col == across - 1, filled, col + 1)
    tl.store(inverse + row * filled + col + four, value, col + four < last)


@triton.jit
def square_scale(
    bits, row, col, rows, width, row_scale, row_inverse, col_scale, col_inverse,
    BLOCK: tl.constexpr, E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """The multiplier of a square block with that amax, the one at (row, col); writes it to both."""
    multiplier = scale_of(bits, E5M2, EPS, POWER_OF_TWO)
    if row_scale is not None:
        _store_square(multiplier, row, col, tl.cdiv(width, BLOCK), row_scale, row_inverse)
    if col_scale is not None:
        _store_square(multiplier, col, row, tl.cdiv(rows, BLOCK), col_scale, col_inverse)
    return multiplier


@triton.jit
def column_scales(
    bits, cols, end_col, block, rows, scale, inverse, BLOCK: tl.constexpr,
    E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
):  # fmt: skip
    """The multipliers `[1, C]` of columns in a block of rows, by magnitudes in it; writes them."""
    multiplier = scale_of(tl.max(bits, 0), E5M2, EPS, POWER_OF_TWO)
    tl.store(scale + cols.to(tl.int64) * tl.cdiv(rows, BLOCK) + block, multiplier, cols < end_col)
    at = block.to(tl.int64) * (tl.cdiv(end_col, 4) * 4) + cols
    tl.store(inverse + at, inverse_of(multiplier, POWER_OF_TWO), cols < end_col)
    return multiplier[None, :]


@triton.jit
def store_shared(
    value, multiplier, first_row, first_col, rows, end_col, width, row_data, col_data,
    R: tl.constexpr, C: tl.constexpr, E5M2: tl.constexpr, NATIVE: tl.constexpr,
    FOURS: tl.constexpr = 0,
):  # fmt: skip
    """The row and the column copy, which share their bytes: scales "tensor" and "square"."""
    if row_data is not None or col_data is not None:
        codes = encode(scaled(value, multiplier), E5M2, NATIVE)
        if row_data is not None:
            store_data(codes, first_row, first_col, rows, end_col, width, row_data, R, C, FOURS)
        if col_data is not None:
            _store_columns(
                codes, first_row, first_col, rows, end_col, col_data, R, C, FOURS, NATIVE
            )


@triton.jit
def store_copies(
    value, multiplier, first_row, first_col, rows, end_col, width, row_data, row_scale, col_data,
    col_scale, given, R: tl.constexpr, C: tl.constexpr, SCALING: tl.constexpr, BLOCK: tl.constexpr,
    E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr, NATIVE: tl.constexpr,
    FOURS: tl.constexpr = 0,
):  # fmt: skip
    """The row copy and the column copy of a tile, where there is data for each.

    Scaling "tensor" has one scale, `multiplier`. Not of "square", nor of both copies of "blocks",
    whose inverses go to col_scale.
    """
    if row_data is None and col_data is None:
        pass
    elif SCALING == "tensor":
        store_shared(
            value, multiplier, first_row, first_col, rows, end_col, width, row_data, col_data,
            R, C, E5M2, NATIVE, FOURS,
        )  # fmt: skip
    else:
        if row_data is not None:
            store_row_copy(
                value, first_row, first_col, rows, end_col, width, row_data, row_scale, col_scale,
                given, R, C, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
            )  # fmt: skip
        if col_data is not None:
            store_col_copy(
                value, first_row, first_col, rows, end_col, col_data, col_scale, given,
                R, C, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
            )  # fmt: skip
