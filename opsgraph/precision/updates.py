"""The updates of delayed scaling: what passes saw becomes history, and history makes scales.

`delayed` says when. All states of a recipe are updated at once: on CUDA by one launch of a kernel,
which finds their buffers by a table of addresses, elsewhere by a few operations for each device and
not for each layer. What either needs of the states is kept for as long as their buffers stay where
they are. The usual update is that of before, natively (`as_before`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base import config
from ..guards.launching import Launch, launching
from ..guards.torch_private import (
    capturing,
    capturing_here,
    empty_strided,
    ops_alone,
    stream_of,
)
from ..kernels.reference.quantize import FP8_MAX, delayed_update, new_scales
from .changes import ready
from .changes import states as every_state
from .delayed import BACKWARD, FORWARD, Scaling, states_of
from .exchange import reduce_flat
from .fixed import Fixed, followed_ops
from .recipe import DelayedScaling, Format
from .recorded import kernels_on

_COLUMNS = {FORWARD: slice(0, 2), BACKWARD: slice(2, 3)}
_NORMAL: AbstractContextManager[Any] = nullcontext()
_buffers, _FOUR = attrgetter("_buffers"), ("scale", FORWARD, BACKWARD, "amax_history")
_four = itemgetter(*_FOUR)


def serving(recipe: DelayedScaling) -> list[Scaling]:
    """All states of a recipe, each with that recipe's scales."""
    states, terms = states_of(recipe.key), recipe.terms
    for state in states:
        if state.__dict__["terms"] is not terms and state.terms != terms:
            with config.lock:
                state.serve(terms)
    return states


def update_backward(recipe: DelayedScaling, group: Any) -> None:
    """When a recipe's outermost context opens: new scales of gradients, and what came late.

    Reads then have what `scale` holds, whoever wrote it, as torch.distributed.checkpoint does.
    """
    changes = every_state.changes
    states, late = serving(recipe), False
    for state in states:
        host = state.__dict__  # past the module's look at each attribute
        if host["fresh"] or host["late"]:
            late = late or host["late"]
            host["fresh"] = host["late"] = False
    if group is not None and recipe.reduce_amax:  # ranks need not have run the same layers
        _update(states, recipe, group, (BACKWARD, FORWARD))
    else:
        _update(states, recipe, None, (BACKWARD, FORWARD)[: 1 + late], changes)


def update_forward(recipe: DelayedScaling, group: Any) -> None:
    """When a recipe's outermost context ends: new scales of activations and weights."""
    changes, group = every_state.changes, group if recipe.reduce_amax else None
    _update(serving(recipe), recipe, group, (FORWARD,), changes)


def catch_up(state: Scaling, recipe: DelayedScaling) -> None:
    """Update a copied or loaded layer that comes to a recipe whose context is open already."""
    if state.fresh:
        names = (BACKWARD, FORWARD)[: 1 + state.late]
        state.fresh = state.late = False
        _update([state], recipe, None, names)


def _update(
    states: Sequence[Scaling], recipe: DelayedScaling, group: Any, names: Sequence[str],
    changes: int | None = None,
) -> None:  # fmt: skip
    """Update the columns that belong to some buffers of amaxes, after one reduction over the group.

    changes: of states, before these were looked at; None for some of a recipe's alone.
    Raises OpsgraphError if ranks of the group have other states.
    """
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else _NORMAL:
        largest = None
        if group is not None:
            states, largest = _reduced(states, names, group)
        by_device: dict[torch.device, list[int]] = {}
        for k, state in enumerate(states):
            by_device.setdefault(state._buffers["scale"].device, []).append(k)  # type: ignore[union-attr]
        for device, places in by_device.items():
            some, amaxes = [states[k] for k in places], largest
            if largest is not None:
                amaxes = _part(largest, len(states), places, names).to(device)
            with config.lock:  # other threads may run under the recipe
                done = _update_on(device, some, recipe, names, amaxes)
        if changes is not None and group is None and len(by_device) == len(names) == 1:
            _keep(states, recipe, names[0], changes, *done)


def _update_on(
    device: torch.device, states: Sequence[Scaling], recipe: DelayedScaling, names: Sequence[str],
    amaxes: Tensor | None,
) -> tuple[Launch | None, _Table | None, Tensor]:  # fmt: skip
    """Update states on one device; returns the kernel, if it was one, its table, and the scales.

    amaxes: all that are named, where they are not the states'.
    """
    count, forward = len(states), FORWARD in names
    limits = _limits(recipe.fp8_format)
    algorithm = recipe.amax_compute_algo
    known = _known(device, states, isinstance(algorithm, str))
    values, launch, table = new_scales(count * (1 + forward), device), None, None
    if isinstance(known, _Table):
        latest = algorithm == "most_recent"
        given = () if amaxes is None else (amaxes,)
        kind = known.addresses, known.length, limits, recipe.margin, latest, names, bool(given)
        launch, table = known.updating(*kind), known
        launch(table.addresses, values, *given)
    else:
        scales: list[Any] = [state._buffers["scale"] for state in states]
        if forward:
            torch._foreach_copy_(list(values[count:].unbind(0)), scales)
        for name in names:
            ours = amaxes if amaxes is None else _of(amaxes, count, names, name)
            with torch.no_grad():
                _by_formulas(known, recipe, name, limits[name == BACKWARD], ours)
        torch._foreach_copy_(list(values[:count].unbind(0)), scales)
    _hold([state.__dict__ for state in states], Fixed(values), forward)
    return launch, table, values


