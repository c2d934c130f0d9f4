"""Products of groups of rows on Hopper where two groups of warps take tiles in turn.

While one multiplies, the other stores, so that the tensor cores never wait for the end of a tile.
Another warp copies tiles ahead of both. It is written in Gluon, in which a kernel says which warps
do what; Triton compiles it from 3.6 on, and has no interpreter for it. `persistent` has kernels of
the same products in Triton, which are taken elsewhere.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

# Triton 3.8 has new names for them, and 3.9 no old ones.
_copy_in = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_copy_out = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def _wait_for_tile(full, index, STAGES: gl.constexpr):
    """Until what the loader copied as number index is there."""
    mbarrier.wait(full.index(index % STAGES), (index // STAGES) & 1)


@gluon.jit
def _free_before(empty, index, STAGES: gl.constexpr, there=True):
    """Let the loader overwrite what was copied before number index."""
    mbarrier.arrive(empty.index((index + STAGES - 1) % STAGES), count=1, pred=there)


@gluon.jit
def _halves(total):
    """A tile's columns in two: shared memory has room for one."""
    half: gl.constexpr = total.shape[1] // 2
    return total.reshape((total.shape[0], 2, half)).permute((0, 2, 1)).split()


@gluon.jit
def _store_tile(tiles, total, mine, row, col):
    """A whole tile by a descriptor. mine: shared memory for half of it."""
    halves = _halves(total)
    for i in gl.static_range(2):
        tma.store_wait(0)
        mine.store(halves[i].to(mine.dtype))
        fence_async_shared()
        _copy_out(tiles, [row, col + i * mine.shape[1]], mine)


@gluon.jit
def _store_part(out, total, mine, row, rows, col, columns):
    """What lies before the rows and columns that are given, by pointers; out: `[*, columns]`."""
    lanes: gl.constexpr = mine.shape[1] // 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])
    r = row + gl.arange(0, mine.shape[0], gl.SliceLayout(1, layout))
    halves = _halves(total)
    tma.store_wait(0)
    for i in gl.static_range(2):
        mine.store(halves[i].to(mine.dtype))
        values = mine.load(layout)
        c = col + i * mine.shape[1] + gl.arange(0, mine.shape[1], gl.SliceLayout(0, layout))
        at = out + r.to(gl.int64)[:, None] * columns + c[None, :]
        gl.store(at, values, mask=(r < rows)[:, None] & (c < columns)[None, :])


@gluon.jit
def _barriers(STAGES: gl.constexpr, READERS: gl.constexpr = 1):
    """Of each stage whether it is full and whether it is empty; whose turn it is.

    READERS: how many free a stage.
    """
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=READERS)
    for w in gl.static_range(2):
        mbarrier.init(turn.index(w), count=1)
    return full, empty, turn


@gluon.jit
def _tile_of_rows(plan, tile, tiles_m, tiles_n, COUNT: gl.constexpr, GROUP: gl.constexpr):
    """(group, first row, end of the group's rows, tile of columns)."""
    head = tile // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - head, GROUP)
    within = tile % (GROUP * tiles_n)
    at = plan + COUNT + 2 + (head + within % height) * 3
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), within // height


