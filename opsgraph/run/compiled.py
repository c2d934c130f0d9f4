"""A plan under torch.compile: two opaque ops, which the compiler calls and does not see into.

Traced through, AOTAutograd would merge or hoist whatever depends on saved values alone, and lose
the recomputation that a plan is for. So a plan is two calls, `opsgraph::forward` and
`opsgraph::backward`, with fakes made from specs: no mutation and no results that alias.

Dynamo plans in methods that are marked constant, which return a plan's handle. A compiled graph
knows the plan by that handle alone. `Compiled` is the hook: what a stage does while Dynamo traces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import config
from ..errors import PlanError
from ..op import ROWS, Spec, constant_under_compile
from ..plan import Plan
from ..precision.autocast import active
from .dimensions import flattened, unflattened
from .eager import run_inference, without_autocast
from .recipes import StageRecipe, note_gradients

_handles: dict[str, Plan] = {}
"""Plans by the handle that the opaque ops are given."""


KEPT = 256
"""Plans that are kept after their modules: a compiled graph, or one backward of it, may live on."""
_retired: deque[str] = deque()


def retire(handles: Mapping[str, Plan]) -> None:
    """Take note that the modules are gone whose plans have these handles."""
    _retired.extend(handles)
    while len(_retired) > KEPT:
        _handles.pop(_retired.popleft(), None)


def _found(handle: str) -> Plan:
    """A plan by its handle."""
    if handle not in _handles:
        raise RuntimeError(
            "opsgraph: a compiled graph was called whose module is gone, and more than "
            f"{KEPT} others after it; keep the module for as long as the graph"
        )
    return _handles[handle]


_library = torch.library.Library("opsgraph", "FRAGMENT")
_library.define("forward(str handle, Tensor[] tensors) -> Tensor[]")
# A compiler neither runs this one again for a backward nor, for each call has a tensor of its own,
# merges two calls of it.
_library.define(
    "forward_random(str handle, Tensor[] tensors, Tensor call) -> Tensor[]",
    tags=(torch.Tag.nondeterministic_seeded,),
)
_library.define("backward(str handle, Tensor[] tensors, Tensor[] seen) -> Tensor[]")


def _made(plan: Plan) -> list[int]:
    """Which saved values the forward makes, inputs and weights being there already."""
    return [k for k, value in enumerate(plan.specs.saved) if value.argument is None]


def _distinct(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Results without storage in common with each other or the inputs."""
    seen = {t.untyped_storage().data_ptr() for t in inputs if t.numel()}
    found = []
    for tensor in results:
        pointer = tensor.untyped_storage().data_ptr()
        dense = torch.contiguous_format
        found.append(tensor.clone(memory_format=dense) if pointer in seen else tensor.contiguous())
        seen.add(found[-1].untyped_storage().data_ptr())
    return found


def _forward(handle: str, tensors: list[Tensor]) -> list[Tensor]:
    plan = _found(handle)
    with torch.no_grad(), without_autocast(tensors[0]):
        outputs, saved = plan.run_forward(plan.ops, *_with_missing(plan, tensors))
        return _distinct([*outputs, *(saved[k] for k in _made(plan))], tensors)


def _forward_random(handle: str, tensors: list[Tensor], call: Tensor) -> list[Tensor]:
    return _forward(handle, tensors)


