"""A stage: consecutive ops of a Sequential with their parameters; it finds a plan and runs it.

The path of one eager call:

    Sequential.forward   has an op changed? the stages for the active recipe
    Stage.__call__       extra inputs are verified
    known                parameters are read, and the plan found by one check (`features.known`)
    Stage._by_key        for calls of another kind by a key (`key`), or planned, under a lock
    recipes              the plan quantizes the weights, amaxes are noted
    eager                `[rows, width]`, autocast off, one autograd.Function
    plan.passes          the generated function, whose lines call kernels

What is made anew, and when:

- a plan for a new key: another dtype, width, device, or another set of gradients that are wanted;
- a stage when a parameter appeared, disappeared or got another shape (`renewed`). Calls see that by
  a key that is new, or in `absent`;
- all stages of a Sequential when an op of it changed, or a fuser was registered (its `_prepare`).

What not every call needs is a file with one hook in `features`.

Rules, each of them broken once:

- Parameters are read from their modules at each call: others may stand there, for a while or from
  now on, and `.data` may have another dtype.
- All that a plan bakes in is in its key or in its table's; what cannot be compared has a table of
  its own.
- A stage may be used by several threads: a call leaves nothing on it.
- An op's error names the op that the user wrote (`place`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ..base import config
from ..base.errors import OpError
from ..features.compiled import Compiled
from ..features.declared_ops import check_shapes, verify_entries, verify_weights
from ..features.dtensor import completed
from ..features.examples import StageExamples
from ..features.extras import ExtraInputs
from ..features.followed import Followed, check_differentiable
from ..features.known import KnownCalls
from ..features.raised import place
from ..features.recipes import StageRecipe
from ..features.unseen import Unseen
from ..guards.torch_private import apart, finished, forward_ad, tracing, transforms
from ..op import Op, lower_plainly
from ..ops.quantize import lowered
from ..plan import Plan
from ..plan.basic_ops import BasicOps
from .eager import run_inference, run_training
from .key import PlainKey, key_of, request_of
from .options import Options
from .parameters import Parameters
from .table import table_for


class Stage(Parameters, StageExamples, Followed, Compiled):
    """A run of consecutive ops of a Sequential, with the parameters it reads."""

    run_inference = staticmethod(run_inference)

    def __init__(
        self,
        ops: Sequence[Op],
        labels: Sequence[str],
        options: Options,
        known: Iterable[str] = (),
        later: Iterable[str | None] = (),
        recipe: int | None = None,
    ) -> None:
        self.again = partial(Stage, ops, labels, options, known, later, recipe)
        self.written = tuple(ops)
        lower = lower_plainly if recipe is None else partial(lowered, recipe)
        verify_entries(entries := lower(ops, labels))
        run = BasicOps(entries, known, later)
        verify_weights(run)
        check_differentiable(run, options, recipe)
        super().__init__(run)
        self.inputs, self.outputs = run.inputs, run.outputs
        self.extras = ExtraInputs(run)
        self.trailing = self.extras.trailing
        self.output_names = [run.ops[i].channels.get("d") for i in run.outputs]
        both = zip(run.kinds, run.ops, strict=True)
        self.modes = [op for kind, op in both if kind.training_matters]
        self.ops = run.ops
        self.recipe = None if recipe is None else StageRecipe(recipe, run, self.slots)
        self.table = table_for(run, options, self.shapes)
        self.plans = self.table.plans
        self.double_backward = options.double_backward
        self.unseen = Unseen(run, self.table.run.ops, self.slots, options)
        self.eager_only = self.unseen.reason
        self.known = KnownCalls(self.slots, self.absent, self.modes, self.plans)

    def renewed(self) -> Stage:
        """A stage of the same ops as they are now; the modules with them look again when called."""
        for op in self.written:
            op.touch()
        return self.again()  # type: ignore[no-any-return]

    def key(self, x: Tensor, extras: Sequence[Tensor], weights: Sequence[Any]) -> PlainKey:
        """All that changes what is right for a call."""
        return key_of(x, extras, weights, self.modes, self.double_backward)

    def ensure(self, key: PlainKey) -> Plan:
        """The plan for a key, made unless that was done."""
        with config.lock:
            plan: Plan | None = self.plans.get(key)
            if plan is None:
                plan = self.plans[key] = self.make(key)
            return plan

    def make(self, key: PlainKey, planner: Any = None) -> Plan:
        """A plan for a key. planner: by default the one of the options."""
        # Importing opsgraph stays cheap without what plans are made with.
        from ..features.planned import planned
        from ..replay.passes import replayed

        run, options, weights = self.table.run, self.table.options, self.weights()
        check_shapes(run, self.ops, self.slots, weights)
        options.verify_fusers()
        request = request_of(key, run, self.extras.dims, weights, options)
        plan = planned(run, request, options.order, planner or options.planner, options.config)
        whole = "autograd runs through it" if options.double_backward else None
        return replayed(plan, options.config, whole, self.recipe and self.recipe.joined(plan))

    @apart  # planning is nothing to compile behind a break
    def __call__(self, x: Tensor, extras: Sequence[Tensor], compiling: bool = False) -> Any:
        if extras or self.trailing:
            extras = self.extras.verified(x, extras)
        plan, found, scales = (None, None, None) if compiling else self.known(x, extras)
        if plan is None:
            return self._by_key(x, extras, found, compiling)
        return self.run_plan(plan, x, extras, found, scales)

    def _by_key(self, x: Tensor, extras: Sequence[Tensor], found: Any, compiling: bool) -> Any:
        """A call of no known kind. found: the parameters, but for attributes; None if not read."""
        for module, name in self.absent:
            if module._parameters.get(name) is not None:
                return self.renewed()(x, extras, compiling)
        weights = self.weights() if found is None else completed(self.slots, found)
        key = key_of(x, extras, weights, self.modes, self.double_backward)
        if compiling:
            return self.run_compiled(key, x, extras, weights)
        if transforms() or forward_ad._current_level >= 0 or tracing():
            return self.run_followed(x, extras, weights)
        x = finished(x)
        if extras:
            extras = [finished(extra) for extra in extras]
        plan = self.plans.get(key)
        if plan is None:
            if self.outdated():
                return self.renewed()(x, extras)
            plan = self.ensure(key)
        self.known.learn(key, plan, x, extras, weights)
        return self.run_plan(plan, x, extras, weights)

    def run_plan(self, plan: Plan, x: Tensor, extras: Any, weights: Any, scales: Any = None) -> Any:
        """A call with a plan; extras are verified. scales: delayed ones, where they were read."""
        recipe: Any = plan.specs.prepared and self.recipe
        call = recipe.forward(plan, weights, scales) if recipe else (plan.passes.forward, ())
        try:
            if plan.specs.training:
                return run_training(plan, self, len(extras), call, x, *extras, *weights)
            return run_inference(plan, self, len(extras), (x, *extras, *weights), call)
        except OpError as error:
            place(error, self.table.run.labels)
            raise
        except RuntimeError:  # an inference tensor cannot be saved, its copy can
            if not (plan.specs.training and any(t.is_inference() for t in (x, *extras))):
                raise
        x, *extras = (t.clone() if t.is_inference() else t for t in (x, *extras))
        return run_training(plan, self, len(extras), call, x, *extras, *weights)
