"""Measures what a module runs on this machine, and keeps what is best.

Every Sequential and LayerNormMLP in the module, and every op, is run by itself on random rows, in
training and in inference. Then it is measured, in this order:

    products        measure themselves when a product of a new class runs, here as anywhere
    configurations  each line of a plan runs once; what it asks for and is not known is measured
                    by repeating the line with each configuration that is offered (`configs`)
    plans           each plan that `measured.candidates` offers runs forward and backward

All is measured in alternation, and kept only if it is clearly faster than what is usual.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..base.errors import OpError
from ..features import measured
from ..kernels import configs
from ..kernels.choices import Choice, Choices, stores, working
from ..layernorm_mlp import LayerNormMLP
from ..op import Op
from ..ops.sizes import width_between
from ..plan import Plan
from ..plan.claims import Space
from ..plan.lines import Function, Line
from ..plan.planner import Cover, greedy
from ..plan.result import Passes
from ..replay.interpreter import run_line
from ..replay.recording import STRUCTURAL
from ..run.sequential import Sequential
from ..run.stage import Stage

Context = Callable[[], AbstractContextManager[Any]]
Told = Callable[[str], object]
TUNABLE = Sequential, LayerNormMLP, Op


class Call(NamedTuple):
    """A call of a stage that was seen: its plan's key, and what it was given."""

    stage: Stage
    key: Any
    tensors: tuple[Tensor, ...]
    grad: bool

    def run(self, plan: Plan) -> None:
        """Repeat it with a plan; forward, and backward if gradients were wanted."""
        weights = self.stage.weights()
        for weight in weights:
            if weight is not None:
                weight.grad = None  # else gradients are added up
        with torch.set_grad_enabled(self.grad):
            x, *extras = (t.detach().requires_grad_(t.requires_grad) for t in self.tensors)
            if extras or self.stage.trailing:
                extras = list(self.stage.extras.verified(x, extras))
            _backward(self.stage.run_plan(plan, x, extras, weights))


def tune(
    module: nn.Module, rows: Sequence[int], width: int | None = None,
    context: Context = ExitStack, told: Told = lambda text: None,
) -> None:  # fmt: skip
    """Measure what `module` runs with so many rows, the largest number first.

    width: of the input, where the module does not tell. context: makes the autocast to run in.
    told: is called with what is done next. Raises OpError.
    """
    parts = list(_parts(module))
    if not parts:
        kinds = ", ".join(kind.__name__ for kind in TUNABLE)
        raise OpError(type(module).__name__, "no module to tune", f"one of {kinds} in it")
    for part in parts:
        calls: dict[Any, list[Call]] = {}
        for count in sorted(rows, reverse=True):
            tensors = inputs(part, count, width)
            for training in (True, False):
                told(f"products, {count} rows, {'training' if training else 'inference'}")
                with _noted(calls), context():
                    _run(part, tensors, training)
        for seen in calls.values():
            with context():
                _plans(seen, told)


def _parts(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, TUNABLE):
        yield Sequential(module) if isinstance(module, Op) else module
        return
    for child in module.children():
        yield from _parts(child)


