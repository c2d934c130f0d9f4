"""`python -m opsgraph.testing.fuzz`: random lives of random modules, on all cores, for a while.

What has been lived is kept in a folder, so that the next run goes on there. A life that fails is
shrunk, printed and kept as a script that runs by itself.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
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
    firsts = _firsts(args.seed, {block["first"] for block in past})
    lives, steps, failed = BLOCK * len(past), sum(block["steps"] for block in past), 0
    end = time.monotonic() + 60 * args.minutes
    with log.open("a") as out, _shown() as show:
        for block in _blocks(firsts, args.device, args.processes, end):
            lives, steps, failed = lives + BLOCK, steps + block.steps, failed + len(block.failures)
            seeds = [failure.seed for failure in block.failures]
            out.write(json.dumps(dict(first=block.first, steps=block.steps, failed=seeds)) + "\n")
            out.flush()
            for failure in block.failures:
                path = args.out / f"failed_{failure.seed}.py"
                path.write_text(failure.script)
                print(f"{failure.error}\n{path}:\n{failure.script}", flush=True)
            left = max(0.0, end - time.monotonic())
            show(f"{lives:,} lives, {steps:,} steps, {failed} failed, {left:.0f} s left")
    print(f"{lives:,} lives, {steps:,} steps in {log}, {failed} failed in this run")
    return 1 if failed else 0


def _firsts(seed: int, done: set[int]) -> Iterator[int]:
    return (first for first in count(seed, BLOCK) if first not in done)


def _blocks(firsts: Iterator[int], device: str, processes: int, end: float) -> Iterator[Block]:
    """Blocks as they are done, by some processes, started until a moment."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, maxtasksperchild=100) as pool:
        waiting: list[Any] = []
        while waiting or time.monotonic() < end:
            while len(waiting) < 2 * processes and time.monotonic() < end:
                waiting.append(pool.apply_async(run_block, (next(firsts), device)))
            done = [result for result in waiting if result.ready()]
            waiting = [result for result in waiting if result not in done]
            yield from (result.get() for result in done)
            time.sleep(0.05)


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
