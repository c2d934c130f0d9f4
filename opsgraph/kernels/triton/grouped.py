"""Linear layers with a weight for each group of rows, all groups in one launch.

Group g is the rows `offsets[g]` to `offsets[g + 1]`. The offsets stay on the device: the grid is an
upper bound, and each program finds its group itself, so that the host waits for nothing. Rows of
the result that belong to no group are 0. Where they can, `persistent` kernels make the products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import persistent
from .gemm import multiply, product_options, swizzled
from .launch import ceil_div, launch, on_device_of, row_major, stride_unit
from .persistent import Schedule

MANY = 4096  # rows of a group, as far as the choice of a tile goes


@triton.jit
def _place(offsets, tile, rows, COUNT: tl.constexpr, SLOTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(group, first row, end of the group's rows) of a tile; group COUNT is the rows left over."""
    index = tl.arange(0, SLOTS)
    start = tl.minimum(tl.load(offsets + index, index <= COUNT, other=rows).to(tl.int64), rows)
    end = tl.load(offsets + index + 1, index < COUNT, other=rows).to(tl.int64)
    end = tl.maximum(tl.minimum(end, rows), start)
    tiles = tl.cdiv(end - start, BLOCK_M)
    before = tl.cumsum(tiles, 0) - tiles
    own = (before <= tile) & (tile < before + tiles)
    first = start + (tile - before) * BLOCK_M
    zeros = tl.zeros([SLOTS], tl.int64)
    group = tl.sum(tl.where(own, index, 0), 0)
    return group, tl.sum(tl.where(own, first, zeros), 0), tl.sum(tl.where(own, end, zeros), 0)


