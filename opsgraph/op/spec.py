"""What is known of a value before it exists: trailing shape, dtype, device. Never its rows."""

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, prod
from typing import Any, NamedTuple

import torch

ROWS = -1
"""The row count in a shape; `-n` is the number of groups of n rows, the last one perhaps short."""

Factor = Fraction | int
"""How many rows there are for each row of something; 1 is an int, by which nothing is slower."""

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.bool: "bool",
}


class Storage(NamedTuple):
    """How a quantized value is stored: its format's name, and what a value and a scale take.

    block: how many values of a row have one scale; 0 where the scales do not grow with the rows.
    height: how many rows of a block do.
    """

    name: str
    bits: int
    scale_bits: int = 0
    block: int = 0
    height: int = 1

    def bytes_of(self, width: int) -> int:
        """Bytes of `width` values of a row, with their scales."""
        scales = -(-width // self.block) if self.block else 0
        return (width * self.bits + scales * self.scale_bits) // 8


@dataclass(frozen=True, slots=True)
class Spec:
    """A value on an edge between ops, or one that an op saves.

    shape: `(ROWS, width)` for values between ops; saved values may have any shape, with `ROWS` in
    the place of the row count, or none (a scalar seed is `()`). storage: of a quantized value,
    whose dtype is the one that it stands for. factor: how many rows there are for each row of the
    plan's input; the planner keeps it, ops change it by their `row_factor`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    storage: Storage | None = None
    factor: Factor = 1

    @property
    def width(self) -> int:
        """The last dimension's size."""
        return self.shape[-1]

    @property
    def bytes_per_row(self) -> int:
        """Bytes for each row of the plan's input, rounded up; 0 where rows do not matter."""
        if ROWS not in self.shape:
            return 0
        width = prod(size for size in self.shape if size != ROWS)
        one = width * self.dtype.itemsize if self.storage is None else self.storage.bytes_of(width)
        return one if self.factor == 1 else ceil(one * self.factor)

    def like(self, width: int | None = None, dtype: torch.dtype | None = None) -> "Spec":
        """A plain value with another width or dtype: not quantized, with factor 1."""
        shape = self.shape if width is None else (*self.shape[:-1], width)
        return Spec(shape, dtype or self.dtype, self.device)

    def stored(self, storage: Storage | None) -> "Spec":
        """The same value, quantized, or plain with None."""
        return Spec(self.shape, self.dtype, self.device, storage, self.factor)

    def times(self, factor: Factor) -> "Spec":
        """The same with a number of rows for each row of the plan's input."""
        return self if self.factor == factor else replace(self, factor=factor)

    def empty(self, rows: Any, device: torch.device | str | None = None) -> torch.Tensor:
        """An uninitialized tensor of this spec with `rows` rows, which may be symbolic.

        Of a quantized value it is what the value stands for. `factor` is ignored.
        """
        groups = {-size: -(-rows // -size) for size in self.shape if size < ROWS} | {1: rows}
        shape = [size if size >= 0 else groups[-size] for size in self.shape]
        return torch.empty(shape, dtype=self.dtype, device=device or self.device)

    def __str__(self) -> str:
        up, down = self.factor.as_integer_ratio()
        rows = ("" if up == 1 else str(up)) + "*" + ("" if down == 1 else f"/{down}")
        sizes = ",".join(rows if size == ROWS else str(size) for size in self.shape)
        name = _SHORT.get(self.dtype, str(self.dtype).removeprefix("torch."))
        return f"{name if self.storage is None else self.storage.name}[{sizes}]"


def row(width: int, dtype: torch.dtype, device: torch.device) -> Spec:
    """The spec of an edge: `[rows, width]`."""
    return Spec((ROWS, width), dtype, device)
