"""What is known of a value before it exists: trailing shape, dtype, device. Never its rows."""

from dataclasses import dataclass, replace
from fractions import Fraction
from math import ceil, prod

import torch

ROWS = -1

_SHORT = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.bool: "bool",
}


@dataclass(frozen=True, slots=True)
class Spec:
    """A value on an edge between ops, or one that an op saves.

    shape: `(ROWS, width)` for values between ops; saved values may have any shape, with `ROWS` in
    the place of the row count, or none (a scalar seed is `()`).
    factor: how many rows there are for each row of the plan's input; the planner keeps it, ops
    change it by their `row_factor`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    factor: Fraction = Fraction(1)

    @property
    def width(self) -> int:
        """The last dimension's size."""
        return self.shape[-1]

    @property
    def bytes_per_row(self) -> int:
        """Bytes for each row of the plan's input, rounded up; 0 where rows do not matter."""
        if ROWS not in self.shape:
            return 0
        one = prod(size for size in self.shape if size != ROWS) * self.dtype.itemsize
        return one if self.factor == 1 else ceil(one * self.factor)

    def like(self, width: int | None = None, dtype: torch.dtype | None = None) -> "Spec":
        """The same with another width or dtype."""
        shape = self.shape if width is None else (*self.shape[:-1], width)
        return replace(self, shape=shape, dtype=dtype or self.dtype)

    def empty(self, rows: int, device: torch.device | str | None = None) -> torch.Tensor:
        """An uninitialized tensor of this spec with that many rows."""
        shape = [rows if size == ROWS else size for size in self.shape]
        return torch.empty(shape, dtype=self.dtype, device=device or self.device)

    def __str__(self) -> str:
        up, down = self.factor.as_integer_ratio()
        rows = ("" if up == 1 else str(up)) + "*" + ("" if down == 1 else f"/{down}")
        sizes = ",".join(rows if size == ROWS else str(size) for size in self.shape)
        return f"{_SHORT.get(self.dtype, str(self.dtype).removeprefix('torch.'))}[{sizes}]"


def row(width: int, dtype: torch.dtype, device: torch.device) -> Spec:
    """The spec of an edge: `[rows, width]`."""
    return Spec((ROWS, width), dtype, device)