def _with_missing(plan: Plan, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The tensors as the plan's arguments: weights that are None have no tensor."""
    rest = iter(tensors)
    return [None if argument.spec is None else next(rest) for argument in plan.specs.inputs]


def _backward(handle: str, tensors: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
    plan = _found(handle)
    count = 1 + len(plan.specs.taps)
    with torch.no_grad(), without_autocast(tensors[0]):
        made = plan.run_backward(plan.ops, *tensors[:count], tensors[count:])
        found = note_gradients(plan, made, seen)
        return _distinct([g for g in found if g is not None], tensors)


def _fakes(specs: Sequence[Spec], rows: Any) -> list[Tensor]:
    return [spec.empty(_scaled(rows, spec.factor)) for spec in specs]


def _scaled(rows: Any, factor: Fraction) -> Any:
    """rows * factor, of sizes that may be symbolic."""
    up, down = factor.as_integer_ratio()
    return rows * up if down == 1 else rows * up // down


def _fake_forward(handle: str, tensors: list[Tensor]) -> list[Tensor]:
    plan = _found(handle)
    made = [value.spec for value in plan.specs.saved if value.argument is None]
    return _fakes([*(y.spec for y in plan.specs.outputs), *made], tensors[0].shape[0])


def _fake_forward_random(handle: str, tensors: list[Tensor], call: Tensor) -> list[Tensor]:
    return _fake_forward(handle, tensors)


def _fake_backward(handle: str, tensors: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
    plan = _found(handle)
    names = [value.name for value in plan.specs.saved]
    saved = dict(zip(names, tensors[len(tensors) - len(names) :], strict=True))
    rows = _scaled(tensors[0].shape[0], 1 / plan.specs.outputs[0].spec.factor)
    gradients = []
    for name, spec, _, gradient, amax in plan.specs.inputs:
        if spec is None or amax or gradient is None:
            continue
        if name in saved and ROWS not in spec.shape:
            like, dense = saved[name], torch.contiguous_format
            gradients.append(torch.empty_like(like, dtype=spec.dtype, memory_format=dense))
        else:
            gradients += _fakes([spec], rows)
    return gradients


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("forward_random", _forward_random, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("opsgraph::forward", _fake_forward, lib=_library)
torch.library.register_fake("opsgraph::forward_random", _fake_forward_random, lib=_library)
torch.library.register_fake("opsgraph::backward", _fake_backward, lib=_library)


def _call_forward(plan: Plan, tensors: Sequence[Tensor]) -> Any:
    if plan.specs.random:
        return torch.ops.opsgraph.forward_random(plan.handle, tensors, torch.empty(0))
    return torch.ops.opsgraph.forward(plan.handle, tensors)


class CompiledPlan(torch.autograd.Function):
    """What `PlanFunction` is to eager mode, for Dynamo: flat tensors, opaque ops."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> Any:
        seen, tensors = tensors[: len(plan.specs.reported)], tensors[len(plan.specs.reported) :]
        made = _call_forward(plan, tensors)
        count = len(plan.specs.outputs)
        rest = iter(made[count:])
        arguments = _with_missing(plan, tensors)
        places = (value.argument for value in plan.specs.saved)
        saved = [next(rest) if place is None else arguments[place] for place in places]
        ctx.plan = plan
        ctx.save_for_backward(*seen, *saved)
        return tuple(made[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plan = ctx.plan
        taken = [grads[0], *(grads[k] for k in plan.specs.taps)]
        count = len(plan.specs.reported)
        seen, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        made = iter(torch.ops.opsgraph.backward(plan.handle, [*taken, *saved], list(seen)))
        gradients = [None] * (1 + count)
        for argument in plan.specs.inputs:
            if argument.spec is not None:
                wanted = argument.gradient is not None and not argument.amax
                gradients.append(next(made) if wanted else None)
        return tuple(gradients)


def _run_plan(plan: Plan, stage: Any, extras: int, tensors: Sequence[Tensor | None]) -> Any:
    """The plan under torch.compile."""
    x = tensors[0]
    assert x is not None
    if plan.specs.identity:
        return x
    shape = x.shape
    inputs = flattened(plan, tensors[: extras + 1])  # type: ignore[arg-type]
    there = [*inputs, *(t for t in tensors[extras + 1 :] if t is not None)]
    # Dynamo takes no tensor twice, as tied weights would have it.
    there = [t.view_as(t) if any(t is u for u in there[:k]) else t for k, t in enumerate(there)]
    if plan.specs.training:
        seen = stage.recipe.seen_gradients(plan) if plan.specs.reported else []
        outputs = CompiledPlan.apply(plan, *seen, *there)  # type: ignore[no-untyped-call]
    else:
        outputs = _call_forward(plan, there)[: len(plan.specs.outputs)]
    if plan.specs.reports:
        outputs = stage.recipe.record(plan, outputs, torch.is_grad_enabled())
    if len(shape) != 2:
        outputs = unflattened(plan, outputs, shape)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


class Compiled:
    """What a stage does under torch.compile."""

    table: Any
    eager_only: str | None
    double_backward: bool
    is_followed: Callable[[], bool]
    run_followed: Callable[..., Any]
    ensure: Callable[..., Any]
    recipe: StageRecipe | None

    @constant_under_compile
    def _expose(self, key: Any, extras: int) -> str:
        """Plan while Dynamo traces. A method: Dynamo guards which object a function is given."""
        plan: Plan = self.ensure(key, extras)
        _handles[plan.handle] = plan
        setattr(self.table.exposed, plan.handle, plan)
        return plan.handle

    def run_compiled(
        self, key: Any, x: Tensor, extras: Sequence[Tensor], weights: Sequence[Tensor | None]
    ) -> Any:
        """The call while Dynamo traces."""
        if not self.double_backward and self.is_followed():
            return self.run_followed(x, extras, weights)
        if self.eager_only is not None:
            raise PlanError(self.eager_only)
        plan: Plan = getattr(self.table.exposed, self._expose(key, len(extras)))
        if self.double_backward:  # traced through, for autograd to see the ops
            return run_inference(plan, self, len(extras), (x, *extras, *weights))
        if self.recipe is not None and plan.specs.prepared:
            self.recipe.check_traceable(weights)
            weights = [*weights, *self.recipe.prepare(plan, weights)]
        return _run_plan(plan, self, len(extras), (x, *extras, *weights))


class CompiledSequence:
    """What a Sequential does under torch.compile."""

    _plain: list[Any]
    _recipes: dict[int, list[Any]]
    _prepared: int
    _prepare: Callable[..., None]
    _make_stages: Callable[[int], list[Any]]
    _run: Callable[..., Any]

    @constant_under_compile
    def _refresh(self, recipe: int | None, width: int) -> None:
        """Prepare while Dynamo traces. A method, so that equal layers share what is compiled."""
        self._prepare(width)
        if recipe is not None and recipe not in self._recipes:
            self._recipes[recipe] = self._make_stages(recipe)

    def _run_compiled(self, x: Tensor, extras: Sequence[Tensor]) -> Any:
        """The call while Dynamo traces."""
        self._refresh(active.key, index(x.shape[-1]) if x.dim() else 0)
        assert self._prepared == config.epoch  # for Dynamo to guard both
        stages = self._plain if active.key is None else self._recipes[active.key]
        return self._run(stages, x, extras, True)
