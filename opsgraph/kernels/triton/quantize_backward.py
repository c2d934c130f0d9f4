"""The gradient of an activation, quantized, with the bias gradient and the activation again."""

from collections.abc import Collection
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..configs import around, configured
from ..formats import BLOCKS, E5M2, NVFP4, Copies, Format, Target, alike, check
from . import functions, nvfp4
from .activations import FUSION, _output_width
from .launch import (
    ceil_div,
    launch,
    on_device_of,
    row_major,
    stride_unit,
    sum_partials,
)
from .quantize import Output, constants, new_output
from .quantize_gradients import activation_backward_blocks_kernel, activation_backward_kernel

CONFIG = {"R": 64, "C": 64, "TILES": 1, "STAGES": 1, "num_warps": 8}
SUM_CONFIG = CONFIG | {"R": 32, "num_warps": 4}
"""With a bias gradient: sums over a tile's columns take registers of their own."""
AMAX_CONFIG = {"R": 8, "C": 256, "TILES": 16, "STAGES": 2, "num_warps": 4}
"""Where amaxes are all that is wanted, and nothing is stored by columns."""
BLOCKS_CONFIG = {"R": 16, "COL_R": 32, "STAGES": 3, "num_warps": 4}
SQUARE_CONFIG = BLOCKS_CONFIG | {"STAGES": 1, "num_warps": 8}


@cache
def _configs(scaling: str, stored: bool, summed: bool, *key: Any) -> tuple[dict[str, int], ...]:
    if scaling in ("blocks", "square"):
        usual = BLOCKS_CONFIG if scaling == "blocks" else SQUARE_CONFIG
        if key[-1] == torch.float32:  # more would not fit into the 99 KiB of sm_89 and sm_120
            usual = usual | {"STAGES": min(2, usual["STAGES"])}
        return around(usual, R=(8, 32), COL_R=(16, 64), STAGES=(1, 3), num_warps=(4, 16))
    if summed:
        return around(SUM_CONFIG, R=(32, 64), num_warps=(4, 16))
    if not stored:
        return around(AMAX_CONFIG, R=(4, 16), TILES=(8, 32), num_warps=(4, 8))
    return around(CONFIG, num_warps=(4, 16))


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
    """One launch, if anything is asked for; returns the amaxes and the bias gradient."""
    if not (dx.asked() or y.asked() or dbias is not None):
        return None, None, None
    rows, total = x.shape
    blocks = to.scaling in ("blocks", "square")
    stored = any(copy is not None for output in (dx, y) for copy in (output.row, output.col))
    block = BLOCKS[to.scaling]
    passes = stored, dbias is not None, dx.amax or y.amax
    key = to.scaling, *passes, flags["WIDTH"], flags["GATED"], x.dtype
    options = configured("activation_backward_quantize", key, _configs)
    height = block if blocks else options["R"] * options["TILES"]
    down, across = (
        ceil_div(rows, height),
        ceil_div(flags["WIDTH"], block if blocks else options["C"]),
    )
    new = torch.empty if x.numel() else torch.zeros
    amaxes, y_amaxes = (
        new(max(1, down * across), dtype=torch.float32, device=x.device) if output.amax else None
        for output in (dx, y)
    )
    bias = sums = None
    if dbias is not None:
        bias = new(total, dtype=dbias, device=x.device)
        tiles = down * (1 if blocks else options["TILES"])
        sums = torch.empty(tiles, total, dtype=torch.float32, device=x.device)
    if x.numel():
        unit, row_unit = stride_unit(dy, x), 16 if rows % 16 == 0 else 1
        if blocks:
            kernel, given = activation_backward_blocks_kernel, (*dx.blocks(), *y.blocks())
        else:
            kernel = activation_backward_kernel
            given = *dx.operands(amaxes), *y.operands(y_amaxes)
        with on_device_of(x):
            launch(
                kernel, (down * across,),
                dy, x, *given, sums,
                rows // row_unit, dy.stride(0) // unit, x.stride(0) // unit,
                ROW_UNIT=row_unit, UNIT=unit, **flags, **constants(to, x.device),
                Y_E5M2=y_dtype == E5M2, SCALING=to.scaling, BLOCK=block,
                **options, **FUSION,
            )  # fmt: skip
            sum_partials(sums, bias, None, None)
    with on_device_of(x):
        return dx.found(amaxes), y.found(y_amaxes), bias
