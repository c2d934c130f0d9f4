"""Running a plan: the one autograd.Function, and the two opaque ops that torch.compile sees.

Traced through, AOTAutograd would merge or hoist whatever depends on saved values alone, and lose
the recomputation that a plan is for. So under torch.compile a plan is two calls,
`opsgraph::forward` and `opsgraph::backward`, with fakes made from specs: no mutation and no
results that alias.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import PlanError
from ..guards.torch_private import PassThrough, apply_of, forward_ad, has_memory
from ..op import ROWS, Spec
from ..plan import Plan
from ..precision.autocast import moment, saved_again
from ..precision.delayed import record_gradient
from .dimensions import as_given, copy_gradients, flat, flattened, released, unflattened

_HERE = nullcontext()
_SEEN_THROUGH = ("cpu", "aten", "reference")
"""Backends that leave the work to PyTorch's ops while a dispatch mode is active."""


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context with autocast off; free where it is off already."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _HERE


def see_through(
    plan: Plan, gradients: Sequence[Tensor], saved: Sequence[Tensor]
) -> AbstractContextManager[Any]:
    """A context for a backward whose gradients may be no memory that a kernel can read.

    Batched ones, of `is_grads_batched`, are left to PyTorch's ops. Raises PlanError for tangents of
    forward-mode AD, which only a forward inside of it can follow, and where kernels do not yield.
    """
    if forward_ad._current_level >= 0:
        for tensor in (*gradients, *saved):
            if forward_ad.unpack_dual(tensor).tangent is not None:
                raise PlanError(
                    "got a tangent of forward-mode AD in a backward, expected the forward inside "
                    "of it too, or a module with double_backward=True"
                )
    if all(map(has_memory, gradients)):
        return without_autocast(gradients[0].device.type)
    if plan.specs.packed or any(step.backend not in _SEEN_THROUGH for step in plan.backward):
        raise PlanError(
            "got a batched gradient for a backward of fused kernels, expected a module with "
            "double_backward=True, and no recipe"
        )
    return PassThrough()  # type: ignore[no-untyped-call]


class PlanFunction(torch.autograd.Function):
    """Runs a plan forward and backward: `apply(plan, stage, extra count, x, *extras, *weights)`."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, stage: Any, extras: int, *tensors: Tensor) -> Any:
        x, ops = tensors[0], stage.ops
        ctx.plan, ctx.stage = plan, stage
        ctx.lead = None if x.dim() == 2 else [t.shape for t in tensors[: extras + 1]]
        if ctx.lead is None and not plan.specs.autocast:
            outputs, saved = plan.run_forward(ops, *tensors)
        else:
            inputs = flattened(plan, tensors)
            with without_autocast(x.device.type):
                outputs, saved = plan.run_forward(ops, *inputs, *tensors[extras + 1 :])
        if plan.specs.reports:
            outputs = stage.record(plan, outputs, True)
        if stage.recipe is not None:
            ctx.moment = moment(stage.recipe, stage.states.values())
            saved = (ctx.moment, *saved)
        if stage.eager_only is not None:
            ctx.watched = stage.unseen.watch(plan, tensors[extras + 1 :])
        if ctx.lead is not None:
            outputs = released(unflattened(plan, outputs, x.shape), outputs, tensors)
        elif len(outputs) > 1 or outputs[0]._is_view():
            outputs = released(outputs, outputs, tensors)
        ctx.save_for_backward(*saved)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *others: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "opsgraph: a plan's backward has no derivative of its own; build the module with "
                "Sequential(..., double_backward=True) to differentiate twice"
            )
        plan = ctx.plan
        given = (dy, *[others[k - 1] for k in plan.specs.taps]) if others else (dy,)
        saved = saved_again(ctx, ctx.stage.recipe)
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained: each dies after its use
        plain = has_memory(dy) if len(given) == 1 else all(map(has_memory, given))
        plain = plain and forward_ad._current_level < 0
        with without_autocast(dy.device.type) if plain else see_through(plan, given, saved):
            grads = given if ctx.lead is None else [flat(g, 2) for g in given]
            if ctx.stage.eager_only is not None:
                found = ctx.stage.unseen.run_backward(plan, ctx, grads, saved)
            else:
                found = plan.run_backward(ctx.stage.ops, *grads, saved)
            if ctx.lead is not None:
                found = as_given(found, ctx.lead, grads, given)
            if plan.specs.reported:
                found = note_gradients(plan, found, ctx.stage.seen_gradients(plan))
        return None, None, None, *found


run_training: Callable[..., Any] = apply_of(PlanFunction)
"""Forward with gradients wanted, `(plan, stage, extra count, x, *extras, *weights)`: tensors of
which none is left over by a transform."""


def note_gradients(plan: Plan, found: Sequence[Any], seen: Sequence[Tensor]) -> list[Any]:
    """Note the amaxes that stand where scales would have a gradient; returns the gradients."""
    rest = list(found)
    for k, buffer in zip(plan.specs.reported, seen, strict=True):
        record_gradient(buffer, rest[k])
        rest[k] = None
    return rest


def run_inference(plan: Plan, stage: Any, extras: int, tensors: Sequence[Any]) -> Any:
    """The forward alone, no gradient being wanted."""
    x, ops = tensors[0], stage.ops
    within = x.dim() == 2
    if within and not plan.specs.autocast:
        outputs = plan.run_forward(ops, *tensors)[0]
    elif plan.specs.identity:
        return x
    else:
        inputs = flattened(plan, tensors)
        if stage.double_backward:
            copy_gradients(inputs)
        with without_autocast(x.device.type):
            outputs = plan.run_forward(ops, *inputs, *tensors[extras + 1 :])[0]
    if plan.specs.reports:
        outputs = stage.record(plan, outputs, torch.is_grad_enabled())
    if not within:
        views = unflattened(plan, outputs, x.shape)
        own = not (stage.double_backward or torch.is_grad_enabled())
        outputs = released(views, outputs, tensors) if own else views
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


# -- torch.compile --

_handles: dict[str, tuple[Plan, Any]] = {}


def expose(plan: Plan, ops: Any) -> None:
    """Let the opaque ops find a plan by its handle, the same for every module that shares it."""
    _handles[plan.handle] = plan, ops


KEPT = 256
"""Plans that are kept after their modules: a compiled graph, or one backward of it, may live on."""
_retired: deque[str] = deque()


def retire(handles: Mapping[str, Plan]) -> None:
    """Take note that the modules are gone whose plans have these handles."""
    _retired.extend(handles)
    while len(_retired) > KEPT:
        _handles.pop(_retired.popleft(), None)


def _found(handle: str) -> tuple[Plan, Any]:
    """A plan and its ops by handle."""
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
    plan, ops = _found(handle)
    with torch.no_grad(), without_autocast(tensors[0].device.type):
        outputs, saved = plan.run_forward(ops, *_with_missing(plan, tensors))
        return _distinct([*outputs, *(saved[k] for k in _made(plan))], tensors)


def _forward_random(handle: str, tensors: list[Tensor], call: Tensor) -> list[Tensor]:
    return _forward(handle, tensors)


def _with_missing(plan: Plan, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The tensors as the plan's arguments: weights that are None have no tensor."""
    rest = iter(tensors)
    return [None if argument.spec is None else next(rest) for argument in plan.specs.inputs]


