"""What the first calls of a module cost beyond compiling: planning, and recording its passes.

A module of a structure that was never planned, whose kernels and products another one has used: its
ops have other names. Its first training step plans both passes, its second records them. From each
is taken what a step takes that is neither: that of a module which runs its passes from Python, as
the first two do as well. Its third has the text of the records compiled, and takes that longer than
a later one. A second module of the same structure, under the same recipe, has the plan
and the records of the first: what its first step takes beyond the next one is its own stage.
`benchmarks.overhead` measures all that too.

    python -m benchmarks.first_call [--recipes none,current,...] [--repeats 30] [--out FILE]
"""

import argparse
import gc
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.calls import TRAINING, calls_of, inputs
from benchmarks.peers import RECIPES, Block, Peer, Weights, make_weights, ours, replay
from benchmarks.timing import machine, spread
from opsgraph.guards import compiled

LIMIT = 3e-3
"""Seconds that planning and recording may take together."""
WARM = 5
_numbers = count(1)

Step = Callable[[], Any]


class First(NamedTuple):
    """Seconds of a new module's first three steps, of one that runs its passes from Python, of the
    first step of a module of equal structure, and of a step of it later."""

    first: float
    second: float
    third: float
    python: float
    equal: float
    replayed: float

    @property
    def planning(self) -> float:
        """What the first step takes for the plan."""
        return self.first - self.python

    @property
    def recording(self) -> float:
        """What the second takes for the records."""
        return self.second - self.python

    @property
    def text(self) -> float:
        """What the third takes for the text of the records."""
        return self.third - self.replayed

    @property
    def again(self) -> float:
        """What the first step of a second module of the structure takes beyond a step."""
        return self.equal - self.replayed


def new_step(block: Block, weights: Weights, like: Peer | None = None) -> tuple[Step, Peer]:
    """A training step of a module that no plan was made for. Its source is compiled anew, too.

    like: a module that is of the same structure, under the same recipe.
    """
    compiled._code.cache_clear()
    first = None if like is None else next(iter(like.module._modules))
    prefix = f"{next(_numbers)}_" if first is None else first.removesuffix("0")
    peer = ours(block, weights, prefix=prefix)
    if like is not None:
        peer = peer._replace(context=like.context)
    step: Step = calls_of(peer, *inputs(block))[TRAINING]
    return step, peer


def timed(step: Step, synchronize: Step) -> float:
    """Seconds of one step, the device's included."""
    synchronize()
    start = time.perf_counter()
    step()
    synchronize()
    return time.perf_counter() - start


def firsts(block: Block, repeats: int, synchronize: Step = lambda: None) -> Iterator[First]:
    """Samples, each of a module of its own and of one that replays nothing, in turns."""
    weights = make_weights(block)
    with replay(False):
        python, _ = new_step(block, weights)
        for _ in range(WARM):
            python()
    with replay(True):
        warm, _ = new_step(block, weights)  # and with it whatever is made once for a process
        for _ in range(WARM):
            warm()
        for _ in range(repeats):
            step, peer = new_step(block, weights)
            gc.collect(0)  # so that each has the collections that it causes, and no other's
            first, second = (timed(step, synchronize) for _ in range(2))
            usual = statistics.median(timed(python, synchronize) for _ in "123")
            third = timed(step, synchronize)
            other, _ = new_step(block, weights, peer)
            equal = timed(other, synchronize)
            other()
            replayed = statistics.median(timed(other, synchronize) for _ in "123")
            yield First(first, second, third, usual, equal, replayed)


def measured(block: Block, repeats: int, synchronize: Step = lambda: None) -> dict[str, Any]:
    """A record: medians and quartiles of seconds."""
    samples = [*firsts(block, repeats, synchronize)]
    values = {
        "planning": [each.planning for each in samples],
        "recording": [each.recording for each in samples],
        "together": [each.planning + each.recording for each in samples],
        "text": [each.text for each in samples],
        "again": [each.again for each in samples],
        "python": [each.python for each in samples],
    }
    place = {"rows": block.rows, "hidden": block.hidden, "ffn": block.ffn}
    found = {name: spread(seconds) for name, seconds in values.items()}
    return {"recipe": block.recipe, **place, "seconds": found}


def cases(
    blocks: Iterable[Block], repeats: int, synchronize: Step = lambda: None
) -> list[dict[str, Any]]:
    """A record for each block."""
    return [measured(block, repeats, synchronize) for block in blocks]


def blocks(
    size: tuple[int, int, int], recipes: Iterable[str], dtype: torch.dtype, device: torch.device
) -> list[Block]:
    """One size under every recipe."""
    return [*map(partial(Block, *size, dtype, device), recipes)]


def table(records: Iterable[dict[str, Any]]) -> str:
    """The records for the eye, milliseconds."""
    names = "planning", "recording", "together", "text", "again"
    head = "".join(f"{name:>12}" for name in names)
    lines = [f"{'the first calls, ms':<32}{head}{'limit':>8}"]
    for record in records:
        title = f"{record['rows']} rows {RECIPES[record['recipe']]}".strip()
        cells = "".join(f"{record['seconds'][name]['median'] * 1e3:>12.2f}" for name in names)
        lines.append(f"{title:<32}{cells}{LIMIT * 1e3:>8.0f}")
    return "\n".join(lines)


def misses(records: Iterable[dict[str, Any]]) -> list[str]:
    """The recipes whose first calls take longer than that."""
    late = [r for r in records if r["seconds"]["together"]["median"] > LIMIT]
    return [f"first calls {RECIPES[record['recipe']]}".strip() for record in late]


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--recipes", default="none,current,delayed,blocks", help="by comma")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args(arguments)
    if wrong := set(args.recipes.split(",")) - set(RECIPES):
        raise SystemExit(f"got {', '.join(sorted(wrong))}, expected some of {', '.join(RECIPES)}")
    place, size = torch.device(args.device), (64, 256, 512)
    wait = torch.cuda.synchronize if place.type == "cuda" else lambda: None
    torch.set_num_threads(1)
    found = cases(blocks(size, args.recipes.split(","), torch.bfloat16, place), args.repeats, wait)
    print(f"{machine()}\n\n{table(found)}")
    if args.out:
        results = {"machine": machine(), "torch": torch.__version__, "first_calls": found}
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    main()
