"""NVFP4 copies of a tensor, of what a norm or an activation makes of it, or of its gradient.

Formulas, blocks, rounding and random numbers are those of `opsgraph.kernels.reference.nvfp4`, and
so are the bits. A first reading finds the amaxes of the value and of its transform. A second one
writes both copies. The value itself is never stored.
"""

from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..formats import NVFP4, Copies, Copy
from .activations import FUSION
from .launch import ceil_div, launch, max_partials, on_device_of, stride_unit, sum_partials
from .nvfp4_kernels import nvfp4_backward_kernel, nvfp4_kernel
from .source import Source

BLOCK = 16
TILE = 64
CONFIG = {"R": TILE, "C": TILE, "num_warps": 4}
BACKWARD = CONFIG | {"num_warps": 8}
NOTHING = None, None


class Output(NamedTuple):
    """The copies, "row" and "col", that are wanted of a value; amax: its own, where it is known."""

    to: NVFP4
    sizes: dict[str, tuple[int, int]]
    seeds: dict[str, Tensor | None]
    device: torch.device
    amax: Tensor | None

    def partials(self, tiles: int) -> tuple[Tensor | None, Tensor | None]:
        """For each tile's amax, and that of its columns' transform, where they are needed."""
        if not tiles:
            return NOTHING
        turned = self.to.hadamard and "col" in self.sizes
        plain = self.amax is None and len(self.sizes) > turned
        new = torch.empty(2, tiles, dtype=torch.float32, device=self.device)
        return new[0] if plain else None, new[1] if turned else None

    def copies(self, partials: tuple[Tensor | None, Tensor | None]) -> dict[str, Copy]:
        """Copies to be written, each with its own amax, which is known."""
        plain, turned = (None if part is None else max_partials(part) for part in partials)
        plain = self.amax if plain is None else plain
        made: dict[str, Copy] = {}
        for name, (rows, cols) in self.sizes.items():
            amax = turned if turned is not None and name == "col" else plain
            if amax is None:  # there is nothing in it
                amax = torch.zeros((), dtype=torch.float32, device=self.device)
            elif any(amax is copy[-1] for copy in made.values()):
                amax = amax.clone()
            blocks, down = ceil_div(cols, BLOCK), ceil_div(rows, self.to.height)
            data = torch.empty(rows, blocks, BLOCK // 2, dtype=torch.uint8, device=self.device)
            scale = torch.empty(down, blocks, dtype=torch.float8_e4m3fn, device=self.device)
            made[name] = data, scale, amax
        return made

    def operands(self, made: dict[str, Copy]) -> list[Tensor | None]:
        """Data, scale, amax and seed of the row copy, then of the column copy, as kernels want."""
        found: list[Tensor | None] = []
        for name in ("row", "col"):
            if name in made:
                data, scale, amax = made[name]  # type: ignore[misc]
                found += data, scale.view(torch.uint8), amax, self.seeds[name]
            else:
                found += [None] * 4
        return found


def _output(
    rows: int, width: int, to: NVFP4, want: Collection[str], device: torch.device,
    amax: Tensor | None = None,
) -> Output:  # fmt: skip
    """Draws the seeds: from the device's generator, the row copy's first, as the reference does."""
    both = {"row": (rows, width), "col": (width, rows)}
    sizes = {name: size for name, size in both.items() if name in want}
    seeds: dict[str, Tensor | None] = dict.fromkeys(sizes)
    if to.stochastic:
        seeds = {name: torch.randint(2**62, (), device=device) for name in sizes}
    return Output(to, sizes, seeds, device, amax)


def copies(source: Source, to: NVFP4, want: Collection[str], amax: Tensor | None = None) -> Copies:
    """The copies of a source, laid out, that are in want; amax: its own, where it is known."""
    x = source.x
    output = _output(x.size(0), source.width, to, want, x.device, amax)
    tiles, unit = _tiles(x.size(0), source.width), stride_unit(x)

    def run(*operands: Tensor | None) -> None:
        if tiles and _asked(operands):
            launch(
                nvfp4_kernel, (tiles,), *source.operands(), *operands, x.size(0),
                x.stride(0) // unit, UNIT=unit, **source.constants(), HADAMARD=to.hadamard,
                HEIGHT=to.height, **CONFIG,
            )  # fmt: skip

    with on_device_of(x):
        partials = output.partials(tiles)
        run(*partials, *output.operands({}))
        made = output.copies(partials)
        run(*NOTHING, *output.operands(made))
    return Copies(made.get("row"), made.get("col"), None)


def _asked(operands: tuple[Tensor | None, ...]) -> bool:
    """Whether a kernel has anything to do."""
    return any(operand is not None for operand in operands)


def _tiles(rows: int, width: int) -> int:
    return ceil_div(rows, TILE) * ceil_div(width, TILE)


def backward_copies(
    dy: Tensor, x: Tensor, flags: dict[str, Any], to: NVFP4, want: Collection[str], y_to: NVFP4,
    y_want: Collection[str], dbias: torch.dtype | None,
) -> tuple[Copies, Copies, Tensor | None]:  # fmt: skip
    """`quantize_backward.activation_backward_quantize`, whose operands are checked and laid out.

    flags: the kind's constants with its WIDTH. dbias: sums of 64 rows, then over those.
    """
    (rows, total), width = x.shape, flags["WIDTH"]
    dx = _output(rows, total, to, want, x.device)
    y = _output(rows, width, y_to, y_want, x.device)
    tiles, unit = _tiles(rows, width), stride_unit(dy, x)
    sums = bias = None
    if dbias is not None:
        new = torch.empty if x.numel() else torch.zeros
        bias = new(total, dtype=dbias, device=x.device)
        sums = torch.empty(ceil_div(rows, TILE), total, dtype=torch.float32, device=x.device)

    def run(*operands: Tensor | None) -> None:
        if tiles and _asked(operands):
            launch(
                nvfp4_backward_kernel, (tiles,), dy, x, *operands, rows, dy.stride(0) // unit,
                x.stride(0) // unit, UNIT=unit, **flags, HADAMARD=to.hadamard, HEIGHT=to.height,
                **BACKWARD, **FUSION,
            )  # fmt: skip

    with on_device_of(x):
        first, second = dx.partials(tiles * (2 if flags["GATED"] else 1)), y.partials(tiles)
        run(*first, *dx.operands({}), *second, *y.operands({}), sums)
        if tiles:
            sum_partials(sums, bias, None, None)
        made, y_made = dx.copies(first), y.copies(second)
        run(*NOTHING, *dx.operands(made), *NOTHING, *y.operands(y_made), None)
    return (
        Copies(made.get("row"), made.get("col"), None),
        Copies(y_made.get("row"), y_made.get("col"), None),
        bias,
    )