def _hold(hosts: Sequence[dict[str, Any]], fixed: Fixed, forward: bool) -> None:
    """Have states read their new scales. forward: whether those of before stand behind them."""
    count, pinned = len(hosts), Scaling.pinned
    for k, host in enumerate(hosts):
        scale = host["_buffers"]["scale"]
        host["_fixed"] = fixed, k, scale, -1 if scale.is_inference() else scale._version
        if forward:
            host["_previous"] = fixed, count + k
            host["updates"] += 1
        if pinned:
            host["fixed"] = fixed.values[k]


class _Ready(NamedTuple):
    """An update of all states of a recipe, as it was done before."""

    changes: int
    """Of states, until then."""
    hosts: list[dict[str, Any]]
    """The states' own dicts, past the modules' look at each attribute."""
    scales: list[Tensor]
    unmoved: Callable[[], bool]
    """Whether their buffers are those of before, of the sizes of then, and where they were."""
    run: Callable[..., bool]
    """The kernel's native launch, False where it does nothing."""
    table: Tensor
    new: Callable[[], Tensor]
    """Allocates what scales are written to, on the current device."""
    number: int | None
    """Of the CUDA device."""


def _keep(
    states: Sequence[Scaling], recipe: DelayedScaling, name: str, changes: int,
    launch: Launch | None, table: _Table | None, scales: Tensor,
) -> None:  # fmt: skip
    """Keep what does an update again, if it is a native launch. changes: see `_update`.

    scales: what was written. Another thread may have given states others, and fewer, since, or
    buffers other memory than the table's: that is asked last, and nothing is kept then.
    """
    run, (buffers, addresses, _) = getattr(launch, "native", None), _memory(states)
    if run is None or table is None or not addresses or any(map(Tensor.is_inference, buffers)):
        return
    new = partial(empty_strided(scales.device), (*scales.shape,), scales.stride(), scales.dtype)
    hosts = [state.__dict__ for state in states]
    where = buffers[::4], launching.unmoved(hosts, _FOUR, buffers)
    if [*map(Tensor.data_ptr, buffers)] == table.begin:
        number = scales.get_device() if scales.is_cuda else None
        kept = _Ready(changes, hosts, *where, run, table.addresses, new, number)
        ready[recipe.key, name] = kept


def as_before(key: int, name: str) -> bool:
    """Update the states of a recipe as that was done before; False where something is another."""
    known: _Ready | None = ready.get((key, name))
    if known is None:
        return False
    changes, hosts, scales, unmoved, run, table, new, number = known
    if (
        changes != every_state.changes
        or not ops_alone()
        or not unmoved()
        or torch.is_inference_mode_enabled()
        or (number is not None and stream_of(number) and capturing_here())
    ):
        return False
    with config.lock:  # other threads may run under the recipe
        if not run(table, values := new()):
            return False
        fixed, count, forward = Fixed(values), len(hosts), name == FORWARD
        for k, host in enumerate(hosts):  # `_hold`, in one frame
            scale = scales[k]
            host["_fixed"] = fixed, k, scale, scale._version
            if forward:
                host["_previous"] = fixed, count + k
                host["updates"] += 1
        if Scaling.pinned:
            for k, host in enumerate(hosts):
                host["fixed"] = fixed.values[k]
    return True


def _memory(states: Sequence[Scaling]) -> list[list[Any]]:
    """The four buffers of each state, where they begin, and the sizes of the histories.

    Nothing is known of where they are if one is of a subclass.
    """
    buffers = [*chain.from_iterable(map(_four, map(_buffers, states)))]
    if {*map(type, buffers)} != {Tensor}:
        return [buffers, [], []]
    return [buffers, [*map(Tensor.data_ptr, buffers)], [*map(Tensor.numel, buffers[3::4])]]


@cache
def _limits(to: Format) -> tuple[float, float]:
    """The largest numbers of what activations and weights, and gradients, are cast to."""
    return FP8_MAX[to.of("activation")], FP8_MAX[to.of("gradient")]


class _Table(NamedTuple):
    """A kernel, and what it needs of states with buffers at certain addresses."""

    updating: Callable[..., Launch]
    addresses: Tensor
    length: int
    """Of all histories."""
    begin: list[int]
    """The addresses."""


class _Views(NamedTuple):
    """The same for formulas: by a buffer of amaxes the columns that belong to it, of each state."""

    histories: dict[str, list[Tensor]]
    scales: dict[str, list[Tensor]]
    amaxes: dict[str, list[Tensor]]
    """The buffers themselves, past their versions."""


