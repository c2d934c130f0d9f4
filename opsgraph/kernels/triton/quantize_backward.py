"""The gradient of an activation, quantized, with the bias gradient and the activation again."""

from collections.abc import Callable, Collection
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ..configs import around, configured
from ..formats import BLOCKS, E5M2, NVFP4, Copies, Format, Target, alike, check
from ..lazy import Lazy
from . import functions, nvfp4, persistent
from .activations import FUSION, _output_width
from .launch import (
    ceil_div,
    launch,
    on_device_of,
    row_major,
    stride_unit,
    sum_partials,
)
from .quantize import Output, constants, fours, in_pairs, new_output, paired_blocks
from .quantize_gradients import activation_backward_blocks_kernel, activation_backward_kernel

once = Lazy("triton.quantize_once")

CONFIG = {"R": 64, "C": 64, "TILES": 1, "STAGES": 1, "num_warps": 8}
AMAX_CONFIG = {"R": 8, "C": 256, "TILES": 8, "STAGES": 1, "num_warps": 8}
"""Where amaxes are all that is wanted, and nothing is stored by columns."""
BLOCKS_CONFIG = {"R": 4, "STAGES": 1, "num_warps": 1}
"""Of one warp, which then has all amaxes of its columns."""
REGISTERS, BLOCKS_REGISTERS = 64, 128
"""Of a thread, of 16 bits a value and without sums: measured on an H200."""
ONCE_CONFIG = {"num_warps": 8, "maxnreg": 128}
"""Two programs have all registers of a multiprocessor, and all of its shared memory."""


@cache
def _configs(
    scaling: str, stored: bool, summed: bool, amax: bool, *key: Any
) -> tuple[dict[str, int], ...]:
    summed = summed and scaling not in ("blocks", "square")
    if not (stored or summed):
        return around(AMAX_CONFIG, R=(4, 16), TILES=(4, 16), num_warps=(4, 8))
    return around(_bounded(CONFIG, REGISTERS, summed, key), R=(16, 64), num_warps=(2, 8))


@cache
def _blocks_configs(
    scaling: str, stored: bool, summed: bool, *key: Any
) -> tuple[dict[str, int], ...]:
    usual = _bounded(BLOCKS_CONFIG, BLOCKS_REGISTERS, summed, key)
    return around(usual, R=(2, 8), num_warps=(1, 4))


def _bounded(
    usual: dict[str, int], registers: int, summed: bool, key: tuple[Any, ...]
) -> dict[str, int]:
    bounded = not summed and key[-1].itemsize == 2 and torch.version.hip is None
    return usual | {"maxnreg": registers} if bounded else usual


