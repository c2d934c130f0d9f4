"""Amaxes that a pass saw are noted in the buffers of delayed scaling, all of one kind in one op.

The usual call has a pass note them itself (`features.joined`), by a line that calls `note`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from ..base import config
from ..base.backend import backends
from .delayed import FORWARD, Scaling
from .fixed import followed_ops
from .quantizers import ROLES
from .reading import seen_by, usual
from .tapes import compiled_record


def record(states: Sequence[Scaling], role: str, amaxes: Sequence[Any], grad: bool) -> None:
    """Note amaxes of activations or weights that were quantized, of a state each.

    amaxes: fp32 `[]`, None for a weight that was held quantized. grad: whether the call was made
    with grad enabled; without, nothing is noted.
    """
    column = ROLES.index(role)
    if grad and usual():
        if role == "activation":
            for state in states:
                if not state.__dict__["recorded"]:  # past the module's look at each attribute
                    state.recorded = True
        noted = [pair for pair in zip(states, amaxes, strict=True) if pair[1] is not None]
    else:
        pairs = zip(states, amaxes, strict=True)
        noted = [(s, amax) for s, amax in pairs if amax is not None and s.notes(role, grad)]
    if torch.compiler.is_compiling():
        with torch.no_grad():
            for state, amax in noted:
                compiled_record(state.amax_forward, amax, column)
    elif noted:
        seen = seen_by([s for s, _ in noted], FORWARD)
        note(seen, [column] * len(seen), [amax for _, amax in noted])


def note(seen: Sequence[Tensor], columns: Sequence[int], amaxes: Sequence[Any]) -> None:
    """Note amaxes in a column of a buffer each, past its version.

    amaxes: fp32 `[]`, None for nothing to note.
    """
    three = zip(seen, columns, amaxes, strict=True)
    pairs = [(each.data[column], amax) for each, column, amax in three if amax is not None]
    if pairs:
        raise_to(*zip(*pairs, strict=True))


def raise_to(seen: Sequence[Tensor], amaxes: Sequence[Tensor]) -> None:
    """Write the larger of both, or a NaN, to each of `seen`, fp32 `[]`, one after the other.

    A layer may stand twice, and so does what it saw.
    """
    first = seen[0]
    followed = followed_ops(first)
    kernels = None if followed else kernels_on(device := first.device)
    if kernels is not None and {amax.device for amax in amaxes} == {device}:
        kernels.raise_to(seen, amaxes)
        return
    values = [amax.detach() if amax.requires_grad else amax for amax in amaxes]
    if not followed and len(set(map(Tensor.data_ptr, seen))) == len(seen):
        torch._foreach_maximum_(list(seen), values)
        return
    for each, value in zip(seen, values, strict=True):
        torch.maximum(each, value, out=each)


_WITH_KERNELS = "triton", "cpu"
"""Backends that have them."""


def kernels_on(device: torch.device) -> Any:
    """The module of kernels for states and amaxes on a device, or None."""
    return _kernels_on(device, os.environ.get("OPSGRAPH_BACKENDS"))


@cache
def _kernels_on(device: torch.device, allowed_now: str | None) -> Any:
    """The same for a setting of the environment, which may change."""
    allowed, known = config.read().backends, backends()
    for name in _WITH_KERNELS:
        absent = name not in known or (allowed and name not in allowed)
        if not absent and known[name].why_not_on(device) is None:
            return import_module(f"..kernels.{name}.delayed", __package__)
    return None
