"""How a tensor is to be quantized and what comes of it, for the kernels of every backend."""

from collections.abc import Callable, Collection
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
_SHORT = {E4M3: "e4m3", E5M2: "e5m2"}


class Layout(NamedTuple):
    """How a copy's numbers lie: what plans and errors call it, and what a number and a scale take.

    name: {} stands for the dtype's. block, height: the columns and rows of a block with one scale;
    0 columns where there are no blocks.
    """

    name: str
    bits: int
    scale_bits: int = 0
    block: int = 0
    height: int = 1
    scale_dtype: torch.dtype = torch.float32


LAYOUTS = {
    "tensor": Layout("{}", 8),
    "rows": Layout("{}r", 8),
    "blocks": Layout("{}b", 8, 32, 128),
    "square": Layout("{}b", 8, 32, 128, 128),
    "mx": Layout("mx{}", 8, 8, 32, scale_dtype=torch.uint8),
    "nvfp4": Layout("nvfp4", 4, 8, 16, scale_dtype=E4M3),
}
"""By scaling: the one place where a format's name and sizes stand."""
BLOCKS = {name: layout.block or 1 for name, layout in LAYOUTS.items() if name != "nvfp4"}
"""The scalings of `Format`, each with the columns of one of its blocks; 1 where it has none."""


class Format(NamedTuple):
    """How to quantize: scaling is a key of `BLOCKS`, dtype E4M3 or E5M2.

    "tensor" has one scale, "rows" one per row (the column copy: per column of x), "blocks" one per
    1 x 128, "square" one per 128 x 128, "mx" is MXFP8. eps and power_of_two: as in the reference.
    """

    scaling: str
    dtype: torch.dtype = E4M3
    eps: float = 0.0
    power_of_two: bool = False


class NVFP4(NamedTuple):
    """How to quantize to NVFP4; each copy is (data uint8 `[rows, blocks, 8]`, scale E4M3, amax).

    height: the rows of a block, 1 or 16; stochastic: of the rounding; hadamard: of column copies,
    which are transformed first. All as in `microscaled.NVFP4Quantizer`.
    """

    height: int = 1
    stochastic: bool = False
    hadamard: bool = False


Target = Format | NVFP4


@cache
def layout_of(to: Target) -> Layout:
    """The layout of a format's copies, by its full name."""
    if isinstance(to, NVFP4):
        return LAYOUTS["nvfp4"]._replace(height=to.height)
    layout = LAYOUTS[to.scaling]
    return layout._replace(name=layout.name.format(_SHORT[to.dtype]))


def names_of(scaling: str, *dtypes: torch.dtype) -> tuple[str, ...]:
    """What formats of one scaling are called, by default those of both dtypes."""
    return tuple(layout_of(Format(scaling, dtype)).name for dtype in dtypes or (E4M3, E5M2))


FOUR = 4
"""What cuBLASLt wants the number of fp32 scales along a row of them to be a multiple of."""


def groups(size: int, block: int) -> int:
    """How many groups of `block` there are, the last one perhaps short."""
    return -(-size // block)


def inverse_shape(
    scaling: str, rows: int, cols: int, count: Callable[[int, int], int] = groups
) -> tuple[int, int, int]:
    """The shape of `1 / scale` as products read it, of a copy `[rows, cols]` with fp32 blocks.

    "blocks": a row for each block of columns, of a number for each row; "square": as the scales
    lie. Both are filled up to fours, by "square" with ones. count: see `groups`.
    """
    if scaling == "blocks":
        return count(cols, BLOCKS[scaling]), count(rows, FOUR), FOUR
    return count(rows, BLOCKS[scaling]), count(cols, BLOCKS[scaling] * FOUR), FOUR


Copy = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]
"""Data and scale; of "blocks" and "square" `1 / scale` (`inverse_shape`), of NVFP4 the amax."""


class Copies(NamedTuple):
    """What was wanted: the row and the column copy, and the amax, fp32 `[]`.

    inverse: `1 / scale`, fp32 `[]`, of scaling "tensor"; None where the kernel does not write it.
    """

    row: Copy | None
    col: Copy | None
    amax: Tensor | None
    inverse: Tensor | None = None


def alike(first: Target, second: Target) -> bool:
    """Whether they differ in dtype or in rounding alone, as a gradient's and an activation's may.

    One kernel can then write both, and a GEMM multiply a column copy of each.
    """
    if isinstance(first, NVFP4) and isinstance(second, NVFP4):
        return first._replace(stochastic=second.stochastic) == second
    if isinstance(first, Format) and isinstance(second, Format):
        return first._replace(dtype=second.dtype) == second
    return False


def check(to: Target, scale: Tensor | None, want: Collection[str]) -> None:
    """Raises ValueError for an unknown format or copy."""
    if isinstance(to, NVFP4):
        if to.height not in (1, 16):
            raise ValueError(f"NVFP4 has blocks of 1 or 16 rows, got {to.height}")
        if scale is not None or "amax" in want:
            raise ValueError("NVFP4 takes no scale and gives no amax but the copies' own")
        return
    if to.scaling not in BLOCKS:
        raise ValueError(f"unknown scaling {to.scaling!r}, expected one of {', '.join(BLOCKS)}")
    if to.dtype not in (E4M3, E5M2):
        raise ValueError(f"got dtype {to.dtype}, expected {E4M3} or {E5M2}")
    if to.scaling != "tensor" and (scale is not None or "amax" in want):
        raise ValueError(f"scaling {to.scaling!r} takes no scale and gives no amax")
    if scale is not None and (scale.dtype != torch.float32 or scale.dim()):
        raise ValueError(f"scale must be fp32 [], got {scale.dtype} {list(scale.shape)}")
