"""The updates of delayed scaling: what passes saw becomes history, and history makes scales.

`delayed` says when. All states of a recipe are updated at once, by a few operations for each device
and not for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..base import config
from ..base.errors import OpsgraphError
from ..kernels.reference.quantize import FP8_MAX, delayed_update
from .delayed import BACKWARD, FORWARD, Scaling, states_of
from .exchange import reduce_max
from .recipe import DelayedScaling

_COLUMNS = {FORWARD: slice(0, 2), BACKWARD: slice(2, 3)}


def serving(recipe: DelayedScaling) -> list[Scaling]:
    """All states of a recipe, each with that recipe's scales."""
    states, terms = states_of(recipe), recipe.terms
    for state in states:
        if state.terms != terms:
            with config.lock:
                state.serve(terms)
    return states


def update_backward(recipe: DelayedScaling, group: Any) -> None:
    """When a recipe's outermost context opens: new scales of gradients, and what came late."""
    states, reduced = serving(recipe), group is not None and recipe.reduce_amax
    late = reduced  # ranks need not have run the same layers: with a group always both
    for state in states:
        host = state.__dict__  # past the module's look at each attribute
        if host["fresh"] or host["late"]:
            late = late or host["late"]
            host["fresh"] = host["late"] = False
        if host["version"] != state._buffers["scale"]._version:  # type: ignore[union-attr]
            state.fix()  # others wrote to it, as torch.distributed.checkpoint does
    _update(states, recipe, group if reduced else None, (BACKWARD, FORWARD)[: 1 + late])


def update_forward(recipe: DelayedScaling, group: Any) -> None:
    """When a recipe's outermost context ends: new scales of activations and weights."""
    _update(serving(recipe), recipe, group if recipe.reduce_amax else None, (FORWARD,))


def catch_up(state: Scaling, recipe: DelayedScaling) -> None:
    """Update a copied or loaded layer that comes to a recipe whose context is open already."""
    if state.fresh:
        names = (BACKWARD, FORWARD)[: 1 + state.late]
        state.fresh = state.late = False
        _update([state], recipe, None, names)


def _update(
    states: Sequence[Scaling], recipe: DelayedScaling, group: Any, names: Sequence[str]
) -> None:
    """Update the columns that belong to some buffers of amaxes, after one reduction over the group.

    Raises OpsgraphError if ranks of the group have other states.
    """
    if not states and group is None:
        return
    with torch.inference_mode(False), torch.no_grad():
        amaxes: Any = {name: [state._buffers[name] for state in states] for name in names}
        if group is not None:
            amaxes = _reduced(states, amaxes, group)
        by_device: dict[Any, list[int]] = {}
        for k, state in enumerate(states):
            by_device.setdefault(state._buffers["scale"].device, []).append(k)  # type: ignore[union-attr]
        for places in by_device.values():
            for name in names:
                with config.lock:  # other threads may run under the recipe
                    amax = torch.cat([amaxes[name][k] for k in places])
                    _update_columns([states[k] for k in places], amax, recipe, name)


def _update_columns(
    states: Sequence[Scaling], amax: Tensor, recipe: DelayedScaling, name: str
) -> None:
    """Update the columns of one buffer of amaxes, on one device. amax: fp32, of all states."""
    columns = _COLUMNS[name]
    buffers = [state._buffers for state in states]
    histories: list[Any] = [each["amax_history"][:, columns] for each in buffers]  # type: ignore[index]
    scales: list[Any] = [each["scale"][columns] for each in buffers]  # type: ignore[index]
    history, scale = torch.cat(histories, 1), torch.cat(scales)
    unseen = amax < 0  # of a NaN this is False
    limit = FP8_MAX[recipe.fp8_format.of("gradient" if name == BACKWARD else "activation")]
    new_history, new_scale = delayed_update(
        torch.cat((amax[None], history[1:])), scale, limit, recipe.margin, recipe.amax_compute_algo
    )
    if new_scale.shape != scale.shape:
        raise OpsgraphError(
            f"DelayedScaling: amax_compute_algo returned {tuple(new_scale.shape)}, "
            f"expected {tuple(scale.shape)}"
        )
    width = columns.stop - columns.start
    new_histories = torch.where(unseen, history, new_history).split(width, 1)
    new_scales = torch.where(unseen, scale, new_scale).split(width)
    for k, (state, each) in enumerate(zip(states, buffers, strict=True)):
        host = state.__dict__
        histories[k].copy_(new_histories[k])
        scales[k].copy_(new_scales[k])
        if name == FORWARD:
            host["previous"], host["fixed_forward"] = scale[2 * k : 2 * k + 2], new_scales[k]
            host["updates"] += 1
        else:
            host["fixed_backward"] = new_scales[k]
        host["version"] = each["scale"]._version  # type: ignore[union-attr]
        each[name].data.fill_(-1.0)  # type: ignore[union-attr]


def _reduced(
    states: Sequence[Scaling], amaxes: Mapping[str, Sequence[Tensor]], group: Any
) -> dict[str, list[Tensor]]:
    """The amaxes of all ranks, whose states may have been made in another order."""
    names = _names([state.label for state in states])
    order = sorted(range(len(states)), key=names.__getitem__)
    description = tuple(amaxes), tuple(names[k] for k in order)
    values = [amaxes[name][k] for name in amaxes for k in order]
    largest = iter(reduce_max(values, description, group))
    reduced = {}
    for name in amaxes:
        by_state = dict(zip(order, largest, strict=False))
        reduced[name] = [by_state[k] for k in range(len(states))]
    return reduced


def _names(labels: Sequence[str]) -> list[str]:
    """Labels that ranks compare, numbers from the least on: one may have built more before."""
    serials = {s: int(s[1:]) for s in labels if s.startswith("#") and s[1:].isdigit()}
    first = min(serials.values(), default=0)
    return [f"#{serials[s] - first}" if s in serials else s for s in labels]