def activation_backward_quantize(
    dy: Tensor, x: Tensor, kind: str, to: Target, params: tuple[float, ...] = (),
    scale: Tensor | None = None, want: Collection[str] = ("row",),
    y_to: Target | None = None, y_scale: Tensor | None = None, y_want: Collection[str] = (),
    dbias: torch.dtype | None = None,
) -> tuple[Copies, Copies, Tensor | None]:  # fmt: skip
    """`activation_backward` with dx and y quantized instead of stored: (dx, y, dbias).

    dx and y, the activation computed again, are rounded to x's dtype before they are quantized: dx
    as `to`, y as y_to (None: as `to`), which must be `alike`; want and y_want say which copies
    ("row", "col", "amax"). Scaling "tensor" without a scale, and NVFP4, read dy and x twice, as in
    `quantize`; "rows" is not there.
    dbias: the dtype in which to return the column sums of the unrounded dx, in fp32 and in a fixed
    order: over up to 128 rows, then over those sums.
    Raises ValueError, also where a block would hold columns of both halves of a gated dx.
    """
    flags, y_to = dict(functions.constants(kind, params)), y_to or to
    flags["WIDTH"] = width = _output_width(x, kind, flags["GATED"])
    check(to, scale, want)
    check(y_to, y_scale, y_want)
    if not alike(to, y_to):
        raise ValueError(
            f"got {to} and {y_to}, expected two that differ in dtype or rounding alone"
        )
    block = nvfp4.BLOCK if isinstance(to, NVFP4) else BLOCKS[to.scaling]
    if flags["GATED"] and width % block:
        raise ValueError(f"{kind} has halves of {width} columns, expected a multiple of {block}")
    dy, x = row_major(dy), row_major(x)
    if isinstance(to, NVFP4):
        assert isinstance(y_to, NVFP4)
        return nvfp4.backward_copies(dy, x, flags, to, want, y_to, y_want, dbias)
    assert isinstance(y_to, Format)
    if to.scaling == "rows":
        raise ValueError("an activation's gradient cannot be scaled by rows in one pass")
    rows, total = x.shape
    want = {"row", "col", "amax", "amaxes"}.intersection(want)
    current = Output(amax=to.scaling == "tensor" and scale is None and bool(want))
    y_current = Output(amax=to.scaling == "tensor" and y_scale is None and bool(y_want))
    amax, y_amax, _ = _run(dy, x, flags, to, y_to.dtype, current, y_current)
    dx = new_output(rows, total, to, x, scale, want, amax)
    y = new_output(rows, width, y_to, x, y_scale, y_want, y_amax)
    found, y_found, bias = _run(dy, x, flags, to, y_to.dtype, dx, y, dbias)
    return (
        dx.copies(want, found if dx.amax else amax),
        y.copies(y_want, y_found if y.amax else y_amax),
        bias,
    )


