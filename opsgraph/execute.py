"""Running a plan: the one autograd.Function, and the two opaque ops that torch.compile sees.

Traced through, AOTAutograd would merge or hoist whatever depends on saved values alone, and lose
the recomputation that a plan is for. So under torch.compile a plan is two calls,
`opsgraph::forward` and `opsgraph::backward`, with fakes made from specs: no mutation and no
results that alias.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .errors import OpError
from .plan import Plan
from .scaling import record_gradient
from .spec import ROWS, Spec

_HERE = nullcontext()


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context with autocast off; free where it is off already."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _HERE


def flat(x: Tensor, dims: int | None) -> Tensor:
    """x inside a plan: `[rows, width]`, `[rows]`, or with None as it is."""
    if dims is None or x.dim() == dims:
        return x
    return x.reshape(-1, x.shape[-1]) if dims == 2 else x.reshape(-1)


def flattened(plan: Plan, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The input and the extra inputs as the plan takes them."""
    return [flat(t, dims) for t, dims in zip(tensors, plan.specs.dims, strict=False)]


def unflattened(plan: Plan, outputs: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
    """Outputs with the leading dimensions of the input; the first one counts the ranks' rows."""
    if plan.specs.ratios is None:
        return [y.view(*shape[:-1], y.shape[-1]) for y in outputs]
    found = []
    for y, (up, down) in zip(outputs, plan.specs.ratios, strict=True):
        if len(shape) < 2 or shape[0] * up % down:
            sizes = f"[rows, *, {shape[-1]}], rows a multiple of {down}"
            raise OpError(plan.labels[0], f"input of shape {tuple(shape)}", sizes)
        found.append(y.view(shape[0] * up // down, *shape[1:-1], y.shape[-1]))
    return found


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
            outputs = stage.record(plan, outputs)
        if stage.eager_only is not None:
            ctx.watched = stage.unseen.watch(plan, tensors[extras + 1 :])
        if ctx.lead is not None:
            outputs = unflattened(plan, outputs, x.shape)
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
        taken = [others[k - 1] for k in plan.specs.taps]
        saved = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained: each dies after its use
        with without_autocast(dy.device.type):
            grads = (dy, *taken) if ctx.lead is None else [flat(g, 2) for g in (dy, *taken)]
            if ctx.stage.eager_only is not None:
                found = ctx.stage.unseen.run_backward(plan, ctx, grads, saved)
            else:
                found = plan.run_backward(ctx.stage.ops, *grads, saved)
            if ctx.lead is not None:
                found = list(found)
                for k, shape in enumerate(ctx.lead):
                    found[k] = None if found[k] is None else found[k].view(shape)
            if plan.specs.reported:
                found = note_gradients(plan, found, ctx.stage.seen_gradients(plan))
        return None, None, None, *found


_apply = super(torch.autograd.Function, PlanFunction).apply
finished: Callable[[Tensor], Tensor] = torch._C._functorch.unwrap_if_dead
"""The tensor itself, or what it stands for if it was left over by a functorch transform."""


def run_training(plan: Plan, stage: Any, extras: int, tensors: Sequence[Any]) -> Any:
    """Forward with gradients wanted; tensors: the input, extra inputs, weights, none left over.

    Past `Function.apply`, which looks in Python whether any argument is.
    """
    if torch._C._are_functorch_transforms_active():
        return PlanFunction.apply(plan, stage, extras, *tensors)  # type: ignore[no-untyped-call]
    return _apply(plan, stage, extras, *tensors)  # type: ignore[no-untyped-call]


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
    with without_autocast(x.device.type):
        if x.dim() == 2:
            outputs = plan.run_forward(ops, *tensors)[0]
        else:
            inputs = flattened(plan, tensors)
            outputs = plan.run_forward(ops, *inputs, *tensors[extras + 1 :])[0]
        if plan.specs.reports:
            outputs = stage.record(plan, outputs)
        if x.dim() != 2:
            outputs = unflattened(plan, outputs, x.shape)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


# -- torch.compile --

_handles: dict[str, tuple[Plan, Any]] = {}


def expose(plan: Plan, ops: Any) -> None:
    """Let the opaque ops find a plan by its handle, the same for every module that shares it."""
    _handles[plan.handle] = plan, ops


_library = torch.library.Library("opsgraph", "FRAGMENT")
_library.define("forward(str handle, Tensor[] tensors) -> Tensor[]")
_library.define("backward(str handle, Tensor[] tensors, Tensor[] seen) -> Tensor[]")


def _made(plan: Plan) -> list[int]:
    """Which saved values the forward makes, inputs and weights being there already."""
    return [k for k, (name, _) in enumerate(plan.specs.saved) if name not in plan.specs.inputs]


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
    plan, ops = _handles[handle]
    with torch.no_grad(), without_autocast(tensors[0].device.type):
        outputs, saved = plan.run_forward(ops, *_with_missing(plan, tensors))
        return _distinct([*outputs, *(saved[k] for k in _made(plan))], tensors)


def _with_missing(plan: Plan, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """The tensors as the plan's arguments: weights that are None have no tensor."""
    rest = iter(tensors)
    return [None if absent else next(rest) for absent in plan.specs.absent]


def _backward(handle: str, tensors: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
    plan, ops = _handles[handle]
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
    plan = _handles[handle][0]
    made = [plan.specs.saved[k][1] for k in _made(plan)]
    return _fakes([*plan.specs.outputs, *made], tensors[0].shape[0])


def _fake_backward(handle: str, tensors: list[Tensor], seen: list[Tensor]) -> list[Tensor]:
    plan = _handles[handle][0]
    names = [name for name, _ in plan.specs.saved]
    saved = dict(zip(names, tensors[len(tensors) - len(names) :], strict=True))
    rows, found = _scaled(tensors[0].shape[0], 1 / plan.specs.outputs[0].factor), []
    for k, (name, spec) in enumerate(zip(plan.specs.names, plan.specs.gradients, strict=True)):
        if k in plan.specs.reported:
            continue
        if spec is not None and name in saved and ROWS not in spec.shape:
            like, dense = saved[name], torch.contiguous_format
            found.append(torch.empty_like(like, dtype=spec.dtype, memory_format=dense))
        elif spec is not None:
            found += _fakes([spec], rows)
    return found


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("opsgraph::forward", _fake_forward, lib=_library)
torch.library.register_fake("opsgraph::backward", _fake_backward, lib=_library)


class CompiledPlan(torch.autograd.Function):
    """What `PlanFunction` is to eager mode, for Dynamo: flat tensors, opaque ops."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, *tensors: Tensor) -> Any:
        seen, tensors = tensors[: len(plan.specs.reported)], tensors[len(plan.specs.reported) :]
        made = torch.ops.opsgraph.forward(plan.handle, tensors)
        count = len(plan.specs.outputs)
        rest = iter(made[count:])
        specs = zip(plan.specs.names, plan.specs.absent, strict=True)
        given = dict(zip((n for n, absent in specs if not absent), tensors, strict=True))
        usable = plan.specs.inputs
        saved = [given[n] if n in usable else next(rest) for n, _ in plan.specs.saved]
        ctx.plan = plan
        ctx.save_for_backward(*seen, *saved)
        return tuple(made[:count])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        plan = ctx.plan
        taken = [grads[0], *(grads[k] for k in plan.specs.taps)]
        specs, count = plan.specs, len(plan.specs.reported)
        seen, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        made = iter(torch.ops.opsgraph.backward(plan.handle, [*taken, *saved], list(seen)))
        gradients = [None] * (1 + count)
        for k, (spec, absent) in enumerate(zip(specs.gradients, specs.absent, strict=True)):
            if not absent:
                gradients.append(None if spec is None or k in specs.reported else next(made))
        return tuple(gradients)


def run_compiled(plan: Plan, stage: Any, extras: int, tensors: Sequence[Tensor | None]) -> Any:
    """The plan under torch.compile."""
    x = tensors[0]
    assert x is not None
    shape = x.shape
    inputs = flattened(plan, tensors[: extras + 1])  # type: ignore[arg-type]
    there = [*inputs, *(t for t in tensors[extras + 1 :] if t is not None)]
    # Dynamo takes no tensor twice, as tied weights would have it.
    there = [t.view_as(t) if any(t is u for u in there[:k]) else t for k, t in enumerate(there)]
    if plan.specs.training:
        seen = stage.seen_gradients(plan) if plan.specs.reported else []
        outputs = CompiledPlan.apply(plan, *seen, *there)  # type: ignore[no-untyped-call]
    else:
        outputs = torch.ops.opsgraph.forward(plan.handle, there)[: len(plan.specs.outputs)]
    if plan.specs.reports:
        outputs = stage.record(plan, outputs)
    if len(shape) != 2:
        outputs = unflattened(plan, outputs, shape)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
