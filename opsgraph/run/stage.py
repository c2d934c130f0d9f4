"""A stage: consecutive ops of a Sequential with their parameters; it finds a plan and runs it.

A call's key is a tuple of dtypes, sizes and flags: all that changes what is right. Parameters are
read from the modules at each call.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from .. import config
from ..errors import OpError, PlanError
from ..fusers.quantizing import prepare_by
from ..guards.torch_private import finished, forward_ad, tracing, transforms
from ..op import ROWS, Op, Spec, row
from ..ops.quantize import lowered
from ..ops.sizes import width_between
from ..plan import Plan, make_plan
from ..plan.basic_ops import BasicOps
from ..plan.compiled import place
from ..plan.program import Request
from ..precision.delayed import Scaling
from .compiled import Compiled
from .dtensor import PLAIN, own_part
from .eager import run_inference, run_training
from .extras import ExtraInputs
from .followed import Followed, check_differentiable
from .options import Options
from .recipes import StageRecipe
from .shapes import absent, check_shapes, shape_of, verify_weights
from .table import Key, table_for
from .unseen import Unseen


class Stage(Followed, Compiled):
    """A run of consecutive ops of a Sequential, with the parameters it reads."""

    def __init__(
        self,
        ops: Sequence[Op],
        labels: Sequence[str],
        options: Options,
        known: Iterable[str] = (),
        later: Iterable[str | None] = (),
        recipe: int | None = None,
    ) -> None:
        lower = None if recipe is None else partial(lowered, recipe)
        self.again = partial(Stage, ops, labels, options, known, later, recipe)
        self.written = tuple(ops)
        run = BasicOps(ops, labels, known, later, lower)
        verify_weights(run)
        check_differentiable(run, options, recipe)
        self.inputs, self.outputs = run.inputs, run.outputs
        self.extras = ExtraInputs(run)
        self.trailing = self.extras.trailing
        self.output_names = [run.ops[i].channels.get("d") for i in run.outputs]
        self.slots = [run.ops[i].home(name) for i, name in run.slots]
        self.absent = absent(run)
        self.shapes = self._shapes()
        self.modes = [
            op for kind, op in zip(run.kinds, run.ops, strict=True) if kind.training_matters
        ]
        self.real = run.ops
        self.recipe = None if recipe is None else StageRecipe(recipe, run, self.slots)
        self.table = table_for(run, options)
        self.plans = self.table.plans
        self.ops = self.table.ops
        self.double_backward = options.double_backward
        self.unseen = Unseen(run, self.ops, self.slots, options)
        self.eager_only = self.unseen.reason

    def weights(self) -> list[Tensor | None]:
        """The parameters as they are now; a parametrized one is an attribute only."""
        found: list[Tensor | None] = []
        for module, name in self.slots:
            weight: Tensor | None = module._parameters.get(name)
            if type(weight) is not nn.Parameter:
                if weight is None:
                    weight = getattr(module, name)
                if type(weight) not in PLAIN and weight is not None:
                    weight = own_part(module, name, weight)
            found.append(weight)
        return found

    def _shapes(self) -> list[Any]:
        """The parameters' shapes as they are now, None for those that are not there."""
        places = (slot for slot in self.slots if not isinstance(slot[0], Scaling))
        return [shape_of(getattr(*place)) for place in places]

    def outdated(self) -> bool:
        """Whether parameters are there, gone or of other shapes than when the stage was made."""
        return self._shapes() != self.shapes or any(
            getattr(*place, None) is not None for place in self.absent
        )

    def renewed(self) -> Stage:
        """The same ops as they are now; whoever holds them looks again at the next call."""
        for op in self.written:
            op.touch()
        made: Stage = self.again()
        return made

    def key(self, x: Tensor, extras: Sequence[Tensor], weights: Sequence[Tensor | None]) -> Key:
        """All that changes what is right for a call."""
        grad = torch.is_grad_enabled() and not self.double_backward
        device = x.device
        kind = device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind) and x.dtype != torch.float64
        compute = torch.get_autocast_dtype(kind) if autocast else None
        # index(): under torch.compile a width that varied is symbolic, and no part of a key.
        width = index(x.shape[-1])
        parts = [x.dtype, width, kind, device.index, grad and x.requires_grad, compute]
        for w in weights:
            if w is None:
                parts.append(None)
            else:
                same = w.is_cpu if kind == "cpu" else w.device == device
                parts += (w.dtype, w.shape, grad and w.requires_grad, same)
        for e in extras:
            last = index(e.shape[-1]) if e.dim() else 0
            same = e.device == device
            parts += (e.dtype, e.dim() - x.dim(), last, grad and e.requires_grad, same)
        for op in self.modes:
            parts.append(op.training)
        return tuple(parts)

    def ensure(self, key: Key, extras: int) -> Plan:
        """The plan for a key, made unless that was done."""
        with config.lock:
            plan: Plan | None = self.plans.get(key)
            if plan is None:
                plan = self.plans[key] = self._make(key, extras)
            return plan

    def _make(self, key: Key, extras: int) -> Plan:
        run, options = self.table.run, self.table.options
        device = torch.device(key[2], key[3])
        gradients = {"x0"} if key[4] else set()
        rest = iter(key[6:])
        found: dict[str, Spec | None] = {}
        check_shapes(run, self.real, self.slots, self.weights())
        options.verify_fusers()
        for (i, name), weight in zip(run.slots, self.weights(), strict=True):
            dtype, variable = next(rest), run.name(name, i)
            found[variable] = None
            if dtype is None:
                continue
            assert weight is not None
            shape, wanted, same = (next(rest) for _ in range(3))
            there = device if same else weight.device
            found[variable] = Spec(tuple(shape), dtype, there)
            if wanted:
                gradients.add(variable)
        specs = []
        for (i, name, _), dims in zip(run.inputs[:extras], self.extras.dims, strict=False):
            dtype, more, last, wanted, same = (next(rest) for _ in range(5))
            shape = {0: (ROWS, last), -1: (ROWS,)}.get(more, (last,))
            if dims is None:
                shape = (last,)
            specs.append(Spec(shape, dtype, device if same else torch.device("meta")))
            if wanted:
                gradients.add(run.name(name, i))
        modes = {id(op): next(rest) for op in self.modes}
        request = Request(
            row(key[1], key[0], device),
            tuple(specs),
            found,
            frozenset(gradients),
            tuple(modes.get(id(op), False) for op in self.real),
            key[5],
            options.given(),
        )
        bind = partial(prepare_by, options.order)
        return make_plan(run, request, options.order, options.planner, options.config, bind)

    def plan(self, training: bool, x: Tensor | None) -> Plan:
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
        return self.ensure(key, len(extras))

    def _example(self, weights: Sequence[Tensor | None]) -> Tensor:
        width = width_between(self.real)
        if width is None:
            raise PlanError(f"{self.table.run.labels[0]}: got no width to plan for, expected x")
        there = [w for w in weights if w is not None]
        like = next((w for w in there if w.dim() > 1), there[0] if there else torch.empty(0))
        return torch.empty(2, width, dtype=like.dtype, device=like.device)

    def __call__(self, x: Tensor, extras: Sequence[Tensor], compiling: bool = False) -> Any:
        if extras or self.trailing:
            extras = self.extras.verified(x, extras)
        for module, name in self.absent:
            if module._parameters.get(name) is not None:
                return self.renewed()(x, extras, compiling)
        weights = self.weights()
        key = self.key(x, extras, weights)
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
            plan = self.ensure(key, len(extras))
        if self.recipe is not None and plan.specs.prepared:
            weights = [*weights, *self.recipe.prepare(plan, weights)]
        if plan.specs.training:
            try:
                return run_training(plan, self, len(extras), x, *extras, *weights)
            except OpError as error:
                place(error, self.table.run.labels)
                raise
            except RuntimeError:  # an inference tensor cannot be saved, its copy can
                if not any(t.is_inference() for t in (x, *extras)):
                    raise
            x, *extras = (t.clone() if t.is_inference() else t for t in (x, *extras))
            return run_training(plan, self, len(extras), x, *extras, *weights)
        try:
            return run_inference(plan, self, len(extras), (x, *extras, *weights))
        except OpError as error:
            place(error, self.table.run.labels)
            raise
