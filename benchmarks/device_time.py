"""Time that a GPU's kernels take, by name: what torch.profiler says, between marks on the device.

A mark is a kernel that does nothing. What runs on the device between a pair of marks belongs to one
sample, whatever the host does meanwhile.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.timing import spread, take_turns

K = TypeVar("K", bound=Hashable)

MARK = "spin_kernel"
"""Part of the name of the kernel that `torch.cuda._sleep` starts."""
SETTLING = 0.1
"""Seconds that a call runs before it is measured, four times in a row without a pause."""
HEAD_START = 16_000_000
"""Cycles that the device waits before a call that is measured: 8 ms at 2 GHz.

The host has launched all of a step by then, so that kernels follow each other without pauses. A
library whose host is slower than its kernels gives the chip pauses, in which it cools: the same
product of cuBLAS was 4 to 8% faster behind them.
"""


class Event(NamedTuple):
    """What ran on the device; nanoseconds."""

    name: str
    start: int
    duration: int


class Kernel(NamedTuple):
    """All runs of one kernel in a sample; nanoseconds."""

    count: int
    total: int


Sample = dict[str, Kernel]
"""By the kernel's name."""


def between_marks(events: Iterable[Event]) -> list[Sample]:
    """The kernels between the first mark and the second, the third and the fourth, and so on.

    Raises ValueError where a mark has no second one.
    """
    found: list[Sample] = []
    inside = False
    for event in sorted(events, key=lambda event: event.start):
        if MARK in event.name:
            inside = not inside
            if inside:
                found.append({})
        elif inside:
            before = found[-1].get(event.name, Kernel(0, 0))
            found[-1][event.name] = Kernel(before.count + 1, before.total + event.duration)
    if inside:
        raise ValueError("the last mark has no second one")
    return found


def device_events(profiler: torch.profiler.profile) -> list[Event]:
    """Kernels, copies and fills of a profile; no ranges that someone named."""
    found = []
    for event in profiler.profiler.kineto_results.events():  # type: ignore[union-attr]
        named = getattr(event, "is_user_annotation", lambda: False)()
        if event.device_type() == torch.autograd.DeviceType.CUDA and not named:
            found.append(Event(event.name(), event.start_ns(), event.duration_ns()))
    return found


def measure(
    calls: Mapping[K, Callable[[], Any]],
    repeats: int,
    before: Mapping[K, Callable[[], Any]] | Callable[[], Any] = lambda: None,
) -> dict[K, list[Sample]]:
    """`repeats` samples of one call each, in turns. before: what a call follows, not counted.

    It is called for `SETTLING` seconds: a chip's clock follows what it has done just before.
    Raises RuntimeError where the profile lacks samples.
    """
    taken = 0

    def sample(call: Callable[[], Any], first: Callable[[], Any]) -> int:
        nonlocal taken
        start = time.perf_counter()
        while time.perf_counter() - start < SETTLING:
            for _ in range(4):
                first()
            torch.cuda.synchronize()
        torch.cuda._sleep(HEAD_START)
        call()
        torch.cuda._sleep(1)
        torch.cuda.synchronize()
        taken += 1
        return taken - 1

    samplers = {
        name: partial(sample, call, before if callable(before) else before[name])
        for name, call in calls.items()
    }
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profiler:
        numbers = take_turns(samplers, repeats)
    events = device_events(profiler)
    samples = between_marks(events)
    if len(samples) != taken:
        names = sorted({event.name for event in events})[:5]
        raise RuntimeError(f"got {len(samples)} samples of {names} and more, expected {taken}")
    return {name: [samples[number] for number in each] for name, each in numbers.items()}


def check() -> None:
    """Raises RuntimeError or ValueError where the profiler does not see a kernel on this device."""
    x = torch.ones(2**20, device="cuda")
    (sample,) = measure({"add": lambda: x + x}, 1)["add"]
    if not sample:
        raise RuntimeError("got no kernel between two marks, expected one")


def total(sample: Sample) -> float:
    """Milliseconds of all kernels."""
    return sum(kernel.total for kernel in sample.values()) * 1e-6


def summary(samples: list[Sample], most: int = 16) -> dict[str, Any]:
    """Median and quartiles of the milliseconds, and the kernels that take most of them."""
    names = {name for sample in samples for name in sample}
    kernels = [
        {
            "name": short(name),
            "ms": statistics.median(_of(sample, name).total for sample in samples) * 1e-6,
            "count": statistics.median(_of(sample, name).count for sample in samples),
        }
        for name in names
    ]
    kernels.sort(key=lambda kernel: -kernel["ms"])
    return {"device_ms": spread([total(sample) for sample in samples]), "kernels": kernels[:most]}


def _of(sample: Sample, name: str) -> Kernel:
    return sample.get(name, Kernel(0, 0))


def short(name: str, most: int = 100) -> str:
    """A kernel's name without its return type and the arguments of its templates."""
    name = name.removeprefix("void ").replace("(anonymous namespace)::", "")
    for bracket in "<(":
        start = name.find(bracket)
        if start > 0 and not name.startswith("Mem"):
            name = name[:start]
    return name[:most]
