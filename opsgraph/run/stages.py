"""The stages of a Sequential: runs of ops that are fused, and what is called as the module it is.

An op with hooks or a forward of its own leaves the fused run and is called, so that hooks fire as
in nn.Sequential; the plan says so. Hooks for all modules (`register_module_forward_hook`) are no
reason: they see the Sequential, and of its ops those that are called anyway.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn

from ..base.errors import PlanError
from ..guards.watched import HOOKS, serving
from ..op import Op
from ..plan import Plan
from .options import Options
from .stage import Stage


class Plans(tuple[Plan, ...]):
    """The plans of a Sequential with plain modules, or ops that are called, between its ops."""

    called: tuple[str, ...]
    """Ops that are called as modules, and why."""

    def __new__(cls, plans: Iterable[Plan], called: Iterable[str] = ()) -> Plans:
        """All plans in order."""
        made = super().__new__(cls, plans)
        made.called = tuple(called)
        return made

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self), *self.called])


Entry = tuple[str, nn.Module, str | None]
"""A label, a module, and why it is called as a module although it is an op."""


def reason(op: Op) -> str | None:
    """Why an op is called as a module, or None."""
    kind = type(op)
    if "forward" in op.__dict__ or kind.forward is not Op.forward:
        return "a forward of its own"
    if kind.__call__ is not nn.Module.__call__:
        return "a __call__ of its own"
    return "hooks" if any(op.__dict__[hooks] for hooks in HOOKS) else None


def spread(label: str, module: nn.Module, called: bool) -> Iterator[Entry]:
    """A module as it takes part: an op whose inner ops are called one by one falls into its parts.

    called: whether it was called as a module already, so that its own hooks have had their turn.
    """
    if not isinstance(module, Op):
        yield label, module, None
        return
    why = None if called else reason(module)
    inner = [op for op in module.modules() if isinstance(op, Op) and op is not module]
    if why is not None or not any(map(reason, inner)):
        yield label, module, why
        return
    parts = module.parts()
    if parts is None:
        op = next(op for op in inner if reason(op))
        raise PlanError(
            f"{label}: got {reason(op)} on the {type(op).__name__} inside, which is never called; "
            "expected it on the outer op, or an op that tells its parts"
        )
    for part in parts:
        yield from spread(label, part, False)


class CalledOp:
    """A stage that calls an op as a module. run: what the op's `forward` does meanwhile."""

    def __init__(self, op: Op, run: Callable[..., Any]) -> None:
        self.op, self.run = op, run

    def __call__(self, x: Tensor, *extras: Tensor) -> Any:
        before = serving.stages
        serving.stages = {**before, id(self.op): self.run}
        try:
            return self.op(x, *extras)
        finally:
            serving.stages = before


class CalledStage(Stage):
    """The same, of an op that is planned; it may have extra inputs and outputs."""

    def __init__(self, op: Op, run: Any, *arguments: Any) -> None:
        super().__init__([op], *arguments)
        self.call, self.inner = CalledOp(op, run.forward), run

    def plan(self, training: bool, x: Tensor | None) -> Any:
        """The plan for what the op's own `forward` runs."""
        return self.inner.plan(training, x)

    def __call__(self, x: Tensor, extras: Sequence[Tensor], compiling: bool = False) -> Any:
        return self.call(x, *extras)


def reads(module: nn.Module) -> Iterator[str | None]:
    """Channels of a module's extra inputs."""
    for kind, op in module.lower() if isinstance(module, Op) else ():
        yield from (op.channels.get(name) for name in kind.extra_inputs)


def unmatched(stages: list[Stage | nn.Module], stage: Stage) -> list[str]:
    """The extra inputs of a stage that no stage before it makes."""
    before = stages[: stages.index(stage)]
    made = {n for s in before if isinstance(s, Stage) for n in s.output_names if n}
    return [name for _, name, channel in stage.inputs if channel not in made]


def read_later(stages: list[Stage | nn.Module], stage: Stage) -> set[str | None]:
    """Channels that later stages read."""
    after = stages[stages.index(stage) + 1 :]
    return {channel for s in after if isinstance(s, Stage) for _, _, channel in s.inputs}


def make_stages(
    entries: Iterable[Entry],
    options: Options,
    recipe: int | None,
    given: Sequence[str],
    sequence: type,
) -> list[Any]:
    """Stages and modules, in order.

    given: channels that are there. sequence: the Sequential for what a called op itself runs.
    """
    groups, stages = _groups(entries), list[Any]()
    read = [{channel for entry in group for channel in reads(entry[1])} for group in groups]
    for k, group in enumerate(groups):
        ops = [module for _, module, _ in group if isinstance(module, Op)]
        known = [n for s in stages if isinstance(s, Stage) for n in s.output_names if n]
        known += given
        later = set().union(*read[k + 1 :])
        where = [label for label, _, _ in group], options, known, later, recipe
        if not ops:
            stages.append(group[0][1])
        elif group[0][2] is None:
            stages.append(Stage(ops, *where))
        else:
            stages.append(_call(ops[0], group[0][2], where, sequence))
    return stages


def _groups(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Consecutive ops together; every other module, and ops that are called, alone."""
    groups: list[list[Entry]] = []
    last = False
    for entry in entries:
        fused = isinstance(entry[1], Op) and entry[2] is None
        if fused and last:
            groups[-1].append(entry)
        else:
            groups.append([entry])
        last = fused
    return groups


def _call(op: Op, why: str, where: tuple[Any, ...], sequence: type) -> Any:
    """A stage that calls an op as a module; one with a forward of its own may have no plan."""
    options: Options = where[1]

    @cache
    def inner() -> Any:
        name = where[0][0].split(":")[0]  # for the same label
        return sequence(OrderedDict({name: op}), **options.given(), queue=options.queue)

    kinds = [entry.kind for entry in op.lower()] if hasattr(op, "fwd") else []
    if why == "hooks" or any(kind.taps or kind.extra_inputs for kind in kinds):
        return CalledStage(op, inner(), *where)
    return CalledOp(op, lambda x: inner()(x))