@gluon.jit
def _load_rows(
    x_rows, stored, plan, xs, ws, full, empty, depth, width,
    TRANSPOSED: gl.constexpr, COUNT: gl.constexpr, PROGRAMS: gl.constexpr, BLOCK_N: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    """One warp copies the operands of all tiles, as far ahead as there are stages."""
    STAGES: gl.constexpr = xs.type.shape[0]
    BLOCK_K: gl.constexpr = xs.type.shape[2]
    tiles_m, tiles_n = gl.load(plan + COUNT + 1), gl.cdiv(width, BLOCK_N)
    index = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        group, first, _, n = _tile_of_rows(plan, tile, tiles_m, tiles_n, COUNT, GROUP)
        for k in range(0, depth, BLOCK_K):
            s = index % STAGES
            mbarrier.wait(empty.index(s), ((index // STAGES) & 1) ^ 1)
            bar = full.index(s)
            mbarrier.expect(bar, x_rows.block_type.nbytes + stored.block_type.nbytes)
            _copy_in(x_rows, [first, k], bar, xs.index(s))
            if TRANSPOSED:
                at = [group * width + n * BLOCK_N, k]
            else:
                at = [group * depth + k, n * BLOCK_N]
            _copy_in(stored, at, bar, ws.index(s))
            index += 1


@gluon.jit
def _multiply(
    xs, ws, full, empty, turn, index, steps, parity,
    WHICH: gl.constexpr, TRANSPOSED: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """A tile in fp32, in one's turn. index: of the first step. ws: `[STAGES, ...]`."""
    STAGES: gl.constexpr = xs.type.shape[0]
    BLOCK_M: gl.constexpr = xs.type.shape[1]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout))
    mbarrier.wait(turn.index(WHICH), parity ^ (1 - WHICH))
    for k in range(0, steps):
        _wait_for_tile(full, index, STAGES)
        b = ws.index(index % STAGES)
        if TRANSPOSED:
            b = b.permute((1, 0))
        acc = warpgroup_mma(xs.index(index % STAGES), b, acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
        _free_before(empty, index, STAGES, k > 0)
        index += 1
    mbarrier.arrive(turn.index(1 - WHICH), count=1)
    total = warpgroup_mma_wait(0, deps=[acc])
    _free_before(empty, index, STAGES)
    return total


@gluon.jit
def _multiply_rows(
    tiles, y, bias, plan, xs, ws, out, full, empty, turn, depth, width,
    WHICH: gl.constexpr, TRANSPOSED: gl.constexpr, COUNT: gl.constexpr, PROGRAMS: gl.constexpr,
    BLOCK_N: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Four warps make every other tile of a program."""
    BLOCK_M: gl.constexpr = xs.type.shape[1]
    BLOCK_K: gl.constexpr = xs.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    tiles_m, tiles_n = gl.load(plan + COUNT + 1), gl.cdiv(width, BLOCK_N)
    steps = gl.cdiv(depth, BLOCK_K)
    index = WHICH * steps
    for tile in range(gl.program_id(0) + WHICH * PROGRAMS, tiles_m * tiles_n, 2 * PROGRAMS):
        group, first, end, n = _tile_of_rows(plan, tile, tiles_m, tiles_n, COUNT, GROUP)
        total = _multiply(
            xs, ws, full, empty, turn, index, steps, tile // (2 * PROGRAMS) & 1,
            WHICH, TRANSPOSED, BLOCK_N,
        )  # fmt: skip
        col = n * BLOCK_N
        if bias is not None:
            cols = col + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
            added = gl.load(bias + group * width + cols, mask=cols < width, other=0.0)
            total += added.to(gl.float32)[None, :]
        if first + BLOCK_M <= end:
            _store_tile(tiles, total, out.index(WHICH), first, col)
        else:
            _store_part(y, total, out.index(WHICH), first, end, col, width)
        index += 2 * steps  # the other's tile too
    tma.store_wait(0)


@gluon.jit
def _clear_rows(y, plan, rows, width, COUNT: gl.constexpr, PROGRAMS: gl.constexpr):
    """Rows that belong to no group."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    columns = gl.arange(0, 512, layout)
    for row in range(gl.load(plan + COUNT) + gl.program_id(0), rows, PROGRAMS):
        at = y + gl.to_tensor(row).to(gl.int64) * width
        for start in range(0, width, 512):
            zeros = gl.zeros([512], y.dtype.element_ty, layout)
            gl.store(at + start + columns, zeros, mask=start + columns < width)


@gluon.jit(do_not_specialize=["rows", "x_stride"])
def ping_pong_rows_kernel(
    x, weights, bias, y, plan, rows, depth, width, x_stride,
    TRANSPOSED: gl.constexpr, COUNT: gl.constexpr, PROGRAMS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `persistent_rows_kernel`."""
    dtype: gl.constexpr = x.dtype.element_ty
    HALF: gl.constexpr = BLOCK_N // 2
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    x_rows = tma.make_tensor_descriptor(
        x, [rows, depth], [gl.to_tensor(x_stride).to(gl.int64) * 8, 1], [BLOCK_M, BLOCK_K], layout
    )
    tiles = tma.make_tensor_descriptor(y, [rows, width], [width, 1], [BLOCK_M, HALF], layout)
    if TRANSPOSED:
        stored = tma.make_tensor_descriptor(
            weights, [COUNT * width, depth], [depth, 1], [BLOCK_N, BLOCK_K], layout
        )
        ws = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], layout)
    else:
        stored = tma.make_tensor_descriptor(
            weights, [COUNT * depth, width], [width, 1], [BLOCK_K, BLOCK_N], layout
        )
        ws = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], layout)
    xs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], layout)
    out = gl.allocate_shared_memory(dtype, [2, BLOCK_M, HALF], layout)
    full, empty, turn = _barriers(STAGES)
    gl.warp_specialize(
        [
            (_multiply_rows, (
                tiles, y, bias, plan, xs, ws, out, full, empty, turn, depth, width,
                0, TRANSPOSED, COUNT, PROGRAMS, BLOCK_N, GROUP,
            )),
            (_multiply_rows, (
                tiles, y, bias, plan, xs, ws, out, full, empty, turn, depth, width,
                1, TRANSPOSED, COUNT, PROGRAMS, BLOCK_N, GROUP,
            )),
            (_load_rows, (
                x_rows, stored, plan, xs, ws, full, empty, depth, width,
                TRANSPOSED, COUNT, PROGRAMS, BLOCK_N, GROUP,
            )),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip
    _clear_rows(y, plan, rows, width, COUNT, PROGRAMS)


@gluon.jit
def _tile_of_weights(
    plan, tile, tiles_m, tiles_n, BLOCK_K: gl.constexpr, GROUP: gl.constexpr
):  # fmt: skip
    """(group, first row, end of the group's rows, steps, tile of rows, tile of columns)."""
    group, rest = tile // (tiles_m * tiles_n), tile % (tiles_m * tiles_n)
    head = rest // (GROUP * tiles_n) * GROUP
    height = min(tiles_m - head, GROUP)
    within = rest % (GROUP * tiles_n)
    start, end = gl.load(plan + group), gl.load(plan + group + 1)
    steps = (end - start + BLOCK_K - 1) // BLOCK_K
    return group, start, end, steps, head + within % height, within // height


@gluon.jit
def _load_weights(
    dy_rows, x_rows, plan, dys, xs, full, empty, width, depth,
    COUNT: gl.constexpr, PROGRAMS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = xs.type.shape[0]
    BLOCK_K: gl.constexpr = xs.type.shape[1]
    BLOCK_M: gl.constexpr = dys.type.shape[2]
    BLOCK_N: gl.constexpr = xs.type.shape[2]
    tiles_m, tiles_n = gl.cdiv(width, BLOCK_M), gl.cdiv(depth, BLOCK_N)
    index = 0
    for tile in range(gl.program_id(0), COUNT * tiles_m * tiles_n, PROGRAMS):
        _, start, _, steps, m, n = _tile_of_weights(plan, tile, tiles_m, tiles_n, BLOCK_K, GROUP)
        for k in range(0, steps):
            s = index % STAGES
            row = start + k * BLOCK_K
            mbarrier.wait(empty.index(s), ((index // STAGES) & 1) ^ 1)
            bar = full.index(s)
            mbarrier.expect(bar, dy_rows.block_type.nbytes + x_rows.block_type.nbytes)
            _copy_in(dy_rows, [row, m * BLOCK_M], bar, dys.index(s))
            _copy_in(x_rows, [row, n * BLOCK_N], bar, xs.index(s))
            index += 1


@gluon.jit
def _clear_from(tile, row):
    """Rows of a copied tile that belong to the next group become 0."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [gl.num_warps(), 1], [1, 0])
    values = tile.load(layout)
    rows = gl.arange(0, tile.type.shape[0], gl.SliceLayout(1, layout))
    tile.store(gl.where((rows < row)[:, None], values, gl.zeros_like(values)))


@gluon.jit
def _multiply_weights(
    tiles, dweights, plan, dys, xs, out, full, empty, turn, width, depth,
    WHICH: gl.constexpr, COUNT: gl.constexpr, PROGRAMS: gl.constexpr, WHOLE: gl.constexpr,
    GROUP: gl.constexpr,
):  # fmt: skip
    STAGES: gl.constexpr = xs.type.shape[0]
    BLOCK_K: gl.constexpr = xs.type.shape[1]
    BLOCK_M: gl.constexpr = dys.type.shape[2]
    BLOCK_N: gl.constexpr = xs.type.shape[2]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    tiles_m, tiles_n = gl.cdiv(width, BLOCK_M), gl.cdiv(depth, BLOCK_N)
    index = 0
    for tile in range(gl.program_id(0) + WHICH * PROGRAMS, COUNT * tiles_m * tiles_n, 2 * PROGRAMS):
        if tile >= PROGRAMS:  # the other's tile
            _, _, _, passed, _, _ = _tile_of_weights(
                plan, tile - PROGRAMS, tiles_m, tiles_n, BLOCK_K, GROUP
            )
            index += passed
        group, start, end, steps, m, n = _tile_of_weights(
            plan, tile, tiles_m, tiles_n, BLOCK_K, GROUP
        )
        whole = (end - start) // BLOCK_K
        acc = warpgroup_mma_init(gl.zeros((BLOCK_M, BLOCK_N), gl.float32, layout))
        mbarrier.wait(turn.index(WHICH), (tile // (2 * PROGRAMS) & 1) ^ (1 - WHICH))
        for k in range(0, whole):
            _wait_for_tile(full, index, STAGES)
            a = dys.index(index % STAGES).permute((1, 0))
            acc = warpgroup_mma(a, xs.index(index % STAGES), acc, is_async=True)
            acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
            _free_before(empty, index, STAGES, k > 0)
            index += 1
        total = warpgroup_mma_wait(0, deps=[acc])
        _free_before(empty, index, STAGES, whole > 0)
        if steps > whole:
            _wait_for_tile(full, index, STAGES)
            _clear_from(dys.index(index % STAGES), end - start - whole * BLOCK_K)
            _clear_from(xs.index(index % STAGES), end - start - whole * BLOCK_K)
            fence_async_shared()
            a = dys.index(index % STAGES).permute((1, 0))
            total = warpgroup_mma(a, xs.index(index % STAGES), total)
            index += 1
            _free_before(empty, index, STAGES)
        mbarrier.arrive(turn.index(1 - WHICH), count=1)
        row, col = m * BLOCK_M, n * BLOCK_N
        if WHOLE:
            _store_tile(tiles, total, out.index(WHICH), group * width + row, col)
        else:  # the next group's weights are no part of it
            own = dweights + gl.to_tensor(group).to(gl.int64) * width * depth
            _store_part(own, total, out.index(WHICH), row, width, col, depth)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "dy_stride", "x_stride"])
def ping_pong_weights_kernel(
    dy, x, dweights, plan, rows, width, depth, dy_stride, x_stride,
    COUNT: gl.constexpr, PROGRAMS: gl.constexpr, WHOLE: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """As `persistent_weights_kernel`."""
    dtype: gl.constexpr = x.dtype.element_ty
    HALF: gl.constexpr = BLOCK_N // 2
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    kept: gl.constexpr = gl.NVMMASharedLayout(128, dweights.dtype.element_ty.primitive_bitwidth, 2)
    dy_rows = tma.make_tensor_descriptor(
        dy, [rows, width], [gl.to_tensor(dy_stride).to(gl.int64) * 8, 1], [BLOCK_K, BLOCK_M], layout
    )
    x_rows = tma.make_tensor_descriptor(
        x, [rows, depth], [gl.to_tensor(x_stride).to(gl.int64) * 8, 1], [BLOCK_K, BLOCK_N], layout
    )
    tiles = tma.make_tensor_descriptor(
        dweights, [COUNT * width, depth], [depth, 1], [BLOCK_M, HALF], kept
    )
    dys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_M], layout)
    xs = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], layout)
    out = gl.allocate_shared_memory(dweights.dtype.element_ty, [2, BLOCK_M, HALF], kept)
    full, empty, turn = _barriers(STAGES)
    gl.warp_specialize(
        [
            (_multiply_weights, (
                tiles, dweights, plan, dys, xs, out, full, empty, turn, width, depth,
                0, COUNT, PROGRAMS, WHOLE, GROUP,
            )),
            (_multiply_weights, (
                tiles, dweights, plan, dys, xs, out, full, empty, turn, width, depth,
                1, COUNT, PROGRAMS, WHOLE, GROUP,
            )),
            (_load_weights, (
                dy_rows, x_rows, plan, dys, xs, full, empty, width, depth, COUNT, PROGRAMS, GROUP,
            )),
        ],
        [4, 1], [232, 40],
    )  # fmt: skip
