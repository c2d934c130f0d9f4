"""What is known of a value before it exists: trailing shape, dtype, device. Never its rows."""

from dataclasses import dataclass, replace
from math import prod

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
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def width(self) -> int:
        """The last dimension's size."""
        return self.shape[-1]

    @property
    def bytes_per_row(self) -> int:
        """Bytes that one row takes; 0 for a value whose size does not depend on the rows."""
        if ROWS not in self.shape:
            return 0
        return prod(size for size in self.shape if size != ROWS) * self.dtype.itemsize

    def like(self, width: int | None = None, dtype: torch.dtype | None = None) -> "Spec":
        """The same with another width or dtype."""
        shape = self.shape if width is None else (*self.shape[:-1], width)
        return replace(self, shape=shape, dtype=dtype or self.dtype)

    def empty(self, rows: int, device: torch.device | str | None = None) -> torch.Tensor:
        """An uninitialized tensor of this spec with that many rows."""
        shape = [rows if size == ROWS else size for size in self.shape]
        return torch.empty(shape, dtype=self.dtype, device=device or self.device)

    def __str__(self) -> str:
        sizes = ",".join("*" if size == ROWS else str(size) for size in self.shape)
        return f"{_SHORT.get(self.dtype, str(self.dtype).removeprefix('torch.'))}[{sizes}]"


def row(width: int, dtype: torch.dtype, device: torch.device) -> Spec:
    """The spec of an edge: `[rows, width]`."""
    return Spec((ROWS, width), dtype, device)
