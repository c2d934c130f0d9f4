"""Running a plan: the one autograd.Function, and the forward alone.

A plan computes on `[rows, width]` with autocast off, and knows nothing of autograd. Around it stand
leading dimensions (`features.dimensions`), what autograd saves, the amaxes that a recipe notes.
Gradients that are no memory of a kernel's are told apart in the backward, see `see_through`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..features.dimensions import as_given, flat, flattened, released, unflattened
from ..features.followed import copy_gradients, see_through
from ..features.recipes import note_gradients
from ..guards.torch_private import (
    apply_of,
    forward_ad,
    has_memory,
    without_autocast,
)
from ..plan import Plan
from ..precision.recomputed import saved_again


class PlanFunction(torch.autograd.Function):
    """Runs a plan forward and backward: `apply(plan, stage, extra count, x, *extras, *weights)`."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, stage: Any, extras: int, *tensors: Tensor) -> Any:
        x, ops = tensors[0], plan.ops
        ctx.plan, ctx.stage = plan, stage
        ctx.lead = None if x.dim() == 2 else [t.shape for t in tensors[: extras + 1]]
        if ctx.lead is None and not plan.specs.autocast:
            outputs, saved = plan.passes.forward(ops, *tensors)
        else:
            inputs = flattened(plan, tensors)
            with without_autocast(x):
                outputs, saved = plan.passes.forward(ops, *inputs, *tensors[extras + 1 :])
        if stage.recipe is not None:
            if plan.specs.reports:
                outputs = stage.recipe.record(plan, outputs, True)
            ctx.moment = stage.recipe.moment()
            saved = saved if ctx.moment is None else (ctx.moment, *saved)
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
        plan, stage, recipe = ctx.plan, ctx.stage, ctx.stage.recipe
        whole = (dy, *[others[k - 1] for k in plan.specs.taps]) if others else (dy,)
        saved = saved_again(ctx, None if recipe is None else recipe.number)
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained: each dies after its use
        plain = has_memory(dy) if len(whole) == 1 else all(map(has_memory, whole))
        plain = plain and forward_ad._current_level < 0
        with without_autocast(dy) if plain else see_through(plan, whole, saved):
            flats = whole if ctx.lead is None else [flat(gradient, 2) for gradient in whole]
            if stage.eager_only is not None:
                gradients = stage.unseen.run_backward(plan, ctx, flats, saved)
            else:
                gradients = plan.passes.backward(plan.ops, *flats, saved)
            if ctx.lead is not None:
                gradients = as_given(gradients, ctx.lead, flats, whole)
            if plan.specs.reported:
                gradients = note_gradients(plan, gradients, recipe.seen_gradients(plan))
        return None, None, None, *gradients


run_training: Callable[..., Any] = apply_of(PlanFunction)
"""Forward with gradients wanted, `(plan, stage, extra count, x, *extras, *weights)`: tensors of
which none is left over by a transform."""


def run_inference(plan: Plan, stage: Any, extras: int, tensors: Sequence[Any]) -> Any:
    """The forward alone, no gradient being wanted."""
    x, ops = tensors[0], plan.ops
    flat_already = x.dim() == 2
    if flat_already and not plan.specs.autocast:
        outputs = plan.passes.forward(ops, *tensors)[0]
    elif plan.specs.identity:
        return x
    else:
        inputs = flattened(plan, tensors)
        if stage.double_backward:
            copy_gradients(inputs)
        with without_autocast(x):
            outputs = plan.passes.forward(ops, *inputs, *tensors[extras + 1 :])[0]
    if plan.specs.reports:
        outputs = stage.recipe.record(plan, outputs, torch.is_grad_enabled())
    if not flat_already:
        views = unflattened(plan, outputs, x.shape)
        followed = stage.double_backward or torch.is_grad_enabled()
        outputs = views if followed else released(views, outputs, tensors)
    return outputs[0] if len(outputs) == 1 else tuple(outputs)
