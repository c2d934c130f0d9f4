"""`python -m opsgraph.testing.fuzz`: random lives of random modules, on all cores, for a while.

What has been lived is kept in a folder, so that the next run goes on there. A life that fails is
shrunk, printed and kept as a script that runs by itself.
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from platform import python_version
from typing import Any

from .blocks import BLOCK, Block, run_block
from .plots import BACKENDS


def main(argv: Sequence[str] | None = None) -> int:
    """Run lives until the time is over; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(prog="python -m opsgraph.testing.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the first life (default 0)")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--device", help="interpreter: of Triton, on the CPU", choices=[*BACKENDS], default="cpu"
    )
    parser.add_argument("--out", type=Path, default=Path("fuzz"), help="folder (default fuzz)")
    args = parser.parse_args(argv)
    if args.device == "interpreter":
        os.environ["TRITON_INTERPRET"] = "1"  # before the processes start
    if args.device != "cuda":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # or each process starts as many again
    log = args.out / f"{args.device}-{args.seed}.jsonl"
    args.out.mkdir(parents=True, exist_ok=True)
    past = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    start, failed = time.monotonic(), 0
    end = start + 60 * args.minutes
    firsts = _firsts(args.seed, {entry["first"] for entry in past if "first" in entry})
    with log.open("a") as out, _shown() as show:

        def write(**entry: Any) -> None:
            past.append(entry)
            out.write(json.dumps(entry) + "\n")
            out.flush()

        for block in _blocks(firsts, args.device, args.processes, end):
            found = [failure for failure in block.failures if failure.known is None]
            known = {f.seed: f.known for f in block.failures if f.known is not None}
            failed += len(found)
            seeds = [failure.seed for failure in found]
            write(first=block.first, steps=block.steps, failed=seeds, known=known)
            for failure in found:
                path = args.out / f"failed_{failure.seed}.py"
                path.write_text(failure.script)
                print(f"{failure.error}\n{path}:\n{failure.script}", flush=True)
            left = max(0.0, end - time.monotonic())
            show(f"{_counted(past)}, {left:.0f} s left")
        if past:
            write(seconds=time.monotonic() - start, processes=args.processes, **_versions())
    print(_summary(args.device, past))
    return 1 if failed else 0


def _counted(entries: Sequence[dict[str, Any]]) -> str:
    blocks = [entry for entry in entries if "first" in entry]
    known = Counter(name for block in blocks for name in block.get("known", {}).values())
    apart = "".join(f", {n} ended by a known fault ({name})" for name, n in known.items())
    steps, failed = (sum(block["steps"] for block in blocks), sum(len(b["failed"]) for b in blocks))
    return f"{BLOCK * len(blocks):,} lives, {steps:,} steps, {failed} failed{apart}"


def _summary(device: str, entries: Sequence[dict[str, Any]]) -> str:
    """What a log holds: counts, seeds, and of each run how long it took, and with what."""
    firsts = [entry["first"] for entry in entries if "first" in entry]
    seeds = f"; seeds {min(firsts)} to {max(firsts) + BLOCK - 1}" if firsts else ""
    runs = [
        f"; {run['seconds'] / 3600:.3f} hours by {run['processes']} process(es), {run['versions']}"
        for run in entries
        if "seconds" in run
    ]
    return f"{device}: {_counted(entries)}{seeds}{''.join(runs)}"


def _versions() -> dict[str, str]:
    found = [f"Python {python_version()}"]
    for name in ("torch", "triton", "numpy", "opsgraph"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return {"versions": ", ".join(found)}


def _firsts(seed: int, done: set[int]) -> Iterator[int]:
    return (first for first in count(seed, BLOCK) if first not in done)


def _blocks(firsts: Iterator[int], device: str, processes: int, end: float) -> Iterator[Block]:
    """Blocks as they are done, by threads with a process each, started until a moment."""
    with ThreadPoolExecutor(processes) as pool:
        waiting: set[Future[Block]] = set()
        while waiting or time.monotonic() < end:
            while len(waiting) < processes and time.monotonic() < end:
                waiting.add(pool.submit(run_block, next(firsts), device))
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)


class _shown:
    """Says how far it is: on one line of a terminal, and not at all elsewhere."""

    def __enter__(self) -> Any:
        def show(text: str) -> None:
            if sys.stderr.isatty():
                print(f"\r{text:<78}", end="", file=sys.stderr, flush=True)

        return show

    def __exit__(self, *error: object) -> None:
        if sys.stderr.isatty():
            print(file=sys.stderr)


if __name__ == "__main__":
    raise SystemExit(main())
