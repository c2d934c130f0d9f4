"""A product of FP8 with scales of blocks on Hopper; `block_product` says what it takes.

Two groups of four warps have 64 rows each of a tile of 128 x 128, and another warp copies operands
ahead of both. Tensor cores know no scales, so that a product of 128 of the depth is added, scaled,
to sums in fp32. A group starts the next one before: it has two accumulators. ptxas would wait for
each where an unfinished one crosses the end of a loop, so UNROLL steps stand without a jump, and a
group waits for all of its products after them.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .ping_pong import _barriers, _copy_in, _store_tile, _wait_for_tile
from .ping_pong_activation import _biased, _tile

BLOCK = gl.constexpr(128)
"""Rows and columns of a tile, and the depth of a step: a scale covers 128 of it."""
ROWS = gl.constexpr(64)
"""Of a tile, each group's."""


@gluon.jit
def _load(
    a_rows, b_rows, a_scales, xs, ws, scales, full, empty, rows, columns, depth,
    UNROLL: gl.constexpr, PROGRAMS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """One warp copies the operands of all tiles, and a's scales, as far ahead as there are stages.

    What lies beyond the operands is 0.
    """
    STAGES: gl.constexpr = ws.type.shape[0]
    tiles_m, tiles_n = gl.cdiv(rows, BLOCK), gl.cdiv(columns, BLOCK)
    index = 0
    for tile in range(gl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        _, row, _, n = _tile(None, tile, rows, tiles_m, tiles_n, 0, BLOCK, GROUP)
        for k in range(0, gl.cdiv(depth, UNROLL * BLOCK) * UNROLL):
            s = index % STAGES
            mbarrier.wait(empty.index(s), ((index // STAGES) & 1) ^ 1)
            bar = full.index(s)
            nbytes: gl.constexpr = (
                2 * a_rows.block_type.nbytes + b_rows.block_type.nbytes + a_scales.block_type.nbytes
            )
            mbarrier.expect(bar, nbytes)
            for i in gl.static_range(2):
                _copy_in(a_rows, [row + i * ROWS, k * BLOCK], bar, xs.index(s * 2 + i))
            _copy_in(b_rows, [n * BLOCK, k * BLOCK], bar, ws.index(s))
            _copy_in(a_scales, [k, row], bar, scales.index(s))
            index += 1


@gluon.jit
def _start(part, xs, ws, scales, full, index, WHICH: gl.constexpr):
    """Start the product of a step, in the registers of part. (It, a's scales of the step.)"""
    STAGES: gl.constexpr = ws.type.shape[0]
    s = index % STAGES
    _wait_for_tile(full, index, STAGES)
    # Before the start: at the product's end the stage is overwritten, and a warp's loads that came
    # after the start could still be on their way then. So a whole step lies between.
    scale = scales.index(s).slice(WHICH * ROWS, ROWS, dim=1).permute((1, 0)).load(part.type.layout)
    started = warpgroup_mma(
        xs.index(s * 2 + WHICH), ws.index(s).permute((1, 0)), warpgroup_mma_init(part),
        use_acc=False, is_async=True,
    )  # fmt: skip
    return started, scale


@gluon.jit
def _finish(started, scale, acc, empty, index, STAGES: gl.constexpr, LEFT: gl.constexpr):
    """Add a product to acc, while LEFT others go on. (acc, the registers of the product.)

    Both pass the last wait, so that the sum is done before a product is started in its registers.
    """
    part = warpgroup_mma_wait(LEFT, deps=[started])
    mbarrier.arrive(empty.index(index % STAGES), count=1)
    acc += part * scale
    return warpgroup_mma_wait(LEFT, deps=[acc, part])


@gluon.jit
def _multiply(
    tiles, b_scale, bias, xs, ws, scales, out, full, empty, rows, columns, depth, b_stride,
    WHICH: gl.constexpr, UNROLL: gl.constexpr, PROGRAMS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """Four warps make a half of each tile of a program."""
    STAGES: gl.constexpr = ws.type.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    tiles_m, tiles_n = gl.cdiv(rows, BLOCK), gl.cdiv(columns, BLOCK)
    blocks = gl.cdiv(depth, BLOCK)
    index = 0
    even = gl.zeros((ROWS, BLOCK), gl.float32, layout)
    odd = gl.zeros((ROWS, BLOCK), gl.float32, layout)
    for tile in range(gl.program_id(0), tiles_m * tiles_n, PROGRAMS):
        _, row, _, n = _tile(None, tile, rows, tiles_m, tiles_n, 0, BLOCK, GROUP)
        acc = gl.zeros((ROWS, BLOCK), gl.float32, layout)
        for k in range(0, blocks, UNROLL):
            started, scale = _start(even, xs, ws, scales, full, index, WHICH)
            for i in gl.static_range(UNROLL):
                factor = gl.load(b_scale + n * b_stride + k + i, mask=k + i < blocks, other=0.0)
                if i + 1 < UNROLL:
                    following, its = _start(odd, xs, ws, scales, full, index + 1, WHICH)
                    acc, even = _finish(started, scale * factor, acc, empty, index, STAGES, 1)
                    started, scale = following, its
                else:
                    acc, even = _finish(started, scale * factor, acc, empty, index, STAGES, 0)
                even, odd = odd, even
                index += 1
        acc = _biased(acc, bias, n * BLOCK, columns)
        _store_tile(tiles, acc, out.index(WHICH), row + WHICH * ROWS, n * BLOCK)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["rows", "a_stride", "b_stride"])
def block_product_kernel(
    a, b, a_scale, b_scale, bias, y, rows, columns, depth, a_stride, b_stride,
    UNROLL: gl.constexpr, PROGRAMS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """`y = a @ b.T + bias`. a: `[rows, depth]`; b: `[columns, depth]`; both by rows.

    a_scale: `[blocks of depth, a_stride]`, of each row; b_scale: `[blocks of columns, b_stride]`.
    """
    stored: gl.constexpr = gl.NVMMASharedLayout(128, 8, 2)
    plain: gl.constexpr = gl.NVMMASharedLayout(0, 32, 2)
    kept: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_rows = tma.make_tensor_descriptor(a, [rows, depth], [depth, 1], [ROWS, BLOCK], stored)
    b_rows = tma.make_tensor_descriptor(b, [columns, depth], [depth, 1], [BLOCK, BLOCK], stored)
    a_scales = tma.make_tensor_descriptor(
        a_scale, [gl.cdiv(depth, BLOCK), a_stride], [a_stride, 1], [1, BLOCK], plain
    )
    tiles = tma.make_tensor_descriptor(y, [rows, columns], [columns, 1], [ROWS, BLOCK // 2], kept)
    xs = gl.allocate_shared_memory(a.dtype.element_ty, [2 * STAGES, ROWS, BLOCK], stored)
    ws = gl.allocate_shared_memory(b.dtype.element_ty, [STAGES, BLOCK, BLOCK], stored)
    scales = gl.allocate_shared_memory(gl.float32, [STAGES, 1, BLOCK], plain)
    out = gl.allocate_shared_memory(y.dtype.element_ty, [2, ROWS, BLOCK // 2], kept)
    full, empty, _ = _barriers(STAGES, 2)
    gl.warp_specialize(
        [
            (_multiply, (
                tiles, b_scale, bias, xs, ws, scales, out, full, empty, rows, columns, depth,
                b_stride, 0, UNROLL, PROGRAMS, GROUP,
            )),
            (_multiply, (
                tiles, b_scale, bias, xs, ws, scales, out, full, empty, rows, columns, depth,
                b_stride, 1, UNROLL, PROGRAMS, GROUP,
            )),
            (_load, (
                a_rows, b_rows, a_scales, xs, ws, scales, full, empty, rows, columns, depth,
                UNROLL, PROGRAMS, GROUP,
            )),
        ],
        [4, 1], [240, 24],
    )  # fmt: skip