def _backward(handle: str, tensors: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
    plan, ops = _found(handle)
    count = 1 + len(plan.specs.taps)
    with torch.no_grad(), without_autocast(tensors[0].device.type):
        made = plan.run_backward(ops, *tensors[:count], tensors[count:])
        found = note_gradients(plan, made, seen)
        return _distinct([g for g in found if g is not None], tensors)


def _fakes(specs: Sequence[Spec], rows: Any) -> list[Tensor]:
    return [spec.empty(_scaled(rows, spec.factor)) for spec in specs]


def _scaled(rows: Any, factor: Fraction) -> Any:
    """rows * factor, of sizes that may be symbolic."""
    up, down = factor.as_integer_ratio()
    return rows * up if down == 1 else rows * up // down


def _fake_forward(handle: str, tensors: list[Tensor]) -> list[Tensor]:
    plan = _found(handle)[0]
    made = [value.spec for value in plan.specs.saved if value.argument is None]
    return _fakes([*(y.spec for y in plan.specs.outputs), *made], tensors[0].shape[0])


def _fake_forward_random(handle: str, tensors: list[Tensor], call: Tensor) -> list[Tensor]:
    return _fake_forward(handle, tensors)


def _fake_backward(handle: str, tensors: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
    plan = _found(handle)[0]
    names = [value.name for value in plan.specs.saved]
    saved = dict(zip(names, tensors[len(tensors) - len(names) :], strict=True))
    rows = _scaled(tensors[0].shape[0], 1 / plan.specs.outputs[0].spec.factor)
    gradients = []
    for name, spec, _, _, wanted, amax in plan.specs.inputs:
        if spec is None or amax or not wanted:
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
                wanted = argument.gradient and not argument.amax
                gradients.append(next(made) if wanted else None)
        return tuple(gradients)


def run_compiled(plan: Plan, stage: Any, extras: int, tensors: Sequence[Tensor | None]) -> Any:
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
        seen = stage.seen_gradients(plan) if plan.specs.reported else []
        outputs = CompiledPlan.apply(plan, *seen, *there)  # type: ignore[no-untyped-call]
    else:
        outputs = _call_forward(plan, there)[: len(plan.specs.outputs)]
    if plan.specs.reports:
        outputs = stage.record(plan, outputs, torch.is_grad_enabled())
    if len(shape) != 2:
        outputs = unflattened(plan, outputs, shape)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
