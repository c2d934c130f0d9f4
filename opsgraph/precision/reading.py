"""Many delayed scales, or buffers of amaxes, at once: what each needs to know is found once.

That is the usual call: no recomputation, no tape, and nothing follows PyTorch's ops. In all others
each state is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..guards.torch_private import graph_task, ops_alone
from .delayed import Scaling
from .fixed import version_of
from .tapes import tapes


def usual() -> bool:
    """Whether that is so."""
    return (
        not torch.compiler.is_compiling()
        and graph_task() == -1
        and not tapes.recording
        and tapes.replaying is None
        and ops_alone()
    )


def scales_of(places: Iterable[tuple[Scaling, int]]) -> list[Tensor]:
    """Scales of states, fp32 `[]`, a column of each; see `Scaling.activation`."""
    if not usual():
        return [state.read(column) for state, column in places]
    grad, current, found = torch.is_grad_enabled(), None, []
    views: Sequence[Tensor] = ()
    for state, column in places:
        host = state.__dict__  # past the module's look at each attribute
        fixed, first, scale, version = host["_fixed"]
        same = host["_buffers"]["scale"] is scale and type(scale) is Tensor
        if not same or version != (version_of(scale) if version < 0 else scale._version):
            found.append(state.read(column))
            continue
        if fixed is not current:  # one update has made most
            if not fixed.is_for_now():
                found.append(state.read(column))
                continue
            current, views = fixed, fixed.views()
        if grad:
            host["used"] = host["updates"]
        found.append(views[first + column])
    return found


def buffers_of(states: Sequence[Scaling], name: str, column: int = 0) -> list[Tensor]:
    """A column of a buffer of amaxes of each state; see `Scaling.seen`."""
    plain = ops_alone()
    found = []
    for state in states:
        host = state.__dict__
        buffer, views = host["_buffers"][name], host["_seen"].get(name)
        if plain and views is not None and views[0] is buffer and views[1] == buffer.data_ptr():
            found.append(views[2][column])
        else:
            found.append(state.seen(name, column))
    return found
