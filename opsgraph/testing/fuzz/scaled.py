"""A linear layer without a bias under each recipe, by formulas: its products, and its scales.

What a recipe rounds to FP8 is said here anew, and multiplied in fp64: results have to agree as
closely as sums of the same numbers do.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...precision import recipe
from ...precision.recipe import Format

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
CLOSE = 0.01
"""How far off a row may be, of its norm: several times what bf16 rounds, and a part of what FP8
does."""


class Kind(NamedTuple):
    """A recipe, and what it does."""

    recipe: recipe.Recipe
    tiles: str = "tensor"
    """What has a scale of its own: "tensor", "row", "block" or "mx"."""
    formats: str = "HYBRID"
    powers: bool = False
    """Whether scales are powers of two."""
    backward: str | None = None
    """What the backward multiplies with a gradient that is not rounded."""


KINDS = {
    "current": Kind(recipe.Float8CurrentScaling()),
    "powers": Kind(recipe.Float8CurrentScaling(use_power_2_scales=True), powers=True),
    "rows": Kind(recipe.Float8CurrentScaling(row_wise=True), "row"),
    "delayed": Kind(recipe.DelayedScaling(amax_history_len=4)),
    "blocks": Kind(recipe.Float8BlockScaling(), "block", "E4M3", True),
    "f32 blocks": Kind(recipe.Float8BlockScaling(use_f32_scales=True), "block", "E4M3"),
    "mx": Kind(recipe.MXFP8BlockScaling(), "mx", "E4M3", True),
    "mx in E5M2": Kind(recipe.MXFP8BlockScaling(Format.E5M2), "mx", "E5M2", True),
    "exact backward": Kind(
        recipe.Float8CurrentScaling(backward_override="high_precision"), backward="high_precision"
    ),
    "dequantized": Kind(
        recipe.Float8CurrentScaling(Format.E5M2, backward_override="dequantized"),
        "tensor", "E5M2", backward="dequantized",
    ),
    "dequantized rows": Kind(
        recipe.Float8CurrentScaling(row_wise=True, backward_override="dequantized"),
        "row", backward="dequantized",
    ),
}  # fmt: skip
TILES = {"tensor": (None, None), "row": (1, None), "block": (1, 128), "mx": (1, 32)}
"""Rows and columns that a scale covers, None for all; of a column copy the other way around."""


def cast(
    x: Tensor, dtype: torch.dtype, tile: tuple[int | None, int | None], powers: bool,
    scale: float | None,
) -> Tensor:  # fmt: skip
    """x `[rows, cols]` rounded to FP8, in fp64. scale: instead of those that tiles have."""
    rows, cols = x.shape
    height, width = tile[0] or rows, tile[1] or cols
    whole = pad(x.detach().float(), (0, -cols % width, 0, -rows % height))
    tiles = whole.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    amax, largest = tiles.abs().amax((1, 3), keepdim=True), LARGEST[dtype]
    factor = torch.where(amax > 0, torch.full_like(amax, largest) / amax, 1.0)
    if scale is not None:
        factor = torch.full_like(factor, scale)
    if powers:
        factor = torch.ldexp(torch.ones_like(factor), torch.frexp(factor).exponent - 1)
    data = (tiles * factor).clamp(-largest, largest).to(dtype).double() / factor.double()
    values: Tensor = data.flatten(2, 3).flatten(0, 1)
    return values[:rows, :cols]


class Products:
    """A layer's products under a kind, and its delayed scales from one call to the next."""

    def __init__(self, kind: Kind) -> None:
        self.kind, self.delayed = kind, isinstance(kind.recipe, recipe.DelayedScaling)
        formats = Format[kind.formats]
        self.formats = [formats.of(role) for role in ("activation", "weight", "gradient")]
        self.scales = [1.0, 1.0, 1.0]
        """Of activations, weights and gradients, if they are delayed."""
        self.amaxes: list[list[float]] = [[], [], []]
        self.seen = 0.0
        """The largest gradient since the last update."""

    def open(self) -> None:
        """A context of the recipe begins."""
        if self.seen:
            self._update(2, self.seen)
            self.seen = 0.0

    def close(self, x: Tensor, weight: Tensor) -> None:
        """A context ends, in which they were multiplied with grad enabled."""
        for role, value in enumerate((x, weight)):
            self._update(role, _amax(value))

    def saw(self, dy: Tensor) -> None:
        """A backward has met a gradient."""
        self.seen = max(self.seen, _amax(dy))

    def _update(self, role: int, amax: float) -> None:
        self.amaxes[role].append(amax)
        largest, most = LARGEST[self.formats[role]], max(self.amaxes[role][-4:])
        self.scales[role] = float(torch.tensor(largest) / torch.tensor(most))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """`x @ weight.T`"""
        return self._copy(0, x, "row", self.scales) @ self._copy(1, weight, "row", self.scales).T

    def backward(
        self, x: Tensor, weight: Tensor, dy: Tensor, scales: list[float]
    ) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the weight. scales: those that the call had."""
        if self.kind.backward is not None:
            if self.kind.backward == "dequantized":
                x, weight = self._copy(0, x, "row", scales), self._copy(1, weight, "row", scales)
            return dy.double() @ weight.double(), dy.double().T @ x.double()
        down, across = self._copy(2, dy, "col", scales), self._copy(2, dy, "row", scales)
        return across @ self._copy(1, weight, "col", scales), down.T @ self._copy(
            0, x, "col", scales
        )

    def _copy(self, role: int, x: Tensor, way: str, scales: list[float]) -> Tensor:
        """What stands for a value in a product over its columns, or over its rows."""
        tiles: Any = TILES[self.kind.tiles]
        if role == 1 and self.kind.tiles == "block":
            tiles = 128, 128
        tile = tiles if way == "row" else tiles[::-1]
        scale = scales[role] if self.delayed else None
        return cast(x, self.formats[role], tile, self.kind.powers, scale)


def _amax(x: Tensor) -> float:
    return float(x.detach().abs().max())