@triton.jit(do_not_specialize=["rows", "x_stride"])
def grouped_rows_kernel(
    x, weights, bias, y, offsets, rows, x_stride,
    UNIT: tl.constexpr, DEPTH: tl.constexpr, WIDTH: tl.constexpr, TRANSPOSED: tl.constexpr,
    COUNT: tl.constexpr, SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = x @ weight, weight `[DEPTH, WIDTH]`, or stored as `[WIDTH, DEPTH]` if TRANSPOSED."""
    tile_m, tile_n = swizzled(
        tl.program_id(0), tl.cdiv(rows, BLOCK_M) + COUNT, (WIDTH + BLOCK_N - 1) // BLOCK_N, GROUP
    )
    group, first, end = _place(offsets, tile_m, rows, COUNT, SLOTS, BLOCK_M)
    if first < end:
        row = first + tl.arange(0, BLOCK_M)
        cols = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        k = tl.arange(0, BLOCK_K)
        everywhere = tl.full([1, 1], True, tl.int1)
        weight = weights + tl.minimum(group, COUNT - 1).to(tl.int64) * (DEPTH * WIDTH)
        if TRANSPOSED:
            inside = everywhere
            weight += tl.minimum(cols, WIDTH - 1).to(tl.int64) * DEPTH + k[:, None]
        else:
            inside = cols < WIDTH
            weight += k[:, None].to(tl.int64) * WIDTH + cols
        total = multiply(
            x + tl.minimum(row, end - 1)[:, None] * x_stride * UNIT + k[None, :], weight,
            everywhere, inside, BLOCK_K, BLOCK_K if TRANSPOSED else BLOCK_K * WIDTH,
            tl.where(group < COUNT, DEPTH, 0),
            BLOCK_M, BLOCK_N, BLOCK_K, DEPTH % BLOCK_K == 0, PRECISION,
        )  # fmt: skip
        if bias is not None:
            there = cols < tl.where(group < COUNT, WIDTH, 0)
            total += tl.load(bias + group * WIDTH + cols, there, other=0.0).to(tl.float32)
        at = y + row[:, None] * WIDTH + cols
        tl.store(at, total.to(y.dtype.element_ty), (row < end)[:, None] & (cols < WIDTH))


@triton.jit(do_not_specialize=["rows", "dy_stride", "x_stride"])
def grouped_weights_kernel(
    dy, x, dweights, offsets, rows, dy_stride, x_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dweight = dy.T @ x of each group's rows; BLOCK_K rows at a time."""
    tiles_m: tl.constexpr = (WIDTH + BLOCK_M - 1) // BLOCK_M
    tiles_n: tl.constexpr = (DEPTH + BLOCK_N - 1) // BLOCK_N
    group = (tl.program_id(0) // (tiles_m * tiles_n)).to(tl.int64)
    tile_m, tile_n = swizzled(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP)
    start = tl.minimum(tl.load(offsets + group).to(tl.int64), rows)
    end = tl.minimum(tl.load(offsets + group + 1).to(tl.int64), rows)
    row = start + tl.arange(0, BLOCK_K)
    n = (tile_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    k = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    dy_step, x_step = dy_stride.to(tl.int64) * UNIT, x_stride.to(tl.int64) * UNIT
    total = multiply(
        dy + row[None, :] * dy_step + n, x + row[:, None] * x_step + k,
        n < WIDTH, k < DEPTH, BLOCK_K * dy_step, BLOCK_K * x_step, end - start,
        BLOCK_M, BLOCK_N, BLOCK_K, False, PRECISION,
    )  # fmt: skip
    at = dweights + group * (WIDTH * DEPTH) + n.to(tl.int64) * DEPTH + k
    tl.store(at, total.to(dweights.dtype.element_ty), (n < WIDTH) & (k < DEPTH))


Groups = Tensor | Schedule
"""Offsets `[groups + 1]`, or the schedule that several products of the same groups share."""


def groups_of(sizes: Tensor, x: Tensor) -> Groups:
    """The groups of x's rows, from their sizes: integers `[groups]` on any device."""
    sizes = sizes.to(x.device, non_blocking=True)
    if persistent.why_not(sizes.size(0), x.size(0), x) is None:
        return persistent.schedule(sizes.contiguous(), x.size(0), True)
    return torch.nn.functional.pad(sizes.cumsum(0, dtype=torch.int64), (1, 0))


def _offsets(groups: Groups) -> Tensor:
    if isinstance(groups, Schedule):
        return groups.plan[: groups.groups + 1]
    return groups.contiguous()


def _scheduled(groups: Groups, rows: int, *operands: Tensor) -> Schedule | None:
    """The schedule for a persistent product of operands; None where there is no such product."""
    count = groups.groups if isinstance(groups, Schedule) else groups.size(0) - 1
    if persistent.why_not(count, rows, *operands) is not None:
        return None
    if isinstance(groups, Schedule):
        return groups
    return persistent.schedule(groups.contiguous(), rows, False)


def _check(name: str, rows: tuple[Tensor, ...], weights: Tensor | None, groups: Groups) -> int:
    """How many groups there are.

    Raises ValueError unless dtypes, devices and the kinds of shapes fit together.
    """
    given = rows if weights is None else (*rows, weights)
    kinds = {(t.dtype, t.device) for t in given}
    offsets = groups.plan if isinstance(groups, Schedule) else groups
    if len(kinds) > 1 or any(t.dim() != 2 for t in rows) or offsets.device != rows[0].device:
        said = ", ".join(f"{list(t.shape)} {t.dtype} on {t.device}" for t in (*given, offsets))
        raise ValueError(f"{name} got {said}; expected one dtype and one device, rows of 2 dims")
    if weights is not None and weights.dim() != 3:
        raise ValueError(f"{name} got weights {list(weights.shape)}, expected 3 dimensions")
    count = groups.groups if isinstance(groups, Schedule) else groups.numel() - 1
    if offsets.dim() != 1 or count < 0 or offsets.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} got offsets {list(offsets.shape)} of {offsets.dtype}")
    if weights is not None and weights.size(0) != count:
        raise ValueError(f"{name} got {weights.size(0)} weights, expected one for {count} groups")
    return count


def _rows(
    x: Tensor, weights: Tensor, bias: Tensor | None, groups: Groups, transposed: bool
) -> Tensor:
    rows, depth = x.shape
    if not weights.is_contiguous() and weights.transpose(1, 2).is_contiguous():
        weights, transposed = weights.transpose(1, 2), not transposed  # read as they are stored
    count, width = weights.size(0), weights.size(1 if transposed else 2)
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    if not count:
        return y.zero_()
    x, weights = row_major(x), weights.contiguous()
    bias = None if bias is None else bias.contiguous()
    # Of a weight stored by depth, a step past its end would read the next group's.
    if transposed or depth % persistent.DEPTH == 0:
        at = _scheduled(groups, rows, x, weights, y)
        if at is not None:
            persistent.rows_product(x, weights, bias, y, at, transposed)
            return y
    offsets = _offsets(groups)
    unit = stride_unit(x)
    options = product_options(ceil_div(rows, count), width, x, depth)
    tiles = ceil_div(rows, options["BLOCK_M"]) + count
    with on_device_of(x):
        launch(
            grouped_rows_kernel, (tiles * ceil_div(width, options["BLOCK_N"]),),
            x, weights, bias, y, offsets, rows, x.stride(0) // unit,
            UNIT=unit, DEPTH=depth, WIDTH=width, TRANSPOSED=transposed, COUNT=count,
            SLOTS=triton.next_power_of_2(count + 1), **options,
        )  # fmt: skip
    return y


def grouped_linear(x: Tensor, weights: Tensor, bias: Tensor | None, offsets: Groups) -> Tensor:
    """`y = x @ weights[g].T + bias[g]` for the rows of each group g.

    x: `[rows, depth]`, fp32, fp16 or bf16; weights: `[groups, width, depth]` of x's dtype; bias:
    `[groups, width]` of any dtype, or None; offsets: `[groups + 1]`, int32 or int64, on x's device,
    starting at 0 and not falling, or what `groups_of` gives. Groups may be empty. Returns
    `[rows, width]` of x's dtype, summed in fp32, 0 in rows from offsets[-1] on. Raises ValueError
    for what does not fit.
    """
    _check("grouped_linear", (x,), weights, offsets)
    if weights.size(2) != x.size(1):
        raise ValueError(f"grouped_linear got x {list(x.shape)}, weights {list(weights.shape)}")
    if bias is not None and bias.shape != weights.shape[:2]:
        raise ValueError(f"got bias {list(bias.shape)}, expected {list(weights.shape[:2])}")
    return _rows(x, weights, bias, offsets, True)


def grouped_dgrad(dy: Tensor, weights: Tensor, offsets: Groups) -> Tensor:
    """`dx = dy @ weights[g]` for the rows of each group g, of dy's dtype; see `grouped_linear`."""
    _check("grouped_dgrad", (dy,), weights, offsets)
    if weights.size(1) != dy.size(1):
        raise ValueError(f"grouped_dgrad got dy {list(dy.shape)}, weights {list(weights.shape)}")
    return _rows(dy, weights, None, offsets, False)


def grouped_wgrad(
    dy: Tensor, x: Tensor, offsets: Groups, dtype: torch.dtype | None = None
) -> Tensor:
    """`dweights[g] = dy[g].T @ x[g]` of the rows of each group g; 0 for an empty one.

    dy: `[rows, width]`; x: `[rows, depth]`; the result is `[groups, width, depth]`, of a dtype, by
    default x's, each sum in fp32 and in a fixed order. Raises ValueError for what does not fit.
    """
    count = _check("grouped_wgrad", (dy, x), None, offsets)
    if dy.size(0) != x.size(0):
        raise ValueError(f"grouped_wgrad got {dy.size(0)} rows of dy and {x.size(0)} of x")
    width, depth = dy.size(1), x.size(1)
    dweights = torch.empty(count, width, depth, dtype=dtype or x.dtype, device=x.device)
    if not dweights.numel():
        return dweights
    if not x.size(0):
        return dweights.zero_()
    dy, x = row_major(dy), row_major(x)
    at = _scheduled(offsets, x.size(0), dy, x, dweights)
    if at is not None:
        persistent.weights_product(dy, x, dweights, at)
        return dweights
    offsets = _offsets(offsets)
    unit = stride_unit(dy, x)
    options = product_options(width, depth, x, MANY)
    tiles = ceil_div(width, options["BLOCK_M"]) * ceil_div(depth, options["BLOCK_N"])
    with on_device_of(x):
        launch(
            grouped_weights_kernel, (count * tiles,),
            dy, x, dweights, offsets, x.size(0), dy.stride(0) // unit, x.stride(0) // unit,
            UNIT=unit, WIDTH=width, DEPTH=depth, **options,
        )  # fmt: skip
    return dweights
