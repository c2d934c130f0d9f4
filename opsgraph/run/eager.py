"""Running a plan: the one autograd.Function, and the forward alone.

A plan computes on `[rows, width]` with autocast off, and knows nothing of autograd. Around it stand
leading dimensions (`features.dimensions`), what autograd saves, the amaxes that a recipe notes.
Gradients that are no memory of a kernel's are told apart in the backward, see `see_through`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..features.dimensions import as_given, flat, flattened, released, unflattened
from ..features.followed import copy_gradients, see_through
from ..features.recipes import note_gradients
from ..guards.torch_private import apply_of, forward_ad, has_memory, opaque, without_autocast
from ..plan import Plan
from ..precision.recomputed import saved_again


class PlanFunction(torch.autograd.Function):
    """Runs a plan: `apply(plan, stage, extra count, call, x, *extras, *weights)`. The call is what
    runs the forward, and what that takes besides, to which no gradient comes."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, stage: Any, extras: int, call: Any, *tensors: Tensor) -> Any:
        (run, more), x, ops = call, tensors[0], plan.ops
        ctx.plan, ctx.stage, ctx.count = plan, stage, len(tensors)
        ctx.joined = run is not plan.passes.forward and plan.joined.backward is not None
        ctx.lead = None if x.dim() == 2 else [t.shape for t in tensors[: extras + 1]]
        if ctx.lead is None and not plan.specs.autocast:
            outputs, saved = run(ops, *tensors, *more)
        else:
            inputs = flattened(plan, tensors)
            with without_autocast(x):
                outputs, saved = run(ops, *inputs, *tensors[extras + 1 :], *more)
        if stage.recipe is not None:
            outputs, saved = stage.recipe.after(ctx, plan, outputs, saved)
        if stage.eager_only is not None:
            ctx.watched = stage.unseen.watch(plan, tensors)
        if ctx.lead is not None:
            outputs = released(unflattened(plan, outputs, x.shape), outputs, tensors)
        elif len(outputs) > 1 or outputs[0]._is_view():
            outputs = released(outputs, outputs, tensors)
        ctx.save_for_backward(*saved)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @staticmethod
    @opaque  # to Dynamo, where autograd is compiled
    def backward(ctx: Any, dy: Tensor, *others: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "opsgraph: a plan's backward has no derivative of its own; build the module with "
                "double_backward=True to differentiate twice"
            )
        plan, stage, recipe = ctx.plan, ctx.stage, ctx.stage.recipe
        whole = (dy, *[others[k - 1] for k in plan.specs.taps]) if others else (dy,)
        saved = saved_again(ctx, None if recipe is None else recipe.number)
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained: each dies after its use
        plain = has_memory(dy) if len(whole) == 1 else all(map(has_memory, whole))
        plain = plain and forward_ad._current_level < 0
        with without_autocast(dy) if plain else see_through(plan, whole, saved):
            flats = whole if ctx.lead is None else [flat(gradient, 2) for gradient in whole]
            run, seen = recipe.backward(plan) if ctx.joined else (plan.passes.backward, ())
            if stage.eager_only is not None:
                gradients = stage.unseen.run_backward(run, plan, ctx, (*flats, *seen), saved)
            else:
                gradients = run(plan.ops, *flats, *seen, saved)
            if ctx.lead is not None:
                gradients = as_given(gradients, ctx.lead, flats, whole)
            if plan.specs.reported and not ctx.joined:
                gradients = note_gradients(plan, gradients, recipe.seen_gradients(plan))
        return None, None, None, None, *gradients[: ctx.count]


run_training: Callable[..., Any] = apply_of(PlanFunction)
"""Forward with gradients wanted, `PlanFunction.apply` of tensors of which none is left over by a
transform."""


def run_inference(plan: Plan, stage: Any, extras: int, tensors: Any, call: Any = None) -> Any:
    """The forward alone, no gradient being wanted."""
    (run, more), x, ops = call or (plan.passes.forward, ()), tensors[0], plan.ops
    flat_already = x.dim() == 2
    if flat_already and not plan.specs.autocast:
        outputs = run(ops, *tensors, *more)[0]
    elif plan.specs.identity:
        return x
    else:
        inputs = flattened(plan, tensors)
        if stage.double_backward:
            copy_gradients(inputs)
        with without_autocast(x):
            outputs = run(ops, *inputs, *tensors[extras + 1 :], *more)[0]
    if plan.specs.reports and run is plan.passes.forward:
        outputs = stage.recipe.record(plan, outputs, torch.is_grad_enabled())
    if not flat_already:
        views = unflattened(plan, outputs, x.shape)
        followed = stage.double_backward or torch.is_grad_enabled()
        outputs = views if followed else released(views, outputs, tensors)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
