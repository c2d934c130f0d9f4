"""Ops with hooks or a forward of their own: they leave the fused run, and are called as modules.

So hooks fire as in nn.Sequential; the plan says so. Hooks for all modules
(`register_module_forward_hook`) are no reason: they see the Sequential, and of its ops those that
are called anyway. The hook is `spread`, through which a Sequential looks at its modules.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..base import config
from ..base.errors import PlanError
from ..guards.torch_private import constant_under_compile
from ..guards.watched import HOOKS, serving
from ..op import Op


class Entry(NamedTuple):
    """A module as it takes part in a sequence."""

    label: str
    module: nn.Module
    called: str | None
    """Why it is called as a module although it is an op."""

    @property
    def fused(self) -> bool:
        """Whether it is planned with its neighbours."""
        return isinstance(self.module, Op) and self.called is None

    @property
    def shown(self) -> str:
        """What plans say of it."""
        return f"{self.label}: called as a module, for {self.called}"


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
        yield Entry(label, module, None)
        return
    why = None if called else reason(module)
    inner = [op for op in module.modules() if isinstance(op, Op) and op is not module]
    if why is not None or not any(map(reason, inner)):
        yield Entry(label, module, why)
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


class Alone:
    """What the `forward` of an op runs that is called: the sequence that `make` makes."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self.make = make
        self.inner: Any = None

    @constant_under_compile  # Dynamo looks past a cache, and cannot follow what makes a sequence
    def prepare(self) -> None:
        """See that there is a sequence."""
        with config.lock:
            if self.inner is None:
                self.inner = self.make()

    def __call__(self, *inputs: Tensor) -> Any:
        self.prepare()
        return self.inner.forward(*inputs)


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


class Called:
    """What a stage of one op does that is called. inner: the sequence of that op alone."""

    call: CalledOp
    inner: Any

    def plan(self, training: bool, x: Tensor | None) -> Any:
        """The plan for what the op's own `forward` runs."""
        return self.inner.plan(training, x)

    def __call__(self, x: Tensor, extras: Sequence[Tensor], compiling: bool = False) -> Any:
        return self.call(x, *extras)


def called(
    op: Op, why: str, kind: type[Any], arguments: tuple[Any, ...], alone: Callable[..., Any]
) -> Any:
    """A stage that calls an op. arguments: of `kind`, the class of such stages.

    One that may have extra inputs and outputs is planned too. One with a forward of its own may
    have no plan; `alone` makes the sequence that it runs once that forward asks for it.
    """
    _, (label,), options, *_ = arguments

    def make() -> Any:
        name = label.split(":")[0]  # for the same label
        return alone(OrderedDict({name: op}), **options.given(), queue=options.queue)

    run = Alone(make)
    kinds = [entry.kind for entry in op.lower()] if hasattr(op, "fwd") else []
    if why != "hooks" and not any(kind.taps or kind.extra_inputs for kind in kinds):
        return CalledOp(op, run)
    stage = kind(*arguments)
    run.prepare()
    stage.inner, stage.call = run.inner, CalledOp(op, run)
    return stage