_MOST = 8
"""Sets of states that begin with the same one, of which something is kept."""
_captured: dict[Any, _Table] = {}
"""What CUDA graphs read, which may run for ever."""


def _known(device: torch.device, states: Sequence[Scaling], by_kernel: bool) -> _Table | _Views:
    """What the first of some states keeps of all, looked at anew where an address is new."""
    buffers, addresses, sizes = _memory(states)
    if not addresses or followed_ops(buffers[0]):
        return _views(buffers)
    key = device, by_kernel, *sizes, *addresses
    kept = states[0].__dict__["_known"]
    known: _Table | _Views | None = kept.get(key)
    held = capturing(device)
    if known is None:
        kernel = _kernel(device) if by_kernel and not held else None  # a table comes from the host
        plain = all(each.is_contiguous() and each.dtype == torch.float32 for each in buffers)
        if kernel is None or not plain or len(set(sizes)) > 1:
            known = _views(buffers)
        else:
            table = torch.tensor(addresses, device="cpu").view(-1, 4).to(device)
            known = _Table(kernel, table, buffers[3].size(0), addresses)
        if held:
            return known
        kept[key] = known
        if len(kept) > _MOST:
            del kept[next(iter(kept))]
    if held and isinstance(known, _Table):
        _captured[key] = known
    return known


def _views(buffers: Sequence[Tensor]) -> _Views:
    scales, histories = buffers[::4], buffers[3::4]
    return _Views(
        {name: [each[:, columns] for each in histories] for name, columns in _COLUMNS.items()},
        {name: [each[columns] for each in scales] for name, columns in _COLUMNS.items()},
        {name: [each.data for each in buffers[k::4]] for k, name in ((1, FORWARD), (2, BACKWARD))},
    )


def _kernel(device: torch.device) -> Callable[..., Launch] | None:
    """What updates states on a device in one launch, or None."""
    kernels = kernels_on(device)
    return None if kernels is None else kernels.updating


def _by_formulas(
    known: _Views, recipe: DelayedScaling, name: str, limit: float, amax: Tensor | None
) -> None:
    """Update the columns of one buffer of amaxes. amax: all of them, where they are not there."""
    histories, scales, seen = known.histories[name], known.scales[name], known.amaxes[name]
    history, scale = torch.cat(histories, 1), torch.cat(scales)
    amax = torch.cat(seen) if amax is None else amax
    unseen = amax < 0  # of a NaN this is False
    new_history, new_scale = delayed_update(
        torch.cat((amax[None], history[1:])), scale, limit, recipe.margin, recipe.amax_compute_algo
    )
    width = seen[0].numel()
    nothing = amax.new_full((width,), -1.0)
    torch._foreach_copy_(
        [*histories, *scales, *seen],
        [
            *torch.where(unseen, history, new_history).split(width, 1),
            *torch.where(unseen, scale, new_scale).split(width),
            *[nothing] * len(seen),
        ],
    )


def _reduced(
    states: Sequence[Scaling], names: Sequence[str], group: Any
) -> tuple[list[Scaling], Tensor]:
    """The states in an order that all ranks have, and the largest amaxes of all ranks.

    The amaxes: those that belong to the first name, of each state, then the next name's.
    """
    labels = _names(states)
    order = sorted(range(len(states)), key=labels.__getitem__)
    states = [states[k] for k in order]
    description = tuple(names), tuple(labels[k] for k in order)
    values: Any = [state._buffers[name] for name in names for state in states]
    return states, reduce_flat(values, description, group)


def _width(name: str) -> int:
    return _COLUMNS[name].stop - _COLUMNS[name].start


def _of(amaxes: Tensor, count: int, names: Sequence[str], name: str) -> Tensor:
    """The part of amaxes, of `count` states, that belongs to a name."""
    first = 0 if name == names[0] else count * _width(names[0])
    return amaxes[first : first + count * _width(name)]


def _part(largest: Tensor, count: int, places: Sequence[int], names: Sequence[str]) -> Tensor:
    """The amaxes of the states at some of `count` places."""
    if len(places) == count:
        return largest
    named = [_of(largest, count, names, name).split(_width(name)) for name in names]
    return torch.cat([amaxes[k] for amaxes in named for k in places])


def _names(states: Sequence[Scaling]) -> list[str]:
    """Labels that ranks compare, numbers from the least on: one may have built more before.

    That is the least of the first exchange: where a layer with a lower number comes later, ranks
    had begun with different ones.
    """
    labels = [state.label for state in states]
    serials = {s: int(s[1:]) for s in labels if s.startswith("#") and s[1:].isdigit()}
    known = (state.first for state in states if state.first is not None)
    first = next(known, min(serials.values(), default=0))
    for state in states:
        state.first = first
    return [f"#{serials[s] - first}" if s in serials else s for s in labels]
