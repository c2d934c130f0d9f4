"""How long the C++ kernels take to compile at first use, and to load after that.

Every sample is a process with a cache directory of its own, the cases taking turns; importing is
not counted. Where other work runs beside it the seconds of the compilers' own time tell more: they
are shared by as many cores as there are libraries to compile at the same time.

    taskset -c 0,1 python -m benchmarks.cpu_build [--repeats 7]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from benchmarks.timing import machine
from opsgraph.kernels.cpu import build

CASES: dict[str, Callable[[], str | None]] = {
    "side by side": build.why_not,
    "one after another": lambda: next(filter(None, map(build.reason, build.EVERYDAY)), None),
    "quantize": lambda: build.reason("quantize"),
}
"""The libraries of plans without recipes, in two ways, and that of recipes."""


def sample(name: str) -> dict[str, float]:
    """Seconds to compile, by the clock and of the compilers; in a process made for it."""
    start = time.perf_counter()
    reason = CASES[name]()
    seconds = time.perf_counter() - start
    if reason is not None:
        raise SystemExit(reason)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"clock": seconds, "compilers": used.ru_utime + used.ru_stime}


def in_a_process(name: str, cache: str) -> dict[str, float]:
    """`sample` elsewhere."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.cpu_build", "--sample", name],
        env={**os.environ, "XDG_CACHE_HOME": cache}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return dict(json.loads(done.stdout))


def main() -> None:
    """Print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--sample", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.sample:
        print(json.dumps(sample(args.sample)))
        return
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.repeats):
        for name in CASES:
            with tempfile.TemporaryDirectory() as cache:
                found.setdefault(name, []).append(in_a_process(name, cache))
                found.setdefault(f"{name}, kept", []).append(in_a_process(name, cache))
    print(f"{machine()}; medians of {args.repeats}, and the least")
    for name, samples in found.items():
        clock, used = ([one[key] for one in samples] for key in ("clock", "compilers"))
        told = f"{statistics.median(clock):.3f} s ({min(clock):.3f})"
        print(f"{name:<26}{told}, of the compilers {statistics.median(used):.2f} s")


if __name__ == "__main__":
    main()
