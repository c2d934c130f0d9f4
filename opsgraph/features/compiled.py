"""A plan under torch.compile: two opaque ops, which the compiler calls and does not see into.

Traced through, AOTAutograd would merge or hoist whatever depends on saved values alone, and lose
the recomputation that a plan is for. So a plan is two calls, `opsgraph::forward` and
`opsgraph::backward`, with fakes made from specs. Their results alias nothing. A gradient's amax is
written to a buffer past its version, so the compiler sees no mutation.

Dynamo plans in methods that are marked constant, which return a plan's handle. A compiled graph
knows the plan by that handle alone. `Compiled` is the hook: what a stage does while Dynamo traces.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import cache
from hashlib import sha256
from operator import index
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..base import config
from ..guards.cached import cached_property
from ..guards.torch_private import constant_under_compile, opaque, without_autocast
from ..op import ROWS, Factor, Spec
from ..plan import Plan
from ..precision import tapes
from ..precision.autocast import active
from ..precision.delayed import pin_states
from ..precision.recipe import DelayedScaling, recipe_of
from ..precision.weights import QuantizedTensor
from .dimensions import flattened, unflattened
from .recipes import StageRecipe, note_gradients

_handles: dict[str, Plan] = {}
"""Plans by the handle that the opaque ops are given."""

KEPT = 256
"""Plans that are kept after their modules: a compiled graph, or one backward of it, may live on."""
_retired: deque[str] = deque()


_serial: Counter[str] = Counter()


def _handle(plan: Plan) -> str:
    """What the plan is, and which of those that are the same.

    Compilers keep graphs on disk, for other processes.
    """
    content = repr((plan.kinds, plan.forward_source, plan.backward_source, plan.specs))
    digest = sha256(content.encode()).hexdigest()[:16]
    _serial[digest] += 1
    return f"{digest}-{_serial[digest]}"


Plan.handle = cached_property(_handle)  # type: ignore[assignment]
Plan.__dict__["handle"].__set_name__(Plan, "handle")


def retire(handles: Mapping[str, Plan]) -> None:
    """Take note that the modules are gone whose plans have these handles."""
    _retired.extend(handles)
    while len(_retired) > KEPT:
        _handles.pop(_retired.popleft(), None)


def _plan(handle: str) -> Plan:
    """A plan by its handle."""
    if handle not in _handles:
        if handle.rpartition("-")[0] not in _serial:
            raise RuntimeError(
                "opsgraph: a graph that was exported or compiled in another process was called; it "
                "holds a plan by name alone. Export the module's to_torch(), or compile it here"
            )
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


def _fresh(plan: Plan) -> list[int]:
    """Which saved values the forward makes, inputs and weights being there already."""
    return [k for k, value in enumerate(plan.specs.saved) if value.argument is None]


def _distinct(results: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Results without storage in common with each other or the inputs."""
    taken = {t.untyped_storage().data_ptr() for t in inputs if t.numel()}
    distinct = []
    for tensor in results:
        shared = tensor.untyped_storage().data_ptr() in taken
        dense = torch.contiguous_format
        distinct.append(tensor.clone(memory_format=dense) if shared else tensor.contiguous())
        taken.add(distinct[-1].untyped_storage().data_ptr())
    return distinct


