"""Products with an activation beside them on Hopper; `ping_pong_gradient` has the backward.

Two groups of warps take tiles in turn, as in `ping_pong`: while one multiplies, the other computes
the activation of its last tile, or the gradient, so that neither is a pass over memory of its own.
Rows are of groups, as there, or, where COUNT is 0, all of one: then there is no plan.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from . import pairs
from .activations import _gate
from .ping_pong import (
    _barriers,
    _clear_rows,
    _copy_in,
    _copy_out,
    _halves,
    _multiply,
    _tile_of_rows,
)

HALF = gl.constexpr(pairs.HALF)


@gluon.jit
def _tiles(plan, rows, COUNT: gl.constexpr, BLOCK_M: gl.constexpr):
    """How many tiles of rows there are."""
    if COUNT == 0:
        return gl.cdiv(rows, BLOCK_M)
    else:
        return gl.load(plan + COUNT + 1)


@gluon.jit
def _tile(
    plan, tile, rows, tiles_m, tiles_n,
    COUNT: gl.constexpr, BLOCK_M: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """(group, first row, end of the group's rows, tile of columns)."""
    if COUNT == 0:
        head = tile // (GROUP * tiles_n) * GROUP
        height = min(tiles_m - head, GROUP)
        within = tile % (GROUP * tiles_n)
        return 0, (head + within % height) * BLOCK_M, rows, within // height
    else:
        return _tile_of_rows(plan, tile, tiles_m, tiles_n, COUNT, GROUP)


@gluon.jit
def _put(tiles, out, mine, row, rows, col, columns, WHOLE: gl.constexpr):
    """A tile in shared memory, by a descriptor; by pointers where a group fills it in part."""
    if WHOLE or row + mine.shape[0] <= rows:
        _copy_out(tiles, [row, col], mine)
    else:
        lanes: gl.constexpr = mine.shape[1] // 8
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
        r = row + gl.arange(0, mine.shape[0], gl.SliceLayout(1, layout))
        c = col + gl.arange(0, mine.shape[1], gl.SliceLayout(0, layout))
        at = out + r.to(gl.int64)[:, None] * columns + c[None, :]
        gl.store(at, mine.load(layout), mask=(r < rows)[:, None] & (c < columns)[None, :])


@gluon.jit
def _store(tiles, out, value, mine, row, rows, col, columns, WHOLE: gl.constexpr):
    """As `_put`, of a value, once the shared memory is free."""
    tma.store_wait(0)
    mine.store(value.to(mine.dtype))
    fence_async_shared()
    _put(tiles, out, mine, row, rows, col, columns, WHOLE)


@gluon.jit
def _load(
    x_rows, stored, plan, xs, ws, full, empty, rows, depth, width,
    TRANSPOSED: gl.constexpr, PIECES: gl.constexpr, COUNT: gl.constexpr, PROGRAMS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """One warp copies operands: for a tile, of each of PIECES parts of `width` columns a piece."""
    STAGES: gl.constexpr = xs.type.shape[0]
    BLOCK_M: gl.constexpr = xs.type.shape[1]
    BLOCK_K: gl.constexpr = xs.type.shape[2]
    COLUMNS: gl.constexpr = 2 * HALF // PIECES
    tiles_m, tiles_n = _tiles(plan, rows, COUNT, BLOCK_M), gl.cdiv(width, COLUMNS)
    index = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        group, first, _, n = _tile(plan, tile, rows, tiles_m, tiles_n, COUNT, BLOCK_M, GROUP)
        for k in range(0, depth, BLOCK_K):
            s = index % STAGES
            mbarrier.wait(empty.index(s), ((index // STAGES) & 1) ^ 1)
            bar = full.index(s)
            mbarrier.expect(bar, x_rows.block_type.nbytes + PIECES * stored.block_type.nbytes)
            _copy_in(x_rows, [first, k], bar, xs.index(s))
            for piece in gl.static_range(PIECES):
                if TRANSPOSED:
                    at = [(group * PIECES + piece) * width + n * COLUMNS, k]
                    to = ws.index(s).slice(piece * COLUMNS, COLUMNS)
                else:
                    at = [group * depth + k, n * COLUMNS]
                    to = ws.index(s)
                _copy_in(stored, at, bar, to)
            index += 1


@gluon.jit
def _biased(total, bias, col, columns):
    if bias is not None:
        cols = col + gl.arange(0, total.shape[1], gl.SliceLayout(0, total.type.layout))
        added = gl.load(bias + cols, mask=cols < columns, other=0.0)
        total += added.to(gl.float32)[None, :]
    return total


@gluon.jit
def _activate_rows(
    y_tiles, pre_tiles, y, pre, bias, plan, xs, ws, out, full, empty, turn, rows, depth, width,
    WHICH: gl.constexpr, FUNCTION: gl.constexpr, GATED: gl.constexpr, ALPHA: gl.constexpr,
    LIMIT: gl.constexpr, OFFSET: gl.constexpr, COUNT: gl.constexpr, PROGRAMS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Four warps make every other tile of a program."""
    BLOCK_M: gl.constexpr = xs.type.shape[1]
    BLOCK_K: gl.constexpr = xs.type.shape[2]
    BLOCK_N: gl.constexpr = 2 * HALF
    PIECES: gl.constexpr = 2 if GATED else 1
    COLUMNS: gl.constexpr = BLOCK_N // PIECES
    WHOLE: gl.constexpr = COUNT == 0
    dtype: gl.constexpr = y.dtype.element_ty
    mine = out.index(WHICH)
    tiles_m, tiles_n = _tiles(plan, rows, COUNT, BLOCK_M), gl.cdiv(width, COLUMNS)
    steps = gl.cdiv(depth, BLOCK_K)
    index = WHICH * steps
    for tile in range(gl.program_id(0) + WHICH * PROGRAMS, tiles_m * tiles_n, 2 * PROGRAMS):
        group, first, end, n = _tile(plan, tile, rows, tiles_m, tiles_n, COUNT, BLOCK_M, GROUP)
        total = _multiply(
            xs, ws, full, empty, turn, index, steps, tile // (2 * PROGRAMS) & 1,
            WHICH, True, BLOCK_N,
        )  # fmt: skip
        halves = _halves(total)
        col = n * COLUMNS
        start = bias
        if bias is not None:
            start = bias + group * PIECES * width
        if GATED:
            a = _biased(halves[0], start, col, width).to(dtype)
            b = _biased(halves[1], start, width + col, 2 * width).to(dtype)
            if pre is not None:
                _store(pre_tiles, pre, a, mine, first, end, col, 2 * width, WHOLE)
                _store(pre_tiles, pre, b, mine, first, end, width + col, 2 * width, WHOLE)
            a, b = a.to(gl.float32), b.to(gl.float32)
            value = _gate(a, b, dtype, FUNCTION, GATED, ALPHA, LIMIT, OFFSET)
            _store(y_tiles, y, value, mine, first, end, col, width, WHOLE)
        else:
            for i in gl.static_range(2):
                if col + i * HALF < width:
                    a = _biased(halves[i], start, col + i * HALF, width).to(dtype)
                    if pre is not None:
                        _store(pre_tiles, pre, a, mine, first, end, col + i * HALF, width, WHOLE)
                    value, _, _ = FUNCTION(a.to(gl.float32), ALPHA, dtype)
                    _store(y_tiles, y, value, mine, first, end, col + i * HALF, width, WHOLE)
        index += 2 * steps  # the other's tile too
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "x_stride"])
def ping_pong_activation_kernel(
    x, weights, bias, y, pre, plan, rows, depth, width, x_stride,
    FUNCTION: gl.constexpr, GATED: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    OFFSET: gl.constexpr, COUNT: gl.constexpr, PROGRAMS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`y = f(pre)`, `pre = x @ weights[g].T + bias[g]`; pre is stored unless it is None.

    width: of y, a multiple of HALF; gated, pre has twice as many columns. x_stride: in units of 8.
    """
    dtype: gl.constexpr = x.dtype.element_ty
    PIECES: gl.constexpr = 2 if GATED else 1
    COLUMNS: gl.constexpr = 2 * HALF // PIECES
    groups: gl.constexpr = COUNT if COUNT > 0 else 1
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_rows = tma.make_tensor_descriptor(
        x, [rows, depth], [gl.to_tensor(x_stride).to(gl.int64) * 8, 1], [BLOCK_M, BLOCK_K], layout
    )
    stored = tma.make_tensor_descriptor(
        weights, [groups * PIECES * width, depth], [depth, 1], [COLUMNS, BLOCK_K], layout
    )
    y_tiles = tma.make_tensor_descriptor(y, [rows, width], [width, 1], [BLOCK_M, HALF], layout)
    pre_tiles = y_tiles
    if pre is not None:
        total = width * PIECES
        pre_tiles = tma.make_tensor_descriptor(
            pre, [rows, total], [total, 1], [BLOCK_M, HALF], layout
        )
    xs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], layout)
    ws = gl.allocate_shared_memory(dtype, [STAGES, 2 * HALF, BLOCK_K], layout)
    out = gl.allocate_shared_memory(dtype, [2, BLOCK_M, HALF], layout)
    full, empty, turn = _barriers(STAGES)
    gl.warp_specialize(
        [
            (_activate_rows, (
                y_tiles, pre_tiles, y, pre, bias, plan, xs, ws, out, full, empty, turn, rows, depth,
                width, 0, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, COUNT, PROGRAMS, GROUP,
            )),
            (_activate_rows, (
                y_tiles, pre_tiles, y, pre, bias, plan, xs, ws, out, full, empty, turn, rows, depth,
                width, 1, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, COUNT, PROGRAMS, GROUP,
            )),
            (_load, (
                x_rows, stored, plan, xs, ws, full, empty, rows, depth, width,
                True, PIECES, COUNT, PROGRAMS, GROUP,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
    if COUNT > 0:
        _clear_rows(y, plan, rows, width, COUNT, PROGRAMS)
        if pre is not None:
            _clear_rows(pre, plan, rows, width * PIECES, COUNT, PROGRAMS)
