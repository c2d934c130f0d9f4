"""Many lives in a row, as one process takes them."""

import traceback
from typing import NamedTuple

import torch

from .lives import live, script, shrink
from .plots import Plot

BLOCK = 5
"""Lives that a process takes at once."""


class Failure(NamedTuple):
    """A life that failed."""

    seed: int
    error: str
    script: str


class Block(NamedTuple):
    """What became of some lives."""

    first: int
    steps: int
    failures: list[Failure]


def run_block(first: int, device: str) -> Block:
    """Live `BLOCK` lives, from a seed on."""
    torch.set_num_threads(1)
    steps, failures = 0, []
    for seed in range(first, first + BLOCK):
        plot = Plot(seed, device=device)
        lived = live(plot.start, plot.steps)
        steps += lived.steps
        if lived.error is not None:
            failures.append(_failure(seed, plot, lived.error))
    return Block(first, steps, failures)


def _failure(seed: int, plot: Plot, error: BaseException) -> Failure:
    said, kind = f"{type(error).__name__}: {error}", type(error)

    def alike(other: BaseException) -> bool:
        return type(other) is kind and str(other)[:12] == str(error)[:12]

    where = "".join(traceback.format_tb(error.__traceback__)[-2:])
    shorter = shrink(plot.start, plot.steps, alike)
    return Failure(seed, f"{said}\n{where}", script(plot.start, shorter))
