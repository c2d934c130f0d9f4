"""How delayed scaling moves on: what passes saw becomes history, and history makes scales."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import config
from ..errors import OpsgraphError
from ..guards.torch_private import preserve_version
from ..kernels.reference.quantize import FP8_MAX, delayed_update
from .delayed import BACKWARD, FORWARD, Scaling, states_of
from .exchange import reduce_max
from .recipe import DelayedScaling

_COLUMNS = {FORWARD: slice(0, 2), BACKWARD: slice(2, 3)}


def take_up_backwards(recipe: DelayedScaling, group: Any) -> None:
    """When a recipe's outermost context opens: new scales of gradients.

    What a reentrant checkpoint noted of its forward waits for this too: it ran in a backward.
    """
    states, reduced = serving(recipe), group is not None and recipe.reduce_amax
    late = reduced
    for state in states:
        state.fresh = False
        if state.late:
            late, state.late = True, False
        if state.version != state._buffers["scale"]._version:  # type: ignore[union-attr]
            state.fix()  # others wrote to it, as torch.distributed.checkpoint does
    # With a group always both: ranks need not have run the same layers.
    _take_up(states, recipe, group if reduced else None, (BACKWARD, *([FORWARD] if late else [])))


def take_up_forwards(recipe: DelayedScaling, group: Any) -> None:
    """When a recipe's outermost context ends: new scales of activations and weights."""
    _take_up(serving(recipe), recipe, group if recipe.reduce_amax else None, (FORWARD,))


def serving(recipe: DelayedScaling) -> list[Scaling]:
    """All states of a recipe, each with that recipe's scales."""
    states, terms = states_of(recipe), recipe.terms
    for state in states:
        if state.terms != terms:
            with config.lock:
                state.serve(terms)
    return states


def take_up_what_came(state: Scaling, recipe: DelayedScaling) -> None:
    """Have a copied or loaded layer, whose recipe is active, take up what its last backward saw."""
    if state.fresh:
        names = (BACKWARD, FORWARD) if state.late else (BACKWARD,)
        state.fresh = state.late = False
        _take_up([state], recipe, None, names)


def _take_up(
    states: Sequence[Scaling], recipe: DelayedScaling, group: Any, names: Sequence[str]
) -> None:
    """Move what was seen into the histories, and make new scales from these.

    All states of the recipe are updated at once, after one reduction over the group; those that saw
    nothing stay as they are. Raises OpsgraphError if ranks of the group have other states.
    """
    with torch.inference_mode(False), torch.no_grad():
        amaxes: Any = {name: [state._buffers[name] for state in states] for name in names}
        if group is not None:
            amaxes = _reduced(states, amaxes, group)
        devices = [state.scale.device for state in states]
        for device in dict.fromkeys(devices):
            here = [k for k, other in enumerate(devices) if other == device]
            for name in names:
                with config.lock:  # other threads may run under the recipe
                    seen = torch.cat([amaxes[name][k] for k in here])
                    _update([states[k] for k in here], seen, recipe, name)


def _reduced(
    states: Sequence[Scaling], amaxes: Mapping[str, Sequence[Tensor]], group: Any
) -> dict[str, list[Tensor]]:
    """The amaxes of all ranks, whose states may have been made in another order."""
    names = _names([state.label for state in states])
    order = sorted(range(len(states)), key=names.__getitem__)
    what = tuple(amaxes), tuple(names[k] for k in order)
    flat = iter(reduce_max([seen[k] for seen in amaxes.values() for k in order], what, group))
    made = {}
    for name in amaxes:
        by_state = dict(zip(order, flat, strict=False))
        made[name] = [by_state[k] for k in range(len(states))]
    return made


def _names(labels: Sequence[str]) -> list[str]:
    """Labels that ranks compare, numbers from the least on: one may have built more before."""
    serials = {s: int(s[1:]) for s in labels if s.startswith("#") and s[1:].isdigit()}
    first = min(serials.values(), default=0)
    return [f"#{serials[s] - first}" if s in serials else s for s in labels]


def _update(states: Sequence[Scaling], amax: Tensor, recipe: DelayedScaling, name: str) -> None:
    columns = _COLUMNS[name]
    history = torch.cat([state.amax_history[:, columns] for state in states], 1)
    old = torch.cat([state.scale[columns] for state in states])
    seen = ~(amax < 0)
    limit = FP8_MAX[recipe.fp8_format.of("gradient" if name == BACKWARD else "activation")]
    new_history, new_scale = delayed_update(
        torch.cat((amax[None], history[1:])), old, limit, recipe.margin, recipe.amax_compute_algo
    )
    if new_scale.shape != old.shape:
        raise OpsgraphError(
            f"DelayedScaling: amax_compute_algo returned {tuple(new_scale.shape)}, "
            f"expected {tuple(old.shape)}"
        )
    history = torch.where(seen, new_history, history)
    scale = torch.where(seen, new_scale, old)
    width = columns.stop - columns.start
    parts = history.split(width, 1), old.split(width), scale.split(width)
    for state, past, before, now in zip(states, *parts, strict=True):
        buffers, host = state._buffers, state.__dict__  # past the module's look at each attribute
        own: Any = buffers["scale"]
        buffers["amax_history"][:, columns] = past  # type: ignore[index]
        own[columns] = now
        if name == FORWARD:
            host["before"], host["fixed_forward"] = before, now
            host["updates"] += 1
        else:
            host["fixed_backward"] = now
        host["version"] = own._version
        _forget(buffers[name])


def _forget(seen: Any) -> None:
    with preserve_version(seen):
        seen.fill_(-1.0)
