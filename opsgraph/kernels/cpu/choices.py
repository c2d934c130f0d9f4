"""Choices between equal computations that are measured once and remembered, in memory and on disk.

The file belongs to one CPU model, torch version and set of instructions, and lies beside the
compiled kernels (`build`). It is replaced as a whole by renaming, after what others have written
meanwhile is read again. Writers may overwrite each other's entries, which are then measured again,
but no reader ever sees half a file. A file that cannot be read or written is left out with a
warning.
"""

import json
import os
import platform
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from .build import directories, replace

Run = Callable[[], object]
Measure = Callable[[Mapping[str, Run]], str]

CLEARLY = 0.97
"""A candidate takes the first one's place only if it needs less than that part of its time."""
NEAR = 1.25
"""Candidates that need more than that times the best are measured no further."""
ENOUGH = 0.1
"""Seconds that rounds of quick candidates go on for, since their times vary the more."""
MOST_ROUNDS = 12
PAIRS = 5
"""Rounds of the best one against the usual one alone: a machine's speed may change meanwhile."""
RULES = 4
"""Number of the rules by which is measured: other rules' choices are not read."""


def fastest(candidates: Mapping[str, Run], rounds: int = 3) -> str:
    """The name of the candidate that runs fastest, by the least of some times in alternation.

    rounds: how often each runs at the least; quick ones run up to `MOST_ROUNDS` times. The first
    candidate, the usual one, keeps its place unless another is clearly faster, there and in the
    median of some rounds of the two alone.
    """
    least = {}
    for name, run in candidates.items():
        run()  # makes what the library makes at first use
        least[name] = _seconds(run)
    more = int(ENOUGH / max(sum(least.values()), 1e-9))
    for _ in range(max(rounds, min(MOST_ROUNDS, more)) - 1):
        bound = NEAR * min(least.values())
        for name, run in candidates.items():
            if least[name] <= bound:
                least[name] = min(least[name], _seconds(run))
    usual = next(iter(candidates))
    best = min(least, key=least.__getitem__)
    if least[best] >= CLEARLY * least[usual]:
        return usual
    ratios = [_seconds(candidates[best]) / _seconds(candidates[usual]) for _ in range(PAIRS)]
    return best if sorted(ratios)[PAIRS // 2] < CLEARLY else usual


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


def cache_files() -> list[Path]:
    """Where this machine's choices may be kept, in order."""
    what = (RULES, cpu_model(), torch.__version__, torch.backends.cpu.get_cpu_capability())
    name = f"gemm-{sha256(repr(what).encode()).hexdigest()[:16]}.json"
    return [directory / name for directory in directories()]


class Choices:
    """Names of candidates by key. All methods may be called by any thread.

    files: where they are kept: read from the first that is there, written to the first that can be;
    with none they are forgotten with the process. measure: returns the name of the fastest of the
    candidates that it is given.
    """

    def __init__(
        self, files: Callable[[], Iterable[Path]] = cache_files, measure: Measure = fastest
    ) -> None:
        self.files, self.measure = files, measure
        self._lock = threading.Lock()
        self._found: dict[str, str] | None = None
        os.register_at_fork(after_in_child=self._forked)

    def _forked(self) -> None:
        self._lock = threading.Lock()

    def choose(self, key: str, candidates: Callable[[], Mapping[str, Run]]) -> str:
        """The choice for a key; measured, and written to the file, if there is none yet.

        Once made it stays for as long as the process lives.
        """
        with self._lock:
            if self._found is None:
                self._found = self._read()
            runs = candidates()
            if self._found.get(key) not in runs:
                made = self.measure(runs)
                there = self._read()
                # Another process may have measured it meanwhile: all are to compute the same bits.
                self._found[key] = there[key] if there.get(key) in runs else made
                self._write(there | {key: self._found[key]})
            return self._found[key]

    def _read(self) -> dict[str, str]:
        for path in self.files():
            try:
                found = json.loads(path.read_text())
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError) as error:
                warnings.warn(f"opsgraph: {path} is ignored: {error}", stacklevel=2)
                continue
            if isinstance(found, dict) and all(isinstance(v, str) for v in found.values()):
                return found
            warnings.warn(f"opsgraph: {path} is ignored: it holds no choices", stacklevel=2)
        return {}

    def _write(self, choices: Mapping[str, str]) -> None:
        failures = []
        for path in self.files():
            try:
                replace(path, json.dumps(choices, indent=1, sort_keys=True).encode())
                return
            except OSError as error:
                failures.append(f"{path}: {error.strerror or error}")
        if failures:
            text = "; ".join(failures)
            warnings.warn(f"opsgraph: measured choices are not kept: {text}", stacklevel=2)
