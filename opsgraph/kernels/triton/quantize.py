"""Quantized copies of a tensor, or of what an activation makes of it, without storing it first.

Formulas, shapes and short blocks are those of `opsgraph.kernels.reference.quantize`, and so are the
bits of data and scale. Whatever is quantized is first rounded to x's dtype, as the kernel that
stores it would, so that a fused kernel gives the bits of the unfused pair.

The row copy, `[rows, width]`, has scales along rows; the column copy, `[width, rows]`, is the row
copy of the transpose. Both are written from one reading of x, except where an amax over more than a
tile comes first: one more reading for a scale per tensor that is not given, and for a scale per
column; a scale per row reads the row a second time from cache.
"""

from collections.abc import Collection
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..configs import around, configured
from ..formats import BLOCKS, E5M2, NVFP4, Copies, Copy, Format, Target, check, inverse_shape
from . import functions, interpreting, nvfp4
from .activations import _output_width
from .launch import ceil_div, launch, max_partials, on_device_of, stride_unit
from .quantize_tiles import amax_kernel, blocks_kernel, copy_kernel, pairs_kernel, rows_kernel
from .source import Source

COPY_CONFIG = {"R": 128, "C": 64, "num_warps": 8}
"""Where columns are written, of sources that read one tensor."""
BLOCKS_CONFIGS = {
    "blocks": {"R": 32, "COL_R": 64, "STAGES": 1, "num_warps": 4},
    "square": {"R": 64, "COL_R": 128, "STAGES": 1, "num_warps": 8},
}
MADE_CONFIG = {"R": 32, "COL_R": 32, "STAGES": 1, "num_warps": 8}
"""Of blocks of what a source makes of x."""
PAIRS_CONFIG = {"blocks": {"num_warps": 4}, "square": {"num_warps": 8}}
AMAX_CONFIG = {"BLOCK": 4096, "num_warps": 4}


@cache
def native(device: torch.device) -> bool:
    """Whether the chip converts to FP8 itself (sm_89 and later)."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def tile_config(width: int, tall: bool, tensors: int = 1) -> dict[str, int]:
    """Compile options for tiles of rows that are `width` wide.

    tall: for columns too, which are written in pieces as long as the tile is tall; else rows are
    written in long pieces. tensors: how many such tiles of fp32 a program holds.
    """
    if tall:
        return COPY_CONFIG | {"num_warps": COPY_CONFIG["num_warps"] * tensors}
    cols = min(1024, max(128, triton.next_power_of_2(width)))
    return {"R": 4096 // cols, "C": cols, "num_warps": 4 if tensors == 1 else 8}


@cache
def _configs(width: int, tall: bool, tensors: int, *_: Any) -> tuple[dict[str, int], ...]:
    bounds = {"num_warps": (2, 16)} if tall else {"R": (1, 64), "num_warps": (2, 16)}
    return around(tile_config(width, tall, tensors), **bounds)


def _config(source: Source, to: Format, tall: bool, amax: bool = False) -> dict[str, int]:
    """amax: whether it is found, which may be all that is."""
    tensors = 2 if source.flags["GATED"] else 1
    key = source.width, tall, tensors, source.name, source.x.dtype, to.scaling, amax
    return configured("quantize", key, _configs)


@cache
def _blocks_configs(scaling: str, source: str, *_: Any) -> tuple[dict[str, int], ...]:
    usual = BLOCKS_CONFIGS[scaling] if source == "plain" else MADE_CONFIG
    return around(usual, R=(16, 64), COL_R=(32, 128), STAGES=(1, 2), num_warps=(4, 16))


def fours(rows: int, tile: int, warps: int, columns: bool) -> int:
    """FOURS of `quantize_kernels.rows_of`; columns: whether a tile's are written, of its bytes."""
    across = tile // (warps * 32 * 4)
    return min(8, across) if columns and rows % 16 == 0 and across >= 4 else 0


