"""The operands of a pass: each has to be what the pass was planned for, and have memory.

A kernel is given addresses, and asks nothing of what is there. Between a forward and its backward
`.data` may get another shape, a hook may unpack another tensor than was packed, a library may free
a parameter's storage. PyTorch's ops look at such things themselves; for kernels it is done here.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.errors import OpError
from .torch_private import same_layouts


class Operand(NamedTuple):
    """What a pass is handed. where: the op that reads it.

    sizes: -1 stands for the rows, -n for the groups of n rows. factor: how many rows it has for
    each row of the pass.
    """

    where: str
    name: str
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    factor: Fraction | int = 1


class Operands:
    """Those of a pass, in order; None for what no kernel of ours reads.

    which: the pass, for errors. label: what they call the op of an operand's `where`. The first
    operand that has rows says how many the pass has.
    """

    def __init__(
        self, which: str, expected: Sequence[Operand | None], label: Callable[[str], str] = str
    ) -> None:
        self.which, self.expected, self.label = which, expected, label
        self._last: Callable[..., bool] | None = None
        """Whether tensors are laid out as those that were remembered."""

    def again(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether tensors are laid out as those that were remembered, and have memory."""
        there = [tensor for tensor in tensors if tensor is not None]
        fits = self._last
        return fits is not None and fits(*there) and not any(map(cut, there))

    def verify(self, tensors: Sequence[Tensor | None], remember: bool = False) -> None:
        """Raises OpError for another shape, dtype or device than planned.

        remember: whether `again` is to know tensors like these.
        """
        rows: Fraction | int | None = None
        for tensor, operand in zip(tensors, self.expected, strict=True):
            if tensor is None or operand is None:
                continue
            shape, sizes = tensor.shape, operand.sizes
            if rows is None and -1 in sizes and len(shape) == len(sizes):
                rows = shape[sizes.index(-1)]
                rows = rows if operand.factor == 1 else rows / Fraction(operand.factor)
            if shape != sizes:
                sizes = _sizes(sizes, (rows or 0) * operand.factor)
            if shape != sizes or tensor.dtype is not operand.dtype:
                raise self._error(operand, _shown(shape, tensor.dtype), sizes)
            if tensor.device != operand.device:
                raise self._error(operand, f"one on {tensor.device}", sizes)
        if remember:
            self._last = same_layouts([tensor for tensor in tensors if tensor is not None])

    def _error(self, operand: Operand, got: str, sizes: tuple[int, ...]) -> OpError:
        expected = f"{_shown(sizes, operand.dtype)} on {operand.device}"
        where = self.label(operand.where)
        return OpError(where, f"{got} for {operand.name} in its {self.which}", expected)

    def readable(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None] | None:
        """The tensors, with copies of those whose memory does not hold their values.

        Such are zeros that PyTorch does not store, and values that it stores negated; None where
        there are none. Raises OpError for a tensor whose storage was freed, or cut short.
        """
        made: list[Tensor | None] | None = None
        for k, tensor in enumerate(tensors):
            if tensor is None:
                continue
            if lacking := cut(tensor):
                operand = self.expected[k]
                name, where = "a tensor", "a kernel"
                if operand is not None:
                    name, where = operand.name, self.label(operand.where)
                got = f"{lacking} for {name} in its {self.which}"
                raise OpError(where, got, "one with memory")
            if not (tensor.is_neg() or tensor._is_zerotensor()):
                continue
            made = list(tensors) if made is None else made
            made[k] = torch.empty_like(tensor.detach()).copy_(tensor.detach())
        return made


def _sizes(sizes: tuple[int, ...], rows: Any) -> tuple[int, ...]:
    """Sizes for a number of rows."""
    return tuple(size if size >= 0 else int(-(-rows // -size)) for size in sizes)


def reach(sizes: Sequence[int], strides: Sequence[int]) -> int:
    """How many elements lie from a tensor's first to its last one."""
    if 0 in sizes:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(sizes, strides, strict=True))


def cut(tensor: Tensor) -> str | None:
    """What is wrong with a storage that ends before its tensor does; None where it does not."""
    if tensor._is_zerotensor():
        return None  # PyTorch stores none
    has, elements = tensor.untyped_storage().nbytes(), tensor.numel()
    if not tensor.is_contiguous():
        elements = reach(tensor.shape, tensor.stride())
    end = int(elements and tensor.storage_offset() + elements) * tensor.element_size()
    if has >= end:
        return None
    if not has:
        return "a freed storage"
    return f"a storage of {has} bytes where {end} are needed"


def _shown(sizes: Sequence[int], dtype: torch.dtype) -> str:
    return f"{str(dtype).removeprefix('torch.')} {[*sizes]}"
