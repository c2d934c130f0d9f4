"""The most memory that a call takes on the CPU: of its tensors, and as the system sees it.

What tensors take at the same time is the same in every run. What the process takes depends also on
what malloc keeps for later and on the library's scratch: eager PyTorch's steps differ by a factor
of two in it, one after the other.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from opsgraph.kernels.cpu import memory


class Fresh(memory.Pool):
    """Gives idle blocks back whenever more is taken, so that each taking is seen."""

    def take(self, size: int) -> torch.UntypedStorage:
        self.release()
        return super().take(size)

    def adopt(self, make: Callable[[], Tensor], size: int) -> Tensor:
        self.release()
        return super().adopt(make, size)


@contextmanager
def fresh_memory() -> Iterator[None]:
    """Kept memory is that of a `Fresh` pool meanwhile."""
    before = memory.pool
    memory.pool = Fresh()
    try:
        yield
    finally:
        memory.pool = before


def allocations(function: Callable[[], Any]) -> Iterator[int]:
    """Bytes taken (positive) and given back (negative) during a call, in their order."""
    memory.pool.release()
    gc.collect()  # what others left is not given back meanwhile
    gc.disable()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            result = function()
            del result
    finally:
        gc.enable()
    events = found.profiler.kineto_results.events()
    taken = [event for event in events if event.name() == "[memory]"]
    yield from (event.nbytes() for event in sorted(taken, key=lambda event: event.start_ns()))


def tensor_peak(function: Callable[[], Any]) -> int:
    """The most bytes of tensors that a call has taken at any time and not yet given back."""
    return max(accumulate(allocations(function)))


def resident(field: str = "VmRSS") -> int:
    """`VmRSS` or `VmHWM`, the highest since the last reset, of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(f"/proc/self/status has no {field}")


_RESET = Path("/proc/self/clear_refs")


def can_tell_resident() -> bool:
    """Whether the system tells what the process takes."""
    return _RESET.exists()


def resident_peak(function: Callable[[], Any]) -> int:
    """The most that the process takes during a call, in bytes."""
    _RESET.write_text("5")  # makes VmHWM start again
    function()
    return resident("VmHWM")