def inputs(module: nn.Module, rows: int, width: int | None) -> list[Tensor]:
    """Random rows, with extra inputs; groups of rows are of equal sizes."""
    if isinstance(module, LayerNormMLP):
        width = module.hidden_size
    else:
        width = width_between([*module.children()]) or width
    if width is None:
        raise OpError(type(module).__name__, "no width for its input", "--width")
    floats = (p for p in module.parameters() if p.is_floating_point())
    like = next(floats, torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu"))
    x = torch.randn(rows, width, device=like.device).to(like.dtype)
    extras = module.example_extras(x) if isinstance(module, Sequential) else []
    return [x, *(_filled(extra, rows) for extra in extras)]


def _filled(extra: Tensor, rows: int) -> Tensor:
    if extra.is_floating_point():
        return extra.normal_()
    count = max(1, extra.numel())
    sizes = torch.full_like(extra, rows // count)
    if extra.numel():
        sizes.view(-1)[-1] += rows % count
    return sizes


def _run(module: nn.Module, tensors: Iterable[Tensor], training: bool) -> None:
    module.train(training)
    x, *extras = (t.detach().requires_grad_(training and t.is_floating_point()) for t in tensors)
    with torch.set_grad_enabled(training):
        _backward(module(x, *extras))


def _backward(result: Any) -> None:
    results = result if isinstance(result, tuple) else (result,)
    ends = [y for y in results if isinstance(y, Tensor) and y.requires_grad]
    if ends:
        torch.autograd.backward(ends, [torch.ones_like(y) for y in ends])


@contextmanager
def _noted(calls: dict[Any, list[Call]]) -> Iterator[None]:
    """Note the calls of stages, by what a plan is for."""
    original = Stage.__call__

    def call(stage: Stage, x: Tensor, extras: Sequence[Tensor], *rest: Any) -> Any:
        grad = torch.is_grad_enabled()
        key = stage.key(x, extras, stage.weights())
        copies = (t.detach().requires_grad_(t.requires_grad) for t in (x, *extras))
        calls.setdefault((id(stage.table), key), []).append(Call(stage, key, (*copies,), grad))
        return original(stage, x, extras, *rest)

    setattr(Stage, "__call__", call)  # noqa: B010 - a method is no variable to mypy
    try:
        yield
    finally:
        setattr(Stage, "__call__", original)  # noqa: B010


def _plans(calls: Sequence[Call], told: Told) -> None:
    """Measure the configurations of a stage's plans, and the plans themselves."""
    first = calls[0]
    stage, key = first.stage, first.key
    names: list[str] = []
    text = ""

    def look(space: Space) -> Cover:
        nonlocal text
        text, names[:] = measured.key(space), measured.candidates(space)
        return greedy(space)

    def planned(name: str) -> Plan:
        return stage.make(key, lambda space: measured.named(space, name) or greedy(space))

    stage.make(key, look)
    kept = measured.plans(calls[0].tensors[0].device)
    what, _, _ = text.rpartition(" ")
    plans = {name: planned(name) for name in names}
    for name, plan in plans.items():
        told(f"configurations, {what}, {name}")
        # By the largest number of rows alone: a configuration holds for all.
        first.run(_by_lines(plan))
    if kept is None or kept.known(text) is not None:
        return
    told(f"{len(plans)} plans, {what}")
    runs = {name: partial(_all, calls, plan) for name, plan in plans.items()}
    kept.choose(text, lambda: working(runs))


def _all(calls: Iterable[Call], plan: Plan) -> None:
    for call in calls:
        call.run(plan)


def _by_lines(plan: Plan) -> Plan:
    """A plan whose functions measure the configurations that their lines ask for."""
    passes = Passes(*(partial(_pass, function) for function in plan.functions))
    return replace(plan, passes=passes, joined=None)


def _pass(function: Function, *arguments: Any) -> Any:
    if not function.lines:
        return function.call(*arguments)
    variables = dict(zip(function.parameters, arguments, strict=True))
    ops, result = variables.get("ops"), None
    for line in function.lines:
        if line.function not in STRUCTURAL:
            with configs.asked() as found:
                _repeat(line, ops, variables)
            for where, offered in found.items():
                configs.decide(where, offered, partial(_repeat, line, ops, variables))
        result = run_line(line, ops, variables)
    return result


def _repeat(line: Line, ops: Any, variables: Mapping[str, Any]) -> Any:
    """Run a line and leave the variables as they are."""
    return run_line(line, ops, dict(variables))


class Made(NamedTuple):
    """A choice that was made."""

    choices: Choices
    key: str
    choice: Choice


def made(since: float) -> list[Made]:
    """What was measured since a moment, in Unix time, by kind."""
    return [
        Made(kept, key, choice)
        for kept in stores()
        for key, choice in sorted(kept.since(since).items())
    ]
