"""An activation's gradient and the activation in blocks' FP8, by rows and columns, read once.

A row's scale needs the amax of 128 columns, a column's that of 128 rows: of a block of 128 x 128.
A program makes one, a slice of rows after another: it stores a slice's row copies and keeps the
values, rounded, in shared memory, which has room for two programs' a multiprocessor. Once all are
there, it reads them by columns. It is written in Gluon, which lets a kernel keep what it likes in
shared memory; Triton has no interpreter for it. `quantize_gradients` has the kernels that read dy
and x twice, whose bits these copies have.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gradient_tiles import gradients_of
from .ptx import widened
from .quantize_pairs import (
    _ROW_E4M3,
    _ROW_E5M2,
    _both,
    _column_codes,
    _finite,
    _high,
    _inverses,
    _low,
    _paired,
    _powers,
)

_LARGER = gl.constexpr("max.NaN.xorsign.abs.bf16x2 $0, $1, $2;")
BLOCK = gl.constexpr(128)
SLICES = gl.constexpr(4)
GROUPS = gl.constexpr(8)
"""Of 16 rows each, of which a column has 16 bytes. A slice has four rows of every group."""


@gluon.jit
def _larger(one, other):
    """As `larger`, of values with signs; whose sign the result has is of no use."""
    return gl.inline_asm_elementwise(_LARGER, "=r,r,r", [one, other], gl.int32, True, 1)


@gluon.jit
def _rows(part, layout: gl.constexpr):
    """A slice's rows within the block."""
    row = gl.arange(0, BLOCK // SLICES, layout)
    return row // 4 * 16 + part * 4 + row % 4


@gluon.jit
def _load_slice(dy, x, part, end, dy_stride, x_stride, WIDTH: gl.constexpr, GATED: gl.constexpr):
    """A slice of dy and of x, and of x's second half if gated, as in memory; zero from end on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    row = _rows(part, gl.SliceLayout(1, layout))[:, None]
    cols = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))[None, :]
    there = row < end
    at = x + (row.to(gl.int64) * x_stride * 8 + cols)
    grad = gl.load(dy + (row.to(gl.int64) * dy_stride * 8 + cols), mask=there, other=0.0)
    a = gl.load(at, mask=there, other=0.0)
    b = a
    if GATED:
        b = gl.load(at + WIDTH, mask=there, other=0.0)
    return grad, a, b


@gluon.jit
def _keep_slice(
    value, kept, part, first_row, first_col, end, rows, width, data, scale, inverse,
    KEEP: gl.constexpr, E5M2: gl.constexpr,
):  # fmt: skip
    """The row copy of a slice, fp32 `[BLOCK // SLICES, BLOCK]`; its pairs go to shared memory."""
    R: gl.constexpr = BLOCK // SLICES
    pairs = _paired(value, R, BLOCK)
    if KEEP:
        kept.index(part).store(pairs)
    if data is not None:
        powers = _powers(_both(gl.reduce(pairs, 1, _larger) & 0x7FFF7FFF), E5M2)
        along: gl.constexpr = powers.type.layout
        row = _rows(part, along)
        to = first_row + row.to(gl.int64)
        there = row < end
        block = first_col // BLOCK
        gl.store(scale + to * (width // BLOCK) + block, _low(powers), mask=there)
        at = inverse + block.to(gl.int64) * rows + to
        gl.store(at, _low(_inverses(powers)), mask=there)
        one, other = _finite(pairs).reshape((R, BLOCK // 4, 2)).split()
        layout: gl.constexpr = one.type.layout
        factor = gl.convert_layout(powers, gl.SliceLayout(1, layout))[:, None]
        factor, one = gl.broadcast(factor, one)
        CODES: gl.constexpr = _ROW_E5M2 if E5M2 else _ROW_E4M3
        codes = gl.inline_asm_elementwise(
            CODES, "=r,r,r,r", [one, other, factor], gl.int32, True, 1
        )
        row = _rows(part, gl.SliceLayout(1, layout))[:, None]
        word = first_col // 4 + gl.arange(0, BLOCK // 4, gl.SliceLayout(0, layout))[None, :]
        words = data.to(gl.pointer_type(gl.int32), bitcast=True)
        at = words + ((first_row + row.to(gl.int64)) * (width // 4) + word)
        gl.store(at, codes, mask=row < end)


@gluon.jit
def _fours(kept):
    """The pairs of a slice, `[GROUPS, BLOCK // 2]` of the first of each four rows, and so on."""
    # A thread has the rows of a group in four columns; its neighbours have the next groups.
    layout: gl.constexpr = gl.BlockedLayout([4, 2], [GROUPS, 4], [1, gl.num_warps()], [0, 1])
    pairs = kept.load(layout).reshape((GROUPS, 2, 2, BLOCK // 2)).permute((0, 3, 1, 2))
    even, odd = pairs.split()
    first, third = even.split()
    second, fourth = odd.split()
    return first, second, third, fourth


@gluon.jit
def _store_columns(
    kept, down, first_col, rows, width, data, scale, inverse, E5M2: gl.constexpr
):  # fmt: skip
    """The column copy of a block of which shared memory has the pairs."""
    WORDS: gl.constexpr = BLOCK // 2
    tiles = (
        _fours(kept.index(0)),
        _fours(kept.index(1)),
        _fours(kept.index(2)),
        _fours(kept.index(3)),
    )
    most = tiles[0][0]
    for part in gl.static_range(SLICES):
        for i in gl.static_range(4):
            most = _larger(most, tiles[part][i])
    powers = _powers(gl.reduce(most, 0, _larger) & 0x7FFF7FFF, E5M2)
    inverses = _inverses(powers)
    made = gl.join(_low(powers), _high(powers)).reshape((BLOCK,))
    cols = first_col + gl.arange(0, BLOCK, made.type.layout)
    gl.store(scale + cols.to(gl.int64) * gl.cdiv(rows, BLOCK) + down, made)
    made = gl.join(_low(inverses), _high(inverses)).reshape((BLOCK,))
    gl.store(inverse + down.to(gl.int64) * width + cols, made)
    factor = powers[None, :]
    low_0, high_0 = _column_codes(tiles[0], factor, E5M2)
    low_1, high_1 = _column_codes(tiles[1], factor, E5M2)
    low_2, high_2 = _column_codes(tiles[2], factor, E5M2)
    low_3, high_3 = _column_codes(tiles[3], factor, E5M2)
    low = gl.join(gl.join(low_0, low_2), gl.join(low_1, low_3)).reshape((GROUPS, WORDS, 4))
    high = gl.join(gl.join(high_0, high_2), gl.join(high_1, high_3)).reshape((GROUPS, WORDS, 4))
    to: gl.constexpr = low.type.layout
    group = gl.arange(0, GROUPS, gl.SliceLayout(1, gl.SliceLayout(2, to)))[:, None][:, :, None]
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(2, to)))[None, :][:, :, None]
    part = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, to)))[None, :][:, None, :]
    # Rows are a multiple of 16.
    there = down * GROUPS + group < rows // 16
    words = data.to(gl.pointer_type(gl.int32), bitcast=True)
    at = (first_col + 2 * word).to(gl.int64) * (rows // 4) + (down * GROUPS + group) * 4 + part
    gl.store(words + at, low, mask=there)
    gl.store(words + at + rows // 4, high, mask=there)


@gluon.jit(do_not_specialize=["rows", "dy_stride", "x_stride"])
def activation_backward_once_kernel(
    dy, x, dx_row, dx_row_scale, dx_row_inverse, dx_col, dx_col_scale, dx_col_inverse,
    y_row, y_row_scale, y_row_inverse, y_col, y_col_scale, y_col_inverse,
    rows, dy_stride, x_stride, WIDTH: gl.constexpr, FUNCTION: gl.constexpr, GATED: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr, OFFSET: gl.constexpr, E5M2: gl.constexpr,
    Y_E5M2: gl.constexpr,
):  # fmt: skip
    """The copies of a block of dx (of each half of it) and of y.

    rows: in units of 16. Strides: in units of 8. WIDTH: of y, a multiple of BLOCK. Values are bf16,
    and scales powers of two, as in `quantize_pairs`.
    """
    dtype: gl.constexpr = x.dtype.element_ty
    total: gl.constexpr = WIDTH * 2 if GATED else WIDTH
    across: gl.constexpr = WIDTH // BLOCK
    DX: gl.constexpr = dx_col is not None
    Y: gl.constexpr = y_col is not None
    rows *= 16
    down, first_col = gl.program_id(0) // across, gl.program_id(0) % across * BLOCK
    first_row = down.to(gl.int64) * BLOCK
    end = rows - down * BLOCK
    # 16 bytes of a row are moved by its group: those that threads have of a column are then in
    # banks of their own.
    layout: gl.constexpr = gl.SwizzledSharedLayout(4, 4, GROUPS, [1, 0])
    shape: gl.constexpr = [SLICES, BLOCK // SLICES, BLOCK // 2]
    kept_a = gl.allocate_shared_memory(gl.int32, shape, layout)
    kept_b = kept_a
    if GATED:
        kept_b = gl.allocate_shared_memory(gl.int32, shape, layout)
    kept_y = kept_a
    if Y:
        kept_y = gl.allocate_shared_memory(gl.int32, shape, layout)
    dy_stride = gl.to_tensor(dy_stride).to(gl.int64)
    x_stride = gl.to_tensor(x_stride).to(gl.int64)
    dy += first_row * dy_stride * 8 + first_col
    x += first_row * x_stride * 8 + first_col
    grad, a, b = _load_slice(dy, x, 0, end, dy_stride, x_stride, WIDTH, GATED)
    for part in range(SLICES):
        # Loaded while this slice is computed. The last one loads nothing.
        more = gl.where(part + 1 < SLICES, end, 0)
        next_grad, next_a, next_b = _load_slice(
            dy, x, part + 1, more, dy_stride, x_stride, WIDTH, GATED
        )
        y, da, db = gradients_of(
            widened(grad), widened(a), widened(b), dtype, FUNCTION, GATED, ALPHA, LIMIT, OFFSET
        )
        grad, a, b = next_grad, next_a, next_b
        _keep_slice(
            da, kept_a, part, first_row, first_col, end, rows, total, dx_row, dx_row_scale,
            dx_row_inverse, DX, E5M2,
        )  # fmt: skip
        if GATED:
            _keep_slice(
                db, kept_b, part, first_row, first_col + WIDTH, end, rows, total, dx_row,
                dx_row_scale, dx_row_inverse, DX, E5M2,
            )  # fmt: skip
        if Y or y_row is not None:
            _keep_slice(
                y, kept_y, part, first_row, first_col, end, rows, WIDTH, y_row, y_row_scale,
                y_row_inverse, Y, Y_E5M2,
            )  # fmt: skip
    if DX:
        _store_columns(
            kept_a, down, first_col, rows, total, dx_col, dx_col_scale, dx_col_inverse, E5M2
        )
        if GATED:
            _store_columns(
                kept_b, down, first_col + WIDTH, rows, total, dx_col, dx_col_scale, dx_col_inverse,
                E5M2,
            )  # fmt: skip
    if Y:
        _store_columns(
            kept_y, down, first_col, rows, WIDTH, y_col, y_col_scale, y_col_inverse, Y_E5M2
        )