def in_pairs(x: Tensor) -> bool:
    """Whether `quantize_pairs` takes x, and what an activation makes of it, with FOURS."""
    here = native(x.device) or interpreting()
    return here and x.dtype == torch.bfloat16 and x.size(1) % 8 == 0


def paired_blocks(to: Format) -> bool:
    """Whether `quantize_pairs` makes blocks of a format: with scales that are powers of two."""
    return to.scaling == "blocks" and to.power_of_two and not to.eps


def constants(to: Format, device: torch.device) -> dict[str, Any]:
    """The kernels' compile-time arguments of a format, but for those of the scaling."""
    return {
        "E5M2": to.dtype == E5M2,
        "EPS": to.eps,
        "POWER_OF_TWO": to.power_of_two,
        "NATIVE": native(device),
    }


def new_copy(rows: int, width: int, to: Format, x: Tensor, scale: Tensor | None = None) -> Copy:
    """A row copy on x's device to be written; its scales are 1 where there is nothing to write."""
    data = torch.empty(rows, width, dtype=to.dtype, device=x.device)
    if scale is not None:
        return data, scale
    block = BLOCKS[to.scaling]
    across = 1 if to.scaling == "rows" else ceil_div(width, block)
    shape = (ceil_div(rows, block) if to.scaling == "square" else rows, across)
    new = partial(torch.empty if data.numel() else torch.ones, device=x.device)
    if to.scaling == "mx":
        return data, new(shape, dtype=torch.uint8)
    scale = new(shape, dtype=torch.float32)
    if to.scaling == "rows":
        return data, scale
    return data, scale, new(inverse_shape(to.scaling, rows, width), dtype=torch.float32)


