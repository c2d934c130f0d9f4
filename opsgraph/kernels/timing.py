"""Times of kernels on a GPU, compared in alternation."""

import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from .choices import Choice, Run

ROUNDS, PAIRS = 7, 15
"""How often each candidate runs, and then the best one and the usual one alone."""
NEAR = 1.25
"""Candidates that need more than that times the best in their first runs are left out."""
CLEARLY = 0.98
"""A candidate takes the first one's place only if it needs less than that part of its time."""
FILLS = 4
"""Fills of memory before a run, at the least: the GPU's cache is cold, and while it is busy with
them the host's calls get ahead of it."""
MOST_FILLS = 64


def fastest_on_cuda(candidates: Mapping[str, Run]) -> Choice:
    """The candidate that runs fastest on the current device and stream, by medians of its times.

    The first candidate, the usual one, keeps its place unless another is clearly faster, there and
    in a duel of the two alone.
    """
    room = torch.empty(4 * _cache_bytes(), dtype=torch.uint8, device="cuda")
    usual = next(iter(candidates))
    for run in candidates.values():
        run()  # compiles, and makes what the library makes at first use
    fills = _fills(candidates, room)
    first = _times(candidates, 2, room, fills)
    bound = NEAR * min(map(min, first.values()))
    near = {n: run for n, run in candidates.items() if n == usual or min(first[n]) <= bound}
    times = _times(near, ROUNDS, room, fills) if len(near) > 1 else first
    best = min(near, key=lambda name: median(times[name]))
    if median(times[best]) >= CLEARLY * median(times[usual]):
        return Choice(usual, usual)
    duel = _times({name: candidates[name] for name in (best, usual)}, PAIRS, room, fills)
    ratio = median(a / b for a, b in zip(duel[best], duel[usual], strict=True))
    return Choice(best, usual, ratio) if ratio < CLEARLY else Choice(usual, usual)


def _fills(candidates: Mapping[str, Run], room: Tensor) -> int:
    """How many fills last longer than the host needs for any candidate's calls."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    for event in events:
        for _ in range(FILLS):
            room.zero_()
        event.record()
    events[-1].synchronize()
    fill = max(events[0].elapsed_time(events[1]) / FILLS, 1e-3)
    host = 1000 * max(min(_seconds(run) for _ in range(3)) for run in candidates.values())
    return min(MOST_FILLS, FILLS + int(1.5 * host / fill))


def _seconds(run: Run) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _times(
    candidates: Mapping[str, Run], rounds: int, room: Tensor, fills: int
) -> dict[str, Sequence[float]]:
    """Milliseconds of each candidate in each round; they take turns."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(fills):
                room.zero_()
            start.record()
            run()
            stop.record()
            events[name].append((start, stop))
        stop.synchronize()
    return {n: [a.elapsed_time(b) for a, b in pairs] for n, pairs in events.items()}


def median(times: Iterable[float]) -> float:
    """The upper one of an even number of times."""
    ordered = sorted(times)
    return ordered[len(ordered) // 2]


def _cache_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
