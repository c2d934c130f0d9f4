"""The most bytes that live at the same time, as PyTorch's allocator tells its profiler."""

import gc
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def allocations(function: Callable[[], Any]) -> Iterator[int]:
    """Bytes taken (positive) and given back (negative) during a call, in their order.

    Kept memory is not seen being taken again: tests switch it off.
    """
    gc.collect()  # what other tests left is not given back meanwhile
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


def peak_bytes(function: Callable[[], Any]) -> int:
    """The most that a call has taken at any time and not yet given back."""
    return max(accumulate(allocations(function)))
