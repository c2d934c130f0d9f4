"""Products of groups of rows on Hopper: as many programs as run at once make tile after tile.

One launch makes a schedule: where each group starts, and a table of tiles. It stays on the device,
so that the host waits for nothing. Operands come through descriptors that the kernels make
themselves (`tl.make_tensor_descriptor`): copies of whole tiles that need few registers. `why_not`
says for which operands there are none; `grouped` has kernels for all.
"""

from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import Config, configured
from ..lazy import Lazy
from . import interpreting
from .gemm import precision
from .launch import ceil_div, launch, multiprocessors, on_device_of

ping_pong = Lazy("triton.ping_pong")

TILE = 128
"""Rows of a tile."""
DEPTH = 64
"""Of a step of the main loop."""


class Schedule(NamedTuple):
    """Where groups start, how many tiles there are, and each tile's group, first row and end."""

    plan: Tensor
    """int32: `[groups + 1]`, `[]`, `[tiles, 3]`. Its beginning serves as offsets."""
    groups: int
    tile: int


@triton.jit(do_not_specialize=["rows"])
def schedule_kernel(
    given, plan, rows,
    SIZES: tl.constexpr, COUNT: tl.constexpr, SLOTS: tl.constexpr, TILE: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """Program g writes what concerns group g. given: SIZES of groups, or else their offsets."""
    group = tl.program_id(0)
    index = tl.arange(0, SLOTS)
    if SIZES:
        size = tl.load(given + index, index < COUNT, other=0).to(tl.int64)
        end = tl.cumsum(size, 0)
        start = end - size
    else:
        start = tl.load(given + index, index < COUNT, other=0).to(tl.int64)
        end = tl.load(given + index + 1, index < COUNT, other=0).to(tl.int64)
    start = tl.maximum(tl.minimum(start, rows), 0).to(tl.int32)
    end = tl.maximum(tl.minimum(end, rows).to(tl.int32), start)
    tiles = tl.where(index < COUNT, (end - start + TILE - 1) // TILE, 0)
    before = tl.sum(tl.where(index < group, tiles, 0), 0)
    own_start = tl.sum(tl.where(index == group, start, 0), 0)
    own_end = tl.sum(tl.where(index == group, end, 0), 0)
    own = (own_end - own_start + TILE - 1) // TILE
    tl.store(plan + group, own_start)
    if group == COUNT - 1:
        tl.store(plan + COUNT, own_end)
        tl.store(plan + COUNT + 1, before + own)
    for first in tl.range(0, own, LANES):
        k = first + tl.arange(0, LANES)
        at = plan + COUNT + 2 + (before + k) * 3
        tl.store(at, tl.zeros([LANES], tl.int32) + group, k < own)
        tl.store(at + 1, own_start + k * TILE, k < own)
        tl.store(at + 2, tl.zeros([LANES], tl.int32) + own_end, k < own)


@triton.jit
def _step(a, b, total, PRECISION: tl.constexpr):
    if PRECISION == "widened":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    return tl.dot(a, b, total)


@triton.jit
def _store(out, total, row, col, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr):
    """A whole tile by a descriptor, in parts of columns that take little shared memory."""
    if PARTS == 1:
        out.store([row, col], total.to(out.dtype))
    else:
        half: tl.constexpr = COLUMNS // 2
        one, two = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, half]), [0, 2, 1]))
        _store(out, one, row, col, ROWS, half, PARTS // 2)
        _store(out, two, row, col + half, ROWS, half, PARTS // 2)


@triton.jit
def _store_rows(
    tiles, y, bias, total, first, end, group, col, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """As `_store`, with the bias; by pointers where the group fills the tile in part."""
    if PARTS > 1:
        half: tl.constexpr = COLUMNS // 2
        parts = tl.split(tl.permute(tl.reshape(total, [ROWS, 2, half]), [0, 2, 1]))
        for i in tl.static_range(2):
            _store_rows(
                tiles, y, bias, parts[i], first, end, group, col + i * half, width,
                ROWS, half, PARTS // 2, WHOLE,
            )  # fmt: skip
    else:
        if bias is not None:
            cols = col + tl.arange(0, COLUMNS)[None, :]
            added = tl.load(bias + group * width + cols, cols < width, other=0.0)
            total += added.to(tl.float32)
        if WHOLE:
            tiles.store([first, col], total.to(y.dtype.element_ty))
        else:
            row = first + tl.arange(0, ROWS)[:, None]
            cols = col + tl.arange(0, COLUMNS)[None, :]
            out = y + row.to(tl.int64) * width + cols
            tl.store(out, total.to(y.dtype.element_ty), (row < end) & (cols < width))


@triton.jit(do_not_specialize=["rows", "x_stride"])
def persistent_rows_kernel(
    x, weights, bias, y, plan, rows, depth, width, x_stride,
    TRANSPOSED: tl.constexpr, COUNT: tl.constexpr, PROGRAMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr, FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `grouped_rows_kernel`. x_stride: in units of 8."""
    x_rows = tl.make_tensor_descriptor(
        x, [rows, depth], [x_stride.to(tl.int64) * 8, 1], [BLOCK_M, BLOCK_K]
    )
    y_tiles = tl.make_tensor_descriptor(y, [rows, width], [width, 1], [BLOCK_M, BLOCK_N // PARTS])
    if TRANSPOSED:
        stored = tl.make_tensor_descriptor(
            weights, [COUNT * width, depth], [depth, 1], [BLOCK_N, BLOCK_K]
        )
    else:
        stored = tl.make_tensor_descriptor(
            weights, [COUNT * depth, width], [width, 1], [BLOCK_K, BLOCK_N]
        )
    tiles_m = tl.load(plan + COUNT + 1)
    tiles_n = tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=FLATTEN):
        head = tile // (GROUP * tiles_n) * GROUP
        height = tl.minimum(tiles_m - head, GROUP)
        within = tile % (GROUP * tiles_n)
        at = plan + COUNT + 2 + (head + within % height) * 3
        col = within // height * BLOCK_N
        group, first, end = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, depth, BLOCK_K):
            a = x_rows.load([first, k])
            if TRANSPOSED:
                b = stored.load([group * width + col, k]).T
            else:
                b = stored.load([group * depth + k, col])
            total = _step(a, b, total, PRECISION)
        # In one branch or the other: flattened, the loop can have no more after the inner one.
        if first + BLOCK_M <= end:
            _store_rows(
                y_tiles, y, bias, total, first, end, group, col, width, BLOCK_M, BLOCK_N, PARTS,
                True,
            )  # fmt: skip
        else:
            _store_rows(
                y_tiles, y, bias, total, first, end, group, col, width, BLOCK_M, BLOCK_N, PARTS * 4,
                False,
            )  # fmt: skip
    # Rows that belong to no group.
    beyond = tl.load(plan + COUNT) + tl.program_id(0)
    for left in tl.range(beyond, rows, PROGRAMS):
        out = y + (left + tl.zeros([BLOCK_N], tl.int64)) * width
        for start in tl.range(0, width, BLOCK_N):
            cols = start + tl.arange(0, BLOCK_N)
            tl.store(out + cols, tl.zeros([BLOCK_N], y.dtype.element_ty), cols < width)


@triton.jit(do_not_specialize=["rows", "dy_stride", "x_stride"])
def persistent_weights_kernel(
    dy, x, dweights, plan, rows, width, depth, dy_stride, x_stride,
    COUNT: tl.constexpr, PROGRAMS: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """As `grouped_weights_kernel`. WHOLE: BLOCK_M divides width. Strides: in units of 8."""
    dy_step, x_step = dy_stride.to(tl.int64) * 8, x_stride.to(tl.int64) * 8
    dy_rows = tl.make_tensor_descriptor(dy, [rows, width], [dy_step, 1], [BLOCK_K, BLOCK_M])
    x_rows = tl.make_tensor_descriptor(x, [rows, depth], [x_step, 1], [BLOCK_K, BLOCK_N])
    tiles = tl.make_tensor_descriptor(
        dweights, [COUNT * width, depth], [depth, 1], [BLOCK_M, BLOCK_N // PARTS]
    )
    tiles_m, tiles_n = tl.cdiv(width, BLOCK_M), tl.cdiv(depth, BLOCK_N)
    for tile in tl.range(tl.program_id(0), COUNT * tiles_m * tiles_n, PROGRAMS):
        group = tile // (tiles_m * tiles_n)
        rest = tile % (tiles_m * tiles_n)
        head = rest // (GROUP * tiles_n) * GROUP
        height = tl.minimum(tiles_m - head, GROUP)
        within = rest % (GROUP * tiles_n)
        n = (head + within % height) * BLOCK_M
        k = within // height * BLOCK_N
        ns, ks = n + tl.arange(0, BLOCK_M), k + tl.arange(0, BLOCK_N)
        start, end = tl.load(plan + group), tl.load(plan + group + 1)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        whole = start + (end - start) // BLOCK_K * BLOCK_K
        for row in range(start, whole, BLOCK_K):
            total = _step(dy_rows.load([row, n]).T, x_rows.load([row, k]), total, PRECISION)
        if whole < end:  # the next group's rows are no part of it
            rest_rows = (whole + tl.arange(0, BLOCK_K))[:, None]
            there = rest_rows < end
            at = rest_rows.to(tl.int64)
            a = tl.load(dy + at * dy_step + ns[None, :], there & (ns < width)[None, :], other=0.0)
            b = tl.load(x + at * x_step + ks[None, :], there & (ks < depth)[None, :], other=0.0)
            total = _step(a.T, b, total, PRECISION)
        if WHOLE:
            _store(tiles, total, group * width + n, k, BLOCK_M, BLOCK_N, PARTS)
        else:  # the next group's weights are no part of it
            out = dweights + (group * width + ns).to(tl.int64)[:, None] * depth + ks[None, :]
            mask = (ns < width)[:, None] & (ks < depth)[None, :]
            tl.store(out, total.to(dweights.dtype.element_ty), mask)


@cache
def chip(device: torch.device) -> int:
    """Its generation; Hopper's for Triton's interpreter and where nothing runs."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def why_not(groups: int, rows: int, *operands: Tensor) -> str | None:
    """Why there is no persistent product of these, stored by rows, or None.

    The weights of all groups, or their gradient, are an operand of 3 dimensions.
    """
    first = operands[0]
    if first.dtype not in (torch.float16, torch.bfloat16):
        return "they multiply float16 and bfloat16 alone"
    if torch.version.hip or chip(first.device) != 9:
        return "they are for sm_90"
    if not hasattr(tl, "make_tensor_descriptor"):
        return "this Triton has no descriptors"
    if not 0 < groups <= 4096 or not 0 < rows < 2**31 - 2**16:
        return "of so many groups or rows there is no schedule"
    for operand in operands:
        if operand.size(-1) % 8 or operand.stride(-2) % 8 or operand.data_ptr() % 16:
            return "a row does not begin at a multiple of 16 bytes"
        if operand.stride(-1) != 1 or operand.stride(-2) < operand.size(-1):
            return "elements of a row are not adjacent, or rows overlap"
        if operand.dim() == 3 and operand.size(0) * operand.size(1) >= 2**31 - 2**16:
            return "descriptors count rows in 31 bits"
    return None


def schedule(given: Tensor, rows: int, sizes: bool) -> Schedule:
    """The schedule of `rows` rows. given: sizes of groups, or else offsets, as integers."""
    groups = given.size(0) - (not sizes)
    tiles = ceil_div(rows, TILE) + groups
    plan = torch.empty(groups + 2 + 3 * tiles, dtype=torch.int32, device=given.device)
    with on_device_of(given):
        launch(
            schedule_kernel, (groups,), given, plan, rows, SIZES=sizes, COUNT=groups,
            SLOTS=triton.next_power_of_2(groups), TILE=TILE, LANES=32, num_warps=4,
        )  # fmt: skip
    return Schedule(plan, groups, TILE)


@cache
def paired() -> bool:
    """Whether there are kernels in which two groups of warps take tiles in turn, see `ping_pong`.

    Triton's interpreter runs none that is written in Gluon.
    """
    return not interpreting() and find_spec("triton.experimental.gluon") is not None


PAIR: Config = {"GROUP": 8, "STAGES": 6, "num_warps": 4, "maxnreg": 168}
"""Of those: 12 warps with all of a multiprocessor's registers."""


def rows_options(depth: int, width: int, transposed: bool, pairs: bool) -> tuple[Config, ...]:
    """Configurations of a product of rows, the usual one first. pairs: what `paired` says."""
    wide = {"BLOCK_N": 256, "PARTS": 2, "GROUP": 8, "num_warps": 8}
    flat = wide | {"FLATTEN": True, "num_stages": 3}
    deep = wide | {"FLATTEN": False, "num_stages": 4}
    small = {
        "BLOCK_N": 128, "PARTS": 2, "GROUP": 8, "FLATTEN": False, "num_warps": 4, "num_stages": 3,
    }  # fmt: skip
    usual = (deep, flat) if depth > 4096 else (flat, deep)
    pair = {"BLOCK_N": 128} | PAIR | {"GROUP": 4 if depth > width else 8}
    return (*([pair] * pairs), *usual, small)


def weights_options(width: int, depth: int, pairs: bool) -> tuple[Config, ...]:
    """Configurations of a product of weights' gradients, the usual one first."""
    small = {"BLOCK_N": 128, "PARTS": 2, "GROUP": 8, "num_warps": 4, "num_stages": 3}
    wide = {"BLOCK_N": 256, "PARTS": 2, "GROUP": 8, "num_warps": 8, "num_stages": 4}
    return (*([{"BLOCK_N": 128} | PAIR] * pairs), small, wide)


def _common(x: Tensor, at: Schedule, options: Config) -> dict[str, Any]:
    """What all kernels are told, and how many programs there are: as many as run at once.

    On a multiprocessor that is two of 4 warps, one of 8 or of a pair.
    """
    common = {"COUNT": at.groups, "BLOCK_M": at.tile, "BLOCK_K": DEPTH, **options}
    if "STAGES" in options:
        return common | {"PROGRAMS": multiprocessors(x.device)}
    programs = multiprocessors(x.device) * (8 // int(options["num_warps"]))
    return common | {"PROGRAMS": programs, "PRECISION": precision(x.dtype)}


def _kernel(name: str, options: Config) -> Any:
    """The kernel that a configuration is for."""
    if "STAGES" in options:
        return getattr(ping_pong, f"ping_pong_{name}_kernel")
    return persistent_rows_kernel if name == "rows" else persistent_weights_kernel


def rows_product(
    x: Tensor, weights: Tensor, bias: Tensor | None, y: Tensor, at: Schedule, transposed: bool
) -> None:
    """`y = x @ weights[g]`, or `x @ weights[g].T` where TRANSPOSED, and the bias."""
    depth, width = x.size(1), y.size(1)
    options = configured("persistent_rows", (depth, width, transposed, paired()), rows_options)
    with on_device_of(x):
        constants = _common(x, at, options)
        launch(
            _kernel("rows", options), (constants["PROGRAMS"],), x, weights, bias, y, at.plan,
            x.size(0), depth, width, x.stride(0) // 8, TRANSPOSED=transposed, **constants,
        )  # fmt: skip


def weights_product(dy: Tensor, x: Tensor, dweights: Tensor, at: Schedule) -> None:
    """`dweights[g] = dy[g].T @ x[g]`."""
    width, depth = dy.size(1), x.size(1)
    options = configured("persistent_weights", (width, depth, paired()), weights_options)
    with on_device_of(x):
        constants = _common(x, at, options)
        if dweights.dtype == torch.float32:  # a tile takes twice the shared memory
            constants |= {"STAGES": 5} if "STAGES" in options else {"PARTS": 2 * options["PARTS"]}
        launch(
            _kernel("weights", options), (constants["PROGRAMS"],), dy, x, dweights, at.plan,
            x.size(0), width, depth, dy.stride(0) // 8, x.stride(0) // 8,
            WHOLE=width % at.tile == 0, **constants,
        )  # fmt: skip
