"""Many delayed scales, or buffers of amaxes, at once: what each needs to know is found once.

That is the usual call: no recomputation, no tape, and nothing follows PyTorch's ops. In all others
each state is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter, itemgetter

import torch
from torch import Tensor

from ..guards.torch_private import graph_task, ops_alone
from .delayed import FORWARD, Scaling
from .fixed import Fixed, gathered, version_of
from .tapes import tapes

_buffers, _forward = attrgetter("_buffers"), itemgetter(FORWARD)


def usual() -> bool:
    """Whether that is so, and nothing compiles."""
    return not torch.compiler.is_compiling() and _unwatched()


def _unwatched() -> bool:
    return graph_task() == -1 and not tapes.recording and tapes.replaying is None and ops_alone()


def fixed_of(states: Sequence[Scaling]) -> Sequence[Tensor] | None:
    """The scales of states, one tensor, fp32 `[states, 3]`, none without states; for calls that
    nothing compiles.

    None where each state has to be asked, see `Scaling.read`.
    """
    # `_unwatched`, in one frame
    if graph_task() != -1 or tapes.recording or tapes.replaying is not None or not ops_alone():
        return None
    current, places, several = None, list[int](), False
    for state in states:
        host = state.__dict__  # past the module's look at each attribute
        fixed, place, scale, version = host["_fixed"]
        if host["_buffers"]["scale"] is not scale or type(scale) is not Tensor:
            return None
        if version != (version_of(scale) if version < 0 else scale._version):
            return None
        if fixed is not current:  # one update has made most
            if fixed.number is not None and not fixed.is_for_now():
                return None
            current, several = fixed, current is not None
        places.append(place)
    if several:
        return _gathered([state.__dict__["_fixed"][:2] for state in states])
    return () if current is None else (current.part((*places,)),)


def _gathered(places: Sequence[tuple[Fixed, int]]) -> Sequence[Tensor] | None:
    """The same of states that were not updated together."""
    one_device = len({fixed.number for fixed, _ in places}) == 1
    return (gathered(places),) if one_device else None


def taken_by(
    states: Sequence[Scaling], layers: Iterable[Scaling], grad: bool
) -> Sequence[Tensor]:  # fmt: skip
    """Take down that a call has these states' scales; returns what amaxes are noted in, by layer.

    layers: the state of each. grad: whether the call was made with grad; without, none is noted.
    """
    for state in states:
        host = state.__dict__
        if grad:
            host["used"] = host["updates"]
        host["recorded"] = grad
    return [*map(_forward, map(_buffers, layers))] if grad else ()


def seen_by(states: Iterable[Scaling], name: str) -> list[Tensor]:
    """A buffer of amaxes of each state."""
    return [*map(itemgetter(name), map(_buffers, states))]
