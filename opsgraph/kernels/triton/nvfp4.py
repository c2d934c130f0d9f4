"""NVFP4 copies of a tensor, or of what a norm or an activation makes of it without storing it.

Formulas, blocks, rounding and random numbers are those of `opsgraph.kernels.reference.nvfp4`, and
so are the bits. The amaxes, of the value and of its transform, come first, from a reading of their
own; one more writes both copies.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..formats import NVFP4, Copies, Copy
from .launch import ceil_div, launch, on_device_of, stride_unit
from .nvfp4_kernels import nvfp4_amax_kernel, nvfp4_kernel
from .source import Source

BLOCK = 16
TILE = 64


def copies(source: Source, to: NVFP4, want: Collection[str], amax: Tensor | None = None) -> Copies:
    """The copies of a source, laid out, that are in want: "row" and "col".

    Seeds of stochastic rounding come from the device's generator, the row copy's first, as the
    reference draws them. amax: the source's, where it is known already.
    """
    x, width = source.x, source.width
    sizes = {"row": (x.size(0), width), "col": (width, x.size(0))}
    names = [name for name in sizes if name in want]
    seeds = {name: _seed(to, x) for name in names}
    amaxes = _amaxes(source, to, names, amax)
    made = {name: _new(*sizes[name], to, amaxes[name]) for name in names}
    if names and x.size(0) and width:
        operands: list[Tensor | None] = []
        for name in sizes:
            operands += (*_bytes(made.get(name)), amaxes.get(name), seeds.get(name))
        _launch(nvfp4_kernel, source, *operands, HADAMARD=to.hadamard, HEIGHT=to.height)
    return Copies(made.get("row"), made.get("col"), None)


def _seed(to: NVFP4, x: Tensor) -> Tensor | None:
    return torch.randint(2**62, (), device=x.device) if to.stochastic else None


def _new(rows: int, cols: int, to: NVFP4, amax: Tensor) -> Copy:
    """A copy of `[rows, cols]` to be written."""
    blocks, device = ceil_div(cols, BLOCK), amax.device
    data = torch.empty(rows, blocks, BLOCK // 2, dtype=torch.uint8, device=device)
    down = ceil_div(rows, to.height)
    scale = torch.empty(down, blocks, dtype=torch.float8_e4m3fn, device=device)
    return data, scale, amax


def _bytes(copy: Copy | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if copy is None else (copy[0], copy[1].view(torch.uint8))


def _amaxes(
    source: Source, to: NVFP4, names: Collection[str], amax: Tensor | None
) -> dict[str, Tensor]:
    """Of what each copy is made of; every one is a tensor of its own."""
    x, count = source.x, _tiles(source)
    if not count:
        return {name: x.new_zeros((), dtype=torch.float32) for name in names}
    turned = to.hadamard and "col" in names
    plain = [name for name in names if not (turned and name == "col")]
    new = torch.empty(2, count, dtype=torch.float32, device=x.device)
    first, second = new[0] if plain and amax is None else None, new[1] if turned else None
    if first is not None or second is not None:
        _launch(nvfp4_amax_kernel, source, first, second)
    if first is not None:
        amax = first.amax()
    found = {} if second is None else {"col": second.amax()}
    for name in plain:
        assert amax is not None
        found[name] = amax.clone() if "row" in found else amax
    return found


def _tiles(source: Source) -> int:
    return ceil_div(source.x.size(0), TILE) * ceil_div(source.width, TILE)


def _launch(kernel: Any, source: Source, *operands: Tensor | None, **constants: Any) -> None:
    """One program for each tile of the source."""
    x, unit = source.x, stride_unit(source.x)
    with on_device_of(x):
        launch(
            kernel, (_tiles(source),), *source.operands(), *operands, x.size(0),
            x.stride(0) // unit, UNIT=unit, **source.constants(), **constants, R=TILE, C=TILE,
            num_warps=4,
        )  # fmt: skip
