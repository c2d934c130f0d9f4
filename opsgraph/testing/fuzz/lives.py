"""Living a life, and shrinking one that fails to a script."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from .changes import Impossible
from .compare import drop
from .life import Life

BUILDS = ("build", "mlp", "from_torch")
"""Methods that make a module."""


class Step(NamedTuple):
    """A call of a method of `Life`."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        args = [*map(repr, self.args), *(f"{k}={v!r}" for k, v in self.kwargs.items())]
        return f"life.{self.method}({', '.join(args)})"


class Lived(NamedTuple):
    """How a life went: the step that failed, if one did, and what it raised."""

    steps: int
    error: BaseException | None


def live(start: Step, steps: Sequence[Step]) -> Lived:
    """Take the steps; those that are impossible are left out."""
    taken = 0
    life = Life(*start.args, **start.kwargs)
    try:
        for step in steps:
            try:
                getattr(life, step.method)(*step.args, **step.kwargs)
                taken += 1
            except Impossible as impossible:
                drop(impossible)
                if step.method in BUILDS:
                    break
    except Exception as error:
        drop(error)
        return Lived(taken, error)
    finally:
        life.end()
    return Lived(taken, None)


def shrink(
    start: Step, steps: Sequence[Step], alike: Callable[[BaseException], bool]
) -> list[Step]:
    """Fewer steps and arguments after which a life still fails in a like way.

    After a minute it is as short as it got.
    """
    end = time.monotonic() + 60

    def fails(candidate: Sequence[Step]) -> bool:
        if time.monotonic() > end:
            return False
        error = live(start, candidate).error
        return error is not None and alike(error)

    left = list(steps)
    size = max(1, len(left) // 2)
    while True:
        at = 0
        while at < len(left):
            fewer = left[:at] + left[at + size :]
            if fewer and fewer[0].method in BUILDS and fails(fewer):
                left = fewer
            else:
                at += size
        if size == 1:
            break
        size //= 2
    for at, step in enumerate(left):
        left[at] = _plainer(step, partial(_fails_with, fails, left, at))
    return left


def _fails_with(
    fails: Callable[[Sequence[Step]], bool], steps: list[Step], at: int, step: Step
) -> bool:
    return fails([*steps[:at], step, *steps[at + 1 :]])


def _plainer(step: Step, fails: Callable[[Step], bool]) -> Step:
    """A step without the arguments and the ops that the failure does not need."""
    for name in list(step.kwargs):
        plainer = step._replace(kwargs={k: v for k, v in step.kwargs.items() if k != name})
        step = plainer if fails(plainer) else step
    if step.method == "build":
        at = 1
        while at < len(step.args):
            plainer = step._replace(args=step.args[:at] + step.args[at + 1 :])
            if len(plainer.args) > 1 and fails(plainer):
                step = plainer
            else:
                at += 1
    return step


def script(start: Step, steps: Sequence[Step]) -> str:
    """A life as a program that runs by itself."""
    options = {k: v for k, v in start.kwargs.items() if v not in (None, "greedy", "cpu")}
    made = str(start._replace(kwargs=options)).removeprefix("life.__init__")
    lines = ["from opsgraph.testing.fuzz import Life", "", f"life = Life{made}", *map(str, steps)]
    return "\n".join(lines) + "\n"
