"""Plans for an example input, before there is a call: `Sequential.plan`, and its extra inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import config
from ..base.errors import OpsgraphError, PlanError
from ..guards.torch_private import opaque
from ..guards.validation import flag
from ..op import Op
from ..ops.sizes import width_between
from ..plan import Plan
from .extras import ExtraInputs
from .inputs import verify_tensor
from .page import fragment
from .show import escaped


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

    def _repr_html_(self) -> str:
        called = "".join(f"<p>{escaped(text)}</p>" for text in self.called)
        return "".join(map(fragment, self)) + called


class StageExamples:
    """What a stage tells of its plans."""

    ops: Sequence[Op]
    table: Any
    extras: ExtraInputs
    outdated: Callable[[], bool]
    renewed: Callable[[], Any]
    weights: Callable[[], list[Tensor | None]]
    key: Callable[..., Any]
    ensure: Callable[..., Plan]

    def plan(self, training: bool, x: Tensor | None) -> Any:
        """The plan for an example input, by default one in the parameters' dtype and device."""
        if self.outdated():
            return self.renewed().plan(training, x)
        weights = self.weights()
        if x is None:
            x = self._example(weights)
        x = x.detach().requires_grad_(training)
        extras = self.extras.example(x)
        for extra in extras:
            extra.requires_grad_(training and extra.is_floating_point())
        with torch.set_grad_enabled(training):
            key = self.key(x, extras, weights)
        return self.ensure(key)

    def _example(self, weights: Sequence[Tensor | None]) -> Tensor:
        width = width_between(self.ops)
        if width is None:
            raise PlanError(f"{self.table.run.labels[0]}: got no width to plan for, expected x")
        there = [w for w in weights if w is not None]
        like = next((w for w in there if w.dim() > 1), there[0] if there else torch.empty(0))
        return torch.empty(2, width, dtype=like.dtype, device=like.device)


class SequenceExamples:
    """What a Sequential tells of its plans."""

    _epoch: int
    training: bool
    _prepare: Callable[[int | None], None]
    _current: Callable[[], list[Any]]
    _entries: Callable[[], Iterable[Any]]

    @opaque
    def plan(self, training: bool = True, x: Tensor | None = None) -> Any:
        """The plan for a call in training or inference: what runs, what is saved, and why.

        x: an example input; by default one in the parameters' dtype and device. Returns a Plan, or
        `Plans`, a tuple of them, where plain modules stand between ops.
        """
        training = flag("plan", "training", training)
        if x is not None:
            verify_tensor(x, "plan")
        if self._epoch != config.epoch:
            self._prepare(None if x is None else x.shape[-1])
        found: list[Plan] = []
        for stage in self._current():
            if isinstance(stage, StageExamples):
                made = stage.plan(training, x)
                found += made if isinstance(made, Plans) else [made]
                x = found[-1].specs.outputs[0].empty(2)  # as far as is known, the next one's
        called = [entry.shown for entry in self._entries() if entry.called]
        if not found and not called:
            raise PlanError("there are no ops to plan")
        if len(found) == 1 and not called:
            return found[0]
        return Plans(found, called)

    def _repr_html_(self) -> str:
        """What notebooks show: the modules, and the plan of the mode that it is in."""
        try:
            shown = self.plan(self.training)._repr_html_()
        except OpsgraphError as error:
            shown = f"<p>no plan yet: {escaped(str(error))}</p>"
        return f"<pre>{escaped(repr(self))}</pre>{shown}"

    def example_extras(self, x: Tensor) -> list[Tensor]:
        """Uninitialized extra inputs of the right shapes for x, where all ops are planned."""
        if self._epoch != config.epoch:
            self._prepare(x.shape[-1])
        (stage,) = self._current()
        assert isinstance(stage, StageExamples)
        return stage.extras.example(x)