def _run(
    dy: Tensor, x: Tensor, flags: dict[str, Any], to: Format, y_dtype: torch.dtype, dx: Output,
    y: Output, dbias: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """One reading, if anything is asked for, of blocks two; the amaxes and the bias gradient."""
    if not (dx.asked() or y.asked() or dbias is not None):
        return None, None, None
    stored = any(copy is not None for output in (dx, y) for copy in (output.row, output.col))
    passes, width = (stored, dbias is not None, dx.amax or y.amax), flags["WIDTH"]
    if dbias is None and _in_one_reading(dy, x, width, to, dx):
        _run_once(dy, x, flags, to, y_dtype, dx, y)
        return None, None, None
    key = to.scaling, *passes, width, flags["GATED"], x.dtype
    run = partial(_launch, dy, x, flags, to, y_dtype)
    if to.scaling in ("blocks", "square"):
        return None, None, _run_blocks(run, key, x, width, to, dx, y, dbias)
    options = configured("activation_backward_quantize", key, _configs)
    down = ceil_div(x.size(0), options["R"] * options["TILES"])
    programs = down * ceil_div(width, options["C"])
    new = torch.empty if x.numel() else torch.zeros
    amaxes, y_amaxes = (
        new(max(1, programs), dtype=torch.float32, device=x.device) if output.amax else None
        for output in (dx, y)
    )
    bias, sums = _sums(x, down * options["TILES"], dbias)
    with on_device_of(x):
        if x.numel():
            given = *dx.operands(amaxes), *y.operands(y_amaxes), sums
            run(activation_backward_kernel, programs, given, _with_fours(options, x, to, dx, y))
            sum_partials(sums, bias, None, None)
        return dx.found(amaxes), y.found(y_amaxes), bias


def _in_one_reading(dy: Tensor, x: Tensor, width: int, to: Format, dx: Output) -> bool:
    """Whether `quantize_once` makes the copies: on Hopper, if columns of dx are among them."""
    hopper = not torch.version.hip and persistent.chip(x.device) == 9
    taken = hopper and persistent.paired() and paired_blocks(to) and dx.col is not None
    bf16 = dy.dtype == x.dtype == torch.bfloat16
    whole = x.size(0) % 16 == 0 and width % BLOCKS[to.scaling] == 0
    return taken and bf16 and whole and stride_unit(dy, x) == 8


def _run_once(
    dy: Tensor, x: Tensor, flags: dict[str, Any], to: Format, y_dtype: torch.dtype, dx: Output,
    y: Output,
) -> None:  # fmt: skip
    rows, width, block = x.size(0), flags["WIDTH"], BLOCKS[to.scaling]
    if rows * width:
        with on_device_of(x):
            launch(
                once.activation_backward_once_kernel, (ceil_div(rows, block) * (width // block),),
                dy, x, *dx.blocks(), *y.blocks(), rows // 16, dy.stride(0) // 8, x.stride(0) // 8,
                **flags, E5M2=to.dtype == E5M2, Y_E5M2=y_dtype == E5M2, **ONCE_CONFIG, **FUSION,
            )  # fmt: skip


def _run_blocks(
    run: Callable[..., None], key: Any, x: Tensor, width: int, to: Format, dx: Output, y: Output,
    dbias: torch.dtype | None,
) -> Tensor | None:  # fmt: skip
    """Scales and row copies of "blocks", then what needs the scales of whole blocks."""
    rows, block, square = x.size(0), BLOCKS[to.scaling], to.scaling == "square"
    down = ceil_div(rows, block)
    bias, sums = _sums(x, down, dbias)
    if x.numel():
        with on_device_of(x):
            options = configured("activation_backward_blocks", key, _blocks_configs)
            columns, y_columns = (
                None
                if square or output.col is None
                else torch.empty(down, output.col[0].size(0), dtype=torch.float32, device=x.device)
                for output in (dx, y)
            )
            given = *dx.scales(), columns, *y.scales(), y_columns, sums
            programs = down * ceil_div(width, block)
            pairs = {"PAIRS": paired_blocks(to) and width % block == 0 and in_pairs(x)}
            run(activation_backward_blocks_kernel, programs, given, options | pairs)
            rest = *dx.known(square, columns), *y.known(square, y_columns), None
            if any(operand is not None for operand in rest):
                options = configured("activation_backward_quantize", key, _configs)
                programs = ceil_div(rows, options["R"]) * ceil_div(width, options["C"])
                run(activation_backward_kernel, programs, rest, _with_fours(options, x, to, dx, y))
            sum_partials(sums, bias, None, None)
    return bias


def _sums(x: Tensor, tiles: int, dbias: torch.dtype | None) -> tuple[Tensor | None, Tensor | None]:
    """Memory for the bias gradient, and for its partial sums over tiles."""
    if dbias is None:
        return None, None
    new, total = torch.empty if x.numel() else torch.zeros, x.size(1)
    bias = new(total, dtype=dbias, device=x.device)
    return bias, torch.empty(tiles, total, dtype=torch.float32, device=x.device)


def _with_fours(
    options: dict[str, int], x: Tensor, to: Format, dx: Output, y: Output
) -> dict[str, int]:
    """The options of `activation_backward_kernel`."""
    words = to.scaling != "mx" and (dx.col is not None or y.col is not None)
    four = fours(x.size(0), options["R"] * options["C"], options["num_warps"], words)
    takes = to.scaling == "tensor" or (to.scaling == "blocks" and to.power_of_two)
    pairs = takes and four > 0 and in_pairs(x)
    return options | {"FOURS": four, "PAIRS": pairs}


def _launch(
    dy: Tensor, x: Tensor, flags: dict[str, Any], to: Format, y_dtype: torch.dtype,
    kernel: Any, programs: int, given: tuple[Tensor | None, ...], options: dict[str, int],
) -> None:  # fmt: skip
    unit, row_unit = stride_unit(dy, x), 16 if x.size(0) % 16 == 0 else 1
    launch(
        kernel, (programs,),
        dy, x, *given, x.size(0) // row_unit, dy.stride(0) // unit, x.stride(0) // unit,
        ROW_UNIT=row_unit, UNIT=unit, **flags, **constants(to, x.device),
        Y_E5M2=y_dtype == E5M2, SCALING=to.scaling, BLOCK=BLOCKS[to.scaling], **options, **FUSION,
    )  # fmt: skip