def _arguments(plan: Plan, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The tensors as the plan's arguments: weights that are None have no tensor."""
    rest = iter(tensors)
    return [None if argument.spec is None else next(rest) for argument in plan.specs.inputs]


def _forward(handle: str, tensors: list[Tensor], call: Tensor | None = None) -> list[Tensor]:
    plan = _plan(handle)
    with torch.no_grad(), without_autocast(tensors[0]):
        outputs, saved = plan.passes.forward(plan.ops, *_arguments(plan, tensors))
        return _distinct([*outputs, *(saved[k] for k in _fresh(plan))], tensors)


def _backward(handle: str, tensors: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
    plan = _plan(handle)
    count = 1 + len(plan.specs.taps)
    with torch.no_grad(), without_autocast(tensors[0]):
        results = plan.passes.backward(plan.ops, *tensors[:count], tensors[count:])
        # Past the version: the graph may have saved the buffers for another backward.
        gradients = note_gradients(plan, results, [buffer.data for buffer in seen])
        return _distinct([g for g in gradients if g is not None], tensors)


def _scaled(rows: Any, factor: Factor) -> Any:
    """rows * factor, of sizes that may be symbolic."""
    up, down = factor.as_integer_ratio()
    return rows * up if down == 1 else rows * up // down


def _fake(spec: Spec, rows: Any) -> Tensor:
    return spec.empty(_scaled(rows, spec.factor))


def _fake_forward(handle: str, tensors: list[Tensor], call: Tensor | None = None) -> list[Tensor]:
    plan, rows = _plan(handle), tensors[0].shape[0]
    made = (plan.specs.saved[k].spec for k in _fresh(plan))
    return [_fake(spec, rows) for spec in (*plan.specs.outputs, *made)]


def _fake_backward(handle: str, tensors: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
    plan = _plan(handle)
    names = [value.name for value in plan.specs.saved]
    saved = dict(zip(names, tensors[len(tensors) - len(names) :], strict=True))
    rows = _scaled(tensors[0].shape[0], 1 / Fraction(plan.specs.outputs[0].factor))
    gradients = []
    for name, spec, _, gradient, amax in plan.specs.inputs:
        if spec is None or amax or gradient is None:
            continue
        if name in saved and ROWS not in spec.shape:
            like, dense = saved[name], torch.contiguous_format
            gradients.append(torch.empty_like(like, dtype=spec.dtype, memory_format=dense))
        else:
            gradients.append(_fake(spec, rows))
    return gradients


for _name, _call in (
    ("forward", _forward), ("forward_random", _forward), ("backward", _backward),
):  # fmt: skip
    _library.impl(_name, _call, "CompositeExplicitAutograd")


@cache
def _register_fakes() -> None:
    """When Dynamo first traces: PyTorch looks for each one's source, a tenth of our import."""
    tapes.register_fakes()
    for name, fake in (
        ("forward", _fake_forward), ("forward_random", _fake_forward), ("backward", _fake_backward),
    ):  # fmt: skip
        torch.library.register_fake(f"opsgraph::{name}", fake, lib=_library)


def _call_forward(plan: Plan, tensors: Sequence[Tensor]) -> Any:
    if plan.specs.random:
        return torch.ops.opsgraph.forward_random(plan.handle, tensors, torch.empty(0))
    return torch.ops.opsgraph.forward(plan.handle, tensors)


class CompiledPlan(torch.autograd.Function):
    """What `PlanFunction` is to eager mode, for Dynamo: flat tensors, opaque ops."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> Any:
        seen, tensors = tensors[: len(plan.specs.reported)], tensors[len(plan.specs.reported) :]
        results = _call_forward(plan, tensors)
        count = len(plan.specs.outputs)
        rest = iter(results[count:])
        arguments = _arguments(plan, tensors)
        places = (value.argument for value in plan.specs.saved)
        saved = [next(rest) if place is None else arguments[place] for place in places]
        ctx.plan = plan
        ctx.save_for_backward(*seen, *saved)
        return tuple(results[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> Any:
        plan = ctx.plan
        arriving = [dys[0], *(dys[k] for k in plan.specs.taps)]
        count = len(plan.specs.reported)
        seen, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        results = iter(torch.ops.opsgraph.backward(plan.handle, [*arriving, *saved], list(seen)))
        gradients = [None] * (1 + count)
        for argument in plan.specs.inputs:
            if argument.spec is not None:
                wanted = argument.gradient is not None and not argument.amax
                gradients.append(next(results) if wanted else None)
        return tuple(gradients)


def _call_traced(plan: Plan, stage: Any, flats: Sequence[Tensor]) -> Any:
    """The plan's outputs, of its inputs and of the weights that are there."""
    # Dynamo takes no tensor twice, as tied weights would have it.
    flats = [t.view_as(t) if any(t is u for u in flats[:k]) else t for k, t in enumerate(flats)]
    if not plan.specs.training:
        return _call_forward(plan, flats)[: len(plan.specs.outputs)]
    seen = stage.recipe.seen_gradients(plan) if plan.specs.reported else []
    return CompiledPlan.apply(plan, *seen, *flats)  # type: ignore[no-untyped-call]


def _run_traced(plan: Plan, stage: Any, extras: int, tensors: Sequence[Any]) -> Any:
    """Forward and backward under torch.compile, which calls the plan and does not see into it."""
    x = tensors[0]
    if plan.specs.identity:
        return x
    weights = [t for t in tensors[extras + 1 :] if t is not None]
    outputs = _call_traced(plan, stage, [*flattened(plan, tensors), *weights])
    if plan.specs.reports:
        outputs = stage.recipe.record(plan, outputs, torch.is_grad_enabled())
    if x.dim() != 2:
        outputs = unflattened(plan, outputs, x.shape)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


class Compiled:
    """What a stage does under torch.compile."""

    table: Any
    double_backward: bool
    is_followed: Callable[[], bool]
    run_followed: Callable[..., Any]
    ensure: Callable[..., Any]
    recipe: StageRecipe | None
    run_inference: Callable[..., Any]

    @constant_under_compile
    def _expose(self, key: Any) -> str:
        """Plan while Dynamo traces. A method: Dynamo guards which object a function is given."""
        plan: Plan = self.ensure(key)
        _ = [function.call for function in plan.functions]  # Dynamo compiles no text
        _handles[plan.handle] = plan
        setattr(self.table.exposed, plan.handle, plan)
        return plan.handle

    def run_compiled(
        self, key: Any, x: Tensor, extras: Sequence[Tensor], weights: Sequence[Tensor | None]
    ) -> Any:
        """The call while Dynamo traces."""
        if not self.double_backward and self.is_followed():
            return self.run_followed(x, extras, weights)
        plan: Plan = getattr(self.table.exposed, self._expose(key))
        if self.double_backward:  # traced through, for autograd to see the ops
            run = plan.functions.forward.call  # not a replay: Dynamo does not know all it looks at
            return self.run_inference(plan, self, len(extras), (x, *extras, *weights), (run, ()))
        if self.recipe is not None and plan.specs.prepared:
            weights = [*weights, *self.recipe.prepare(plan, weights)]
        return _run_traced(plan, self, len(extras), (x, *extras, *weights))


def _plainly(reason: str) -> Callable[..., Any]:
    """A call of a Sequential that Dynamo does not look into."""
    return opaque(lambda m, x, more: m.forward(x, *more), reason)


_calls: dict[str, Callable[..., Any]] = {}
"""Such calls by their reasons."""
_no_tensor = _plainly("torch.compile takes tensors for a sequence's input")


def _hidden(stage: Any) -> str | None:
    """Why Dynamo may not look into a stage, if so."""
    for module, name in getattr(stage, "slots", ()):
        if isinstance(module._parameters.get(name), QuantizedTensor):
            return "torch.compile cannot see into weights of quantized_model_init"
    return getattr(stage, "eager_only", None)


class CompiledSequence:
    """What a Sequential does under torch.compile."""

    _stages: list[Any]
    _recipes: dict[int, list[Any]]
    _prepared: int
    _prepare: Callable[..., None]
    _make_stages: Callable[[int], list[Any]]
    run_stages: Callable[..., Any]

    @constant_under_compile
    def _refresh(self, recipe: int | None, width: int, kept: bool) -> str | None:
        """Prepare while Dynamo traces. A method, so that equal layers share what is compiled.

        kept: whether quantized weights are. Returns why Dynamo may not look into the call, if so.
        """
        _register_fakes()
        self._prepare(width)
        if recipe is not None and isinstance(recipe_of(recipe), DelayedScaling):
            pin_states()
        if recipe is not None and recipe not in self._recipes:
            self._recipes[recipe] = self._make_stages(recipe)
        stages = self._stages if recipe is None else self._recipes[recipe]
        reason = next(filter(None, map(_hidden, stages)), None)
        if reason is None and kept and recipe is not None:
            reason = "is_first_microbatch keeps weights that torch.compile cannot see"
        if reason is not None and reason not in _calls:  # Dynamo guards which function it is
            _calls[reason] = _plainly(reason)
        return reason

    def _run_compiled(self, x: Tensor, extras: Sequence[Tensor]) -> Any:
        """The call while Dynamo traces."""
        if not isinstance(x, Tensor):
            return _no_tensor(self, x, extras)
        width, kept = index(x.shape[-1]) if x.dim() else 0, active.first_microbatch is not None
        reason = self._refresh(active.key, width, kept)
        assert self._prepared == config.epoch  # for Dynamo to guard both
        if reason is not None:
            return _calls[reason](self, x, extras)
        stages = self._stages if active.key is None else self._recipes[active.key]
        return self.run_stages(stages, x, extras)
