"""Memory that is kept: a large result takes the block of one that died, whose pages are there.

A fresh block of some megabytes costs a page fault for every 4 KiB, which for a GEMM of the sizes of
a transformer's layer can take as long as the arithmetic. `empty` hands out a block again once no
tensor has its storage: what is saved, returned or viewed keeps its block for as long as it lives,
in any thread. A block is of exactly the tensor's size, so a storage never holds more than its
tensor.
"""

import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from ...guards.owned import counted, owners, use_count
from ...guards.torch_private import empty_strided
from ...guards.watching import watching

CPU = torch.device("cpu")
LEAST = 2**20
"""Bytes below which a tensor gets memory of its own: the allocator keeps such blocks itself."""


class Block(NamedTuple):
    """A storage with the place that it had when it was made."""

    storage: torch.UntypedStorage
    address: int
    size: int


class Pool:
    """Blocks by size, idle or in use. All methods may be called by any thread.

    No more is held than was in use at the same time once: where blocks of another size are asked
    for, idle ones go back to the system.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks: dict[int, list[Block]] = {}
        self._most = 0
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self._lock = threading.Lock()

    def take(self, size: int) -> torch.UntypedStorage:
        """A storage of `size` bytes that no tensor has."""
        with self._lock:
            blocks = self._blocks.pop(size, [])
            self._blocks[size] = blocks  # last: sizes not asked for longest are dropped first
            for k in range(len(blocks) - 1, -1, -1):  # what was handed out last may be in the cache
                if _idle(block := blocks[k]):
                    blocks.append(blocks.pop(k))
                    if _intact(block) and block.storage.resizable():
                        return block.storage
                    # Resized, moved to memory that other processes see, or marked by numpy().
                    blocks.pop()
                    break
            self._drop(size)
            storage = torch.UntypedStorage(size)
            blocks.append(Block(storage, storage.data_ptr(), size))
            return storage

    def adopt(self, make: Callable[[], Tensor], size: int) -> Tensor:
        """The tensor that make allocates, of `size` bytes, as a block of the pool."""
        with self._lock:
            blocks = self._blocks.get(size, [])
            idle = next((k for k, block in enumerate(blocks) if _idle(block)), None)
            if idle is not None:
                del blocks[idle]  # no variable holds it: the new one may get its pages
            self._drop(size)
        made = make()
        storage = made.untyped_storage()
        if storage.nbytes() == size:
            with self._lock:
                block = Block(storage, storage.data_ptr(), size)
                self._blocks.setdefault(size, []).append(block)
        return made

    def has(self, x: Tensor) -> bool:
        """Whether a tensor's storage is one of the pool's, as it was made."""
        storage = x.untyped_storage()
        with self._lock:
            blocks = self._blocks.get(storage.nbytes(), [])
            return any(block.storage is storage and _intact(block) for block in blocks)

    def _drop(self, size: int) -> None:
        """Free idle blocks so that one more of that size stays within the most ever in use."""
        held = size + sum(s * len(blocks) for s, blocks in self._blocks.items())
        if held <= self._most:
            return
        used = sum(s * sum(not _idle(b) for b in blocks) for s, blocks in self._blocks.items())
        self._most = max(self._most, size + used)
        excess = held - self._most
        for s in list(self._blocks):
            kept = []
            for block in self._blocks[s]:
                if excess > 0 and _idle(block):
                    excess -= s
                else:
                    kept.append(block)
            self._blocks[s][:] = kept
            if not kept and s != size:
                del self._blocks[s]

    def release(self) -> None:
        """Free all idle blocks."""
        with self._lock:
            self._most = 0
            for size in list(self._blocks):
                self._blocks[size] = [block for block in self._blocks[size] if not _idle(block)]
                if not self._blocks[size]:
                    del self._blocks[size]

    def held(self) -> tuple[int, int]:
        """Bytes in use and bytes idle."""
        with self._lock:
            blocks = [block for same in self._blocks.values() for block in same]
            idle = sum(block.size for block in blocks if _idle(block))
            return sum(block.size for block in blocks) - idle, idle


def _references(block: Block) -> tuple[int, int]:
    """How many tensors (and storage objects) have the storage, and how many Python names."""
    assert use_count is not None
    return use_count(block.storage._cdata), sys.getrefcount(block.storage)


_ALONE = _references(Block(torch.UntypedStorage(1), 0, 1)) if use_count else (0, 0)


def _idle(block: Block) -> bool:
    """Whether the pool alone has the storage."""
    return _references(block) == _ALONE


def _intact(block: Block) -> bool:
    """Whether the storage is as it was made; a tensor's resize_ or share_memory_ changes it."""
    return (block.storage.nbytes(), block.storage.data_ptr()) == (block.size, block.address)


pool = Pool()


def _owners_of_ours() -> tuple[int, ...]:
    """The same of a fresh tensor. A call counts its arguments twice where Dynamo watches frames."""
    kept = torch.UntypedStorage(1)
    x = torch.empty(0, dtype=torch.uint8, device="cpu").set_(kept, 0, (1,))  # type: ignore[call-overload]
    return (lambda x: owners(x))(x)  # as `ours` calls it


def ours(x: Tensor) -> bool:
    """Whether one variable of the caller is all that refers to x and its memory.

    x may then be overwritten. This is known only of tensors in kept memory.
    """
    if not counted:
        return False
    if watching.recorder is not None:
        watching.recorder.refuse("it overwrites what nobody else holds")
    return owners(x) == _owners_of_ours() and pool.has(x)


def adopted(make: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor of that shape and dtype for which make allocates; kept memory from now on."""
    size = prod(shape) * dtype.itemsize
    return make() if size < LEAST or use_count is None else pool.adopt(make, size)


@cache
def _bare(dtype: torch.dtype) -> Tensor:
    return torch.empty(0, dtype=dtype, device=CPU)


_new = empty_strided(CPU)


@lru_cache(maxsize=4096)
def contiguous(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    steps = accumulate(sizes[:0:-1], lambda step, size: step * max(size, 1), initial=1)
    return (*steps,)[::-1][: len(sizes)]


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An uninitialized, contiguous tensor on the CPU, in kept memory if it is large."""
    size = prod(shape) * dtype.itemsize
    if size < LEAST or use_count is None:
        if torch.are_deterministic_algorithms_enabled():
            return _bare(dtype).new_empty(shape)  # which fills it, if it is to
        sizes = tuple(shape)
        made: Tensor = _new(sizes, contiguous(sizes), dtype)  # half of torch.empty's time
        if watching.recorder is not None:  # whom it passes by
            watching.recorder.allocated(made)
        return made
    bare = torch.empty(0, dtype=dtype, device=CPU)
    made = bare.set_(pool.take(size), 0, shape)  # type: ignore[call-overload]
    if (
        torch.are_deterministic_algorithms_enabled()
        and torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    ):
        made.fill_(torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max)
    return made
