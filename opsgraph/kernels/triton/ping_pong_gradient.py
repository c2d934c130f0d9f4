"""The backward of `ping_pong_activation`: products with the activation's gradient beside them."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .activations import _backward, _gate_backward
from .ping_pong import _barriers, _clear_rows, _copy_in, _halves, _multiply
from .ping_pong_activation import HALF, _load, _put, _tile, _tiles

SLOTS = gl.constexpr(3)
"""How many parts of `[HALF, HALF]` have room, of what the activation read."""


@gluon.jit
def _row_halves(total):
    """A tile's rows in two, each thread's own."""
    half: gl.constexpr = total.shape[0] // 2
    return total.reshape((2, half, total.shape[1])).permute((1, 2, 0)).split()


@gluon.jit
def _load_parts(
    pre_tiles, plan, parts, ready, free, rows, width,
    GATED: gl.constexpr, COUNT: gl.constexpr, PROGRAMS: gl.constexpr, GROUP: gl.constexpr,
    BLOCK_M: gl.constexpr,
):  # fmt: skip
    """Another warp copies what the activation read: each tile's four parts, of two halves each."""
    PIECES: gl.constexpr = 2 if GATED else 1
    tiles_m, tiles_n = _tiles(plan, rows, COUNT, BLOCK_M), gl.cdiv(width, 2 * HALF)
    index = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        _, first, _, n = _tile(plan, tile, rows, tiles_m, tiles_n, COUNT, BLOCK_M, GROUP)
        for part in range(4):
            row, col = first + part % 2 * HALF, (n * 2 + part // 2) * HALF
            s = index % SLOTS
            mbarrier.wait(free.index(s), ((index // SLOTS) & 1) ^ 1)
            bar = ready.index(s)
            mbarrier.expect(bar, PIECES * pre_tiles.block_type.nbytes)
            for piece in gl.static_range(PIECES):
                at = [row, piece * width + col]
                _copy_in(pre_tiles, at, bar, parts.index(s * PIECES + piece))
            index += 1


@gluon.jit
def _differentiate_rows(
    dpre_tiles, y_tiles, dpre, y, plan, xs, ws, parts, out, ready, free, order, full, empty,
    turn, rows, depth, width,
    WHICH: gl.constexpr, FUNCTION: gl.constexpr, GATED: gl.constexpr, ALPHA: gl.constexpr,
    LIMIT: gl.constexpr, OFFSET: gl.constexpr, COUNT: gl.constexpr, PROGRAMS: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """Four warps make every other tile of a program.

    In shared memory each part of what the activation read becomes its gradient.
    """
    BLOCK_M: gl.constexpr = xs.type.shape[1]
    BLOCK_K: gl.constexpr = xs.type.shape[2]
    BLOCK_N: gl.constexpr = 2 * HALF
    WHOLE: gl.constexpr = COUNT == 0
    PIECES: gl.constexpr = 2 if GATED else 1
    dtype: gl.constexpr = dpre.dtype.element_ty
    mine = out.index(WHICH)
    tiles_m, tiles_n = _tiles(plan, rows, COUNT, BLOCK_M), gl.cdiv(width, BLOCK_N)
    steps = gl.cdiv(depth, BLOCK_K)
    index, taken = WHICH * steps, WHICH * 4
    for tile in range(gl.program_id(0) + WHICH * PROGRAMS, tiles_m * tiles_n, 2 * PROGRAMS):
        _, first, end, n = _tile(plan, tile, rows, tiles_m, tiles_n, COUNT, BLOCK_M, GROUP)
        parity = tile // (2 * PROGRAMS) & 1
        total = _multiply(
            xs, ws, full, empty, turn, index, steps, parity, WHICH, False, BLOCK_N
        )  # fmt: skip
        halves = _halves(total)
        for i in gl.static_range(2):
            grads = _row_halves(halves[i])
            col = (n * 2 + i) * HALF
            for j in gl.static_range(2):
                s = taken % SLOTS
                one, row, grad = parts.index(s * PIECES), first + j * HALF, grads[j]
                if i + j == 0:  # once the other has had all parts that were copied before
                    mbarrier.wait(order.index(WHICH), parity ^ (1 - WHICH))
                mbarrier.wait(ready.index(s), (taken // SLOTS) & 1)
                if i + j == 2:
                    mbarrier.arrive(order.index(1 - WHICH), count=1)
                a = one.load(grad.type.layout).to(gl.float32)
                if GATED:
                    two = parts.index(s * PIECES + 1)
                    b = two.load(grad.type.layout).to(gl.float32)
                    value, da, db = _gate_backward(
                        grad, a, b, dtype, FUNCTION, GATED, ALPHA, LIMIT, OFFSET
                    )
                    two.store(db.to(dtype))
                else:
                    value, da = _backward(grad, a, dtype, FUNCTION, ALPHA)
                one.store(da.to(dtype))
                # What was stored before has left shared memory.
                tma.store_wait(0)
                if i + j > 0:
                    mbarrier.arrive(free.index((taken + SLOTS - 1) % SLOTS), count=1)
                if y is not None:
                    mine.store(value.to(dtype))
                fence_async_shared()
                if col < width:
                    _put(dpre_tiles, dpre, one, row, end, col, PIECES * width, WHOLE)
                    if GATED:
                        _put(dpre_tiles, dpre, two, row, end, width + col, 2 * width, WHOLE)
                    if y is not None:
                        _put(y_tiles, y, mine, row, end, col, width, WHOLE)
                taken += 1
        tma.store_wait(0)
        mbarrier.arrive(free.index((taken + SLOTS - 1) % SLOTS), count=1)
        index += 2 * steps  # the other's tile too
        taken += 4


@gluon.jit(do_not_specialize=["rows", "dy_stride", "pre_stride"])
def ping_pong_gradient_kernel(
    dy, weights, pre, dpre, y, plan, rows, depth, width, dy_stride, pre_stride,
    FUNCTION: gl.constexpr, GATED: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    OFFSET: gl.constexpr, COUNT: gl.constexpr, PROGRAMS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`dpre = f'(pre) * (dy @ weights[g])`, and `y = f(pre)` unless it is None.

    weights: `[depth, width]`, width a multiple of HALF. dpre may be pre. Strides: in units of 8.
    """
    dtype: gl.constexpr = dy.dtype.element_ty
    PIECES: gl.constexpr = 2 if GATED else 1
    groups: gl.constexpr = COUNT if COUNT > 0 else 1
    total = width * PIECES
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    dy_rows = tma.make_tensor_descriptor(
        dy, [rows, depth], [gl.to_tensor(dy_stride).to(gl.int64) * 8, 1], [BLOCK_M, BLOCK_K], layout
    )
    stored = tma.make_tensor_descriptor(
        weights, [groups * depth, width], [width, 1], [BLOCK_K, 2 * HALF], layout
    )
    pre_tiles = tma.make_tensor_descriptor(
        pre, [rows, total], [gl.to_tensor(pre_stride).to(gl.int64) * 8, 1], [HALF, HALF], layout
    )
    dpre_tiles = tma.make_tensor_descriptor(dpre, [rows, total], [total, 1], [HALF, HALF], layout)
    y_tiles = dpre_tiles
    if y is not None:
        y_tiles = tma.make_tensor_descriptor(y, [rows, width], [width, 1], [HALF, HALF], layout)
    dys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], layout)
    ws = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, 2 * HALF], layout)
    parts = gl.allocate_shared_memory(dtype, [SLOTS * PIECES, HALF, HALF], layout)
    out = gl.allocate_shared_memory(dtype, [2, HALF, HALF], layout)
    ready = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    order = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(SLOTS):
        mbarrier.init(ready.index(s), count=1)
        mbarrier.init(free.index(s), count=1)
    for w in gl.static_range(2):
        mbarrier.init(order.index(w), count=1)
    full, empty, turn = _barriers(STAGES)
    gl.warp_specialize(
        [
            (_differentiate_rows, (
                dpre_tiles, y_tiles, dpre, y, plan, dys, ws, parts, out, ready, free, order, full,
                empty, turn, rows, depth, width,
                0, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, COUNT, PROGRAMS, GROUP,
            )),
            (_differentiate_rows, (
                dpre_tiles, y_tiles, dpre, y, plan, dys, ws, parts, out, ready, free, order, full,
                empty, turn, rows, depth, width,
                1, FUNCTION, GATED, ALPHA, LIMIT, OFFSET, COUNT, PROGRAMS, GROUP,
            )),
            (_load, (
                dy_rows, stored, plan, dys, ws, full, empty, rows, depth, width,
                False, 1, COUNT, PROGRAMS, GROUP,
            )),
            (_load_parts, (
                pre_tiles, plan, parts, ready, free, rows, width,
                GATED, COUNT, PROGRAMS, GROUP, BLOCK_M,
            )),
        ],
        [4, 1, 1], [240, 24, 24],
    )  # fmt: skip
    if COUNT > 0:
        _clear_rows(dpre, plan, rows, total, COUNT, PROGRAMS)
        if y is not None:
            _clear_rows(y, plan, rows, width, COUNT, PROGRAMS)
