"""Any number of dimensions outside of a plan, two inside it, and no memory that is shared unasked.

A plan computes on `[rows, width]`. Around it inputs are flattened, outputs and gradients get their
dimensions back, and autograd is told the truth: an output is no view unless another tensor has its
memory, and a gradient that goes to two places is one tensor, which autograd copies where it must.
"""

from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from ..base.errors import OpError
from ..plan import Plan


def flat(x: Tensor, dims: int | None) -> Tensor:
    """x inside a plan: `[rows, width]`, `[rows]`, or with None as it is."""
    if dims is None or x.dim() == dims:
        return x
    if dims == 1:
        return x.reshape(-1)
    width = x.shape[-1]
    if index(width):  # index(): a width that is recorded, or symbolic, stays so in the shape
        return x.reshape(-1, width)
    return x.flatten(0, -2) if x.dim() > 1 else x.unsqueeze(0)


def flattened(plan: Plan, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The input and the extra inputs as the plan takes them."""
    count = plan.specs.first_weight
    if count == 1:
        return [flat(tensors[0], 2)]
    # Dynamo of PyTorch 2.9 takes strict=False for strict=True.
    pairs = zip(tensors[:count], plan.specs.inputs[:count], strict=True)
    return [flat(tensor, argument.dims) for tensor, argument in pairs]


def unflattened(plan: Plan, outputs: Sequence[Tensor], shape: torch.Size) -> list[Tensor]:
    """Outputs with the leading dimensions of the input; the first one counts the ranks' rows."""
    if plan.specs.same_rows:
        lead = shape[:-1]
        return [y.view(*lead, y.shape[-1]) for y in outputs]
    views = []
    for y, spec in zip(outputs, plan.specs.outputs[: len(outputs)], strict=True):
        up, down = spec.factor.as_integer_ratio()
        if len(shape) < 2 or shape[0] * up % down:
            sizes = f"[rows, *, {shape[-1]}], rows a multiple of {down}"
            raise OpError(plan.labels[0], f"input of shape {tuple(shape)}", sizes)
        views.append(y.view(shape[0] * up // down, *shape[1:-1], y.shape[-1]))
    return views


def memory(tensor: Tensor) -> int:
    """Which storage a tensor has."""
    return int(tensor.untyped_storage()._cdata)


def released(views: Sequence[Tensor], inner: Sequence[Tensor], inputs: Sequence[Any]) -> Any:
    """Outputs that a caller may change in place: no views, where no other tensor has the memory.

    views: the outputs; inner: what they show, as the plan made it; inputs: the plan's. The version
    of an output stays that of what was saved, so a change of it is noticed. An output that another
    one or an input shares memory with remains a view, for which PyTorch refuses the change.
    """
    if len(inner) == 1 and not inner[0]._is_view():  # the plan's own tensor
        return (views[0].detach(),)
    places: list[int] = []
    if any(y._is_view() for y in inner):
        places = [memory(t) for t in (*inner, *inputs) if t is not None]
    return [y if not y._is_view() or places.count(memory(y)) > 1 else y.detach() for y in views]


def as_given(
    gradients: Sequence[Any],
    shapes: Sequence[torch.Size],
    flats: Sequence[Tensor],
    whole: Sequence[Any],
) -> list[Any]:
    """Gradients in the shapes of the inputs. flats: those that came, flattened; whole: unchanged.

    What was one tensor remains one, for autograd copies a gradient that has another owner.
    """
    gradients = list(gradients)
    if len(shapes) == len(flats) == 1:
        dx, (shape,) = gradients[0], shapes
        if dx is not None:
            same = dx is flats[0] and whole[0].shape == shape
            gradients[0] = whole[0] if same else dx.view(shape)
        return gradients
    shaped = {id(flat): tensor for flat, tensor in zip(flats, whole, strict=True)}
    for k, shape in enumerate(shapes):
        gradient = gradients[k]
        if gradient is not None:
            view = shaped.get(id(gradient))
            if view is None or view.shape != shape:
                view = shaped[id(gradient)] = gradient.view(shape)
            gradients[k] = view
    return gradients