def _bytes(copy: Copy | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Data, scale and inverse."""
    if copy is None:
        return None, None, None
    return copy[0].view(torch.uint8), copy[1], copy[2] if len(copy) > 2 else None


class Output(NamedTuple):
    """Copies to be written; `given` is their scale, or the amax where `written` is to hold it."""

    row: Copy | None = None
    col: Copy | None = None
    given: Tensor | None = None
    written: Tensor | None = None
    amax: bool = False
    """Whether the kernel has to find the amax."""
    in_parts: bool = False
    """Whether that is left as the amaxes of all programs, fp32 `[programs]`."""
    inverse: Tensor | None = None
    """Where to write `1 / scale` of scaling "tensor"."""

    def operands(self, amaxes: Tensor | None) -> tuple[Tensor | None, ...]:
        """row data, row scale, column data, column scale, given, amaxes, as kernels take them.

        In the place of a column scale that is not there stands `1 / scale`.
        """
        row, row_scale, inverse = _bytes(self.row)
        col, col_scale, _ = _bytes(self.col)
        if self.given is not None and self.given.dim() == 0:
            row_scale, col_scale = self.written, self.inverse
        elif col is None:
            col_scale = inverse
        return row, row_scale, col, col_scale, self.given, amaxes

    def blocks(self) -> tuple[Tensor | None, ...]:
        """Data, scale and inverse of the row copy, and of the column copy, as kernels take them."""
        return *_bytes(self.row), *_bytes(self.col)

    def scales(self) -> tuple[Tensor | None, ...]:
        """`blocks` without the column copy's data."""
        row, row_scale, row_inverse, _, col_scale, col_inverse = self.blocks()
        return row, row_scale, row_inverse, col_scale, col_inverse

    def known(self, square: bool, columns: Tensor | None) -> tuple[Tensor | None, ...]:
        """`operands` for what is left of blocks once their scales are written, which are given."""
        row, row_scale, _, col, col_scale, _ = self.blocks()
        if square:
            return row, None, col, None, row_scale if col is None else col_scale, None
        return None, None, col, None, columns, None

    def asked(self) -> bool:
        """Whether a kernel has anything to do."""
        return self.row is not None or self.col is not None or self.amax

    def copies(self, want: Collection[str], amax: Tensor | None) -> Copies:
        """What was wanted, once it is written."""
        known = amax if "amax" in want or "amaxes" in want else None
        return Copies(self.row, self.col, known, self.inverse)

    def found(self, amaxes: Tensor | None) -> Tensor | None:
        """The amax of those that programs found, in the form that was wanted."""
        return amaxes if amaxes is None or self.in_parts else max_partials(amaxes)


def new_output(
    rows: int, width: int, to: Format, x: Tensor, scale: Tensor | None, want: Collection[str],
    amax: Tensor | None,
) -> Output:  # fmt: skip
    """Memory for copies of `[rows, width]`; amax is known where scaling "tensor" has no scale."""
    given, written, inverse = scale, None, None
    if to.scaling == "tensor":
        new = torch.empty if rows * width else torch.ones
        if scale is None:
            scale = written = new((), dtype=torch.float32, device=x.device)
            given = amax
        if rows * width and ("row" in want or "col" in want):
            inverse = torch.empty_like(scale)
    row = new_copy(rows, width, to, x, scale) if "row" in want else None
    col = new_copy(width, rows, to, x, scale) if "col" in want else None
    in_parts = "amaxes" in want
    finds = amax is None and (in_parts or "amax" in want)
    return Output(row, col, given, written, finds, in_parts, inverse)


def copies(
    source: Source, to: Target, scale: Tensor | None, want: Collection[str],
    amax: Tensor | None = None,
) -> Copies:  # fmt: skip
    """The copies of a source; see `quantize`. amax: the source's, where it is known already."""
    check(to, scale, want)
    source = source.laid_out()
    if isinstance(to, NVFP4):
        return nvfp4.copies(source, to, want, amax)
    x, rows, width = source.x, source.x.size(0), source.width
    empty = not rows * width
    if empty:
        amax = x.new_zeros((), dtype=torch.float32)
    elif to.scaling == "tensor" and scale is None and amax is None:
        flat = source.name == "plain" and x.is_contiguous()
        amax = _amax(x) if flat else _run(source, to, Output(amax=True))
    output = new_output(rows, width, to, x, scale, want, amax)
    if empty or not output.asked():
        return output.copies(want, amax)
    if to.scaling == "square" or (to.scaling == "blocks" and output.col is not None):
        _run_blocks(source, to, output)
        return output.copies(want, None)
    if to.scaling != "rows":
        found = _run(source, to, output)
        return output.copies(want, found if output.amax else amax)
    if output.row is not None:
        _run_rows(source, to, output)
    if output.col is not None:
        columns = _run(source, to, Output(), columns=True)
        _run(source, to, Output(col=output.col, given=columns))
    return output.copies(want, None)


def _run(source: Source, to: Format, output: Output, columns: bool = False) -> Tensor | None:
    """One launch of `copy_kernel`; returns the amax `[]`, or all columns', if that is asked."""
    x, rows = source.x, source.x.size(0)
    options = _config(source, to, output.col is not None or columns, output.amax)
    down, across = ceil_div(rows, options["R"]), ceil_div(source.width, options["C"])
    unit, row_unit = stride_unit(x), 16 if output.col is not None and rows % 16 == 0 else 1
    new = partial(torch.empty, dtype=torch.float32, device=x.device)
    amaxes = new(down * across) if output.amax else None
    col_amaxes = new(down, source.width) if columns else None
    words = to.scaling == "tensor" and output.col is not None
    four = fours(rows, options["R"] * options["C"], options["num_warps"], words)
    # The cache has the end still of what a product has just written, or the amax been found of.
    last = (source.name == "activation") == (output.written is None)
    with on_device_of(x):
        launch(
            copy_kernel, (down * across,),
            *source.operands(), *output.operands(amaxes), col_amaxes,
            rows // row_unit, x.stride(0) // unit,
            ROW_UNIT=row_unit, UNIT=unit, **source.constants(), **constants(to, x.device),
            SCALING=to.scaling, BLOCK=min(BLOCKS[to.scaling], options["C"]), FOURS=four,
            LAST_FIRST=last, **options,
        )  # fmt: skip
        return output.found(amaxes if amaxes is not None else col_amaxes)


def _run_blocks(source: Source, to: Format, output: Output) -> None:
    x, rows, block = source.x, source.x.size(0), BLOCKS[to.scaling]
    unit, row_unit = stride_unit(x), 16 if rows % 16 == 0 else 1
    pairs = to.scaling == "square" or paired_blocks(to)
    if pairs and row_unit == 16 and source.width % block == 0 and in_pairs(x):
        with on_device_of(x):
            launch(
                pairs_kernel, (ceil_div(rows, block) * (source.width // block),),
                *source.operands(), *output.blocks(), rows // row_unit, x.stride(0) // unit,
                ROW_UNIT=row_unit, UNIT=unit, **source.constants(), BLOCK=block,
                SCALING=to.scaling, E5M2=to.dtype == E5M2, EPS=to.eps,
                POWER_OF_TWO=to.power_of_two, **PAIRS_CONFIG[to.scaling],
            )  # fmt: skip
        return
    key = to.scaling, source.name, source.width, source.flags["GATED"], x.dtype
    options = configured("quantize_blocks", key, _blocks_configs)
    words = output.col is not None
    four = fours(rows, options["COL_R"] * block, options["num_warps"], words)
    with on_device_of(x):
        launch(
            blocks_kernel, (ceil_div(rows, block) * ceil_div(source.width, block),),
            *source.operands(), *output.blocks(), rows // row_unit, x.stride(0) // unit,
            ROW_UNIT=row_unit, UNIT=unit, **source.constants(), **constants(to, x.device),
            SCALING=to.scaling, BLOCK=block, FOURS=four, **options,
        )  # fmt: skip


def _amax(x: Tensor) -> Tensor:
    """The amax `[]` of a contiguous tensor."""
    count = x.numel()
    unit = 16 if count % 16 == 0 else 1
    pieces = 4 if count >= 2**22 else 1
    programs = ceil_div(count, AMAX_CONFIG["BLOCK"] * pieces)
    amaxes = torch.empty(programs, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        launch(
            amax_kernel, (programs,), x, amaxes, count // unit, UNIT=unit, PIECES=pieces,
            **AMAX_CONFIG,
        )  # fmt: skip
        return max_partials(amaxes)


def _run_rows(source: Source, to: Format, output: Output) -> None:
    x, options = source.x, _config(source, to, False)
    unit = stride_unit(x)
    with on_device_of(x):
        launch(
            rows_kernel, (ceil_div(x.size(0), options["R"]),),
            *source.operands(), *output.operands(None)[:2], x.size(0), x.stride(0) // unit,
            UNIT=unit, **source.constants(), **constants(to, x.device), **options,
        )  # fmt: skip


def quantize(
    x: Tensor, to: Target, scale: Tensor | None = None, want: Collection[str] = ("row",)
) -> Copies:
    """The copies of x (fp32, fp16 or bf16, `[rows, width]`) that are in want: "row", "col", "amax".

    scale, fp32 `[]`, is for scaling "tensor": without it the scale is x's own (current scaling).
    Only that scaling gives the amax. Where a scale is given, "amaxes" wants it as fp32 `[n]`, some
    whose largest it is: one launch less. Raises ValueError for what is not defined.
    """
    return copies(Source("plain", x, x.size(1)), to, scale, want)


def activation_quantize(
    x: Tensor, kind: str, to: Target, params: tuple[float, ...] = (), bias: Tensor | None = None,
    scale: Tensor | None = None, want: Collection[str] = ("row",),
) -> Copies:  # fmt: skip
    """`quantize(activation_forward(x, kind, params, bias), ...)` without storing the activation.

    It is rounded to x's dtype before it is quantized. Raises ValueError as either of the two.
    """
    flags = functions.constants(kind, params)
    width = _output_width(x, kind, flags["GATED"])
    return copies(Source("activation", x, width, bias=bias, flags=flags), to, scale, want)
