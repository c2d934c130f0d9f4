"""How the CPU's choices are measured, and for which machine they hold: `choices` keeps them."""

import platform
import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from ..choices import Choice, Run

CLEARLY = 0.97
"""A candidate takes the first one's place only if it needs less than that part of its time."""
NEAR = 1.25
"""Candidates that need more than that times the best are measured no further."""
FAR = 4.0
"""What needs so many times the best's time is not measured again, if it is `LONG` too: the library
may need seconds for a product of bf16 without AVX-512."""
LONG = 0.1
"""Seconds, more than what is made at first use takes."""
ENOUGH = 0.1
"""Seconds that rounds of quick candidates go on for, since their times vary the more."""
MOST_ROUNDS = 12
PAIRS = 5
"""Rounds of the best one against the usual one alone: a machine's speed may change meanwhile."""
RULES = 7
"""Number of the rules by which is measured: other rules' choices are not read."""


def fastest(candidates: Mapping[str, Run], rounds: int = 3) -> Choice:
    """The candidate that runs fastest, by the least of some times in alternation.

    rounds: how often each runs at the least; quick ones run up to `MOST_ROUNDS` times. The first
    candidate, the usual one, keeps its place unless another is clearly faster, there and in the
    median of some rounds of the two alone; those are left out where it is far slower.
    """
    first = {name: _seconds(run) for name, run in candidates.items()}  # and makes what stays
    far = max(LONG, FAR * min(first.values()))
    least = {
        n: first[n] if first[n] > far else min(first[n], _seconds(run))
        for n, run in candidates.items()
    }
    more = int(ENOUGH / max(sum(least.values()), 1e-9))
    for _ in range(max(rounds, min(MOST_ROUNDS, more)) - 1):
        bound = NEAR * min(least.values())
        for name, run in candidates.items():
            if least[name] <= bound:
                least[name] = min(least[name], _seconds(run))
    usual = next(iter(candidates))
    best = min(least, key=least.__getitem__)
    if least[best] >= CLEARLY * least[usual]:
        return Choice(usual, usual)
    if least[usual] >= FAR * least[best]:
        return Choice(best, usual, least[best] / least[usual])
    ratios = [_seconds(candidates[best]) / _seconds(candidates[usual]) for _ in range(PAIRS)]
    ratio = sorted(ratios)[PAIRS // 2]
    return Choice(best, usual, ratio) if ratio < CLEARLY else Choice(usual, usual)


def _seconds(run: Run) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@cache
def cpu_model() -> str:
    """The CPU's model as the system names it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine() -> tuple[str, ...]:
    """What choices for the CPU depend on: its model, torch, and the instructions that it uses."""
    unit = torch.backends.cpu.get_cpu_capability()
    return cpu_model(), unit, f"torch {torch.__version__}", f"rules {RULES}"
