"""What the first calls of a module cost beyond compiling: planning, and recording its passes.

A module of a structure that was never planned, whose kernels and products another one has used: its
ops have other names. Its first training step plans both passes, its second records them. From each
is taken what a step takes that is neither: that of a module which runs its passes from Python, as
the first two do as well. `benchmarks.overhead` measures it.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import torch

from benchmarks.calls import TRAINING, calls_of, inputs
from benchmarks.peers import RECIPES, Block, Weights, make_weights, ours, replay
from benchmarks.timing import spread
from opsgraph.guards import compiled

LIMIT = 3e-3
"""Seconds that planning and recording may take together."""
WARM = 5
_numbers = count(1)

Step = Callable[[], Any]


class First(NamedTuple):
    """Seconds of a new module's first two steps, and of one that runs its passes from Python."""

    first: float
    second: float
    python: float

    @property
    def planning(self) -> float:
        """What the first step takes for the plan."""
        return self.first - self.python

    @property
    def recording(self) -> float:
        """What the second takes for the records."""
        return self.second - self.python


def new_step(block: Block, weights: Weights) -> Step:
    """A training step of a module that no plan was made for. Its source is compiled anew, too."""
    compiled._code.cache_clear()
    peer = ours(block, weights, prefix=f"{next(_numbers)}_")
    step: Step = calls_of(peer, *inputs(block))[TRAINING]
    return step


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
        python = new_step(block, weights)
        for _ in range(WARM):
            python()
    with replay(True):
        warm = new_step(block, weights)  # and with it whatever is made once for a process
        for _ in range(WARM):
            warm()
        for _ in range(repeats):
            step = new_step(block, weights)
            first, second = (timed(step, synchronize) for _ in range(2))
            yield First(first, second, statistics.median(timed(python, synchronize) for _ in "123"))


def measured(block: Block, repeats: int, synchronize: Step = lambda: None) -> dict[str, Any]:
    """A record: medians and quartiles of seconds."""
    samples = [*firsts(block, repeats, synchronize)]
    values = {
        "planning": [each.planning for each in samples],
        "recording": [each.recording for each in samples],
        "together": [each.planning + each.recording for each in samples],
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
    names = "planning", "recording", "together"
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
