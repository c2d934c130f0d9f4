"""Amaxes that a pass saw are noted in the buffers of delayed scaling, all of one kind in one op."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..base import config
from ..base.backend import backends
from .delayed import FORWARD, Scaling
from .fixed import followed_ops
from .quantizers import ROLES
from .reading import buffers_of, usual
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
        raise_to(buffers_of([s for s, _ in noted], FORWARD, column), [amax for _, amax in noted])


def raise_to(seen: Sequence[Tensor], amaxes: Sequence[Tensor]) -> None:
    """Write the larger of both, or a NaN, to each of `seen`, fp32 `[]`."""
    first, count = seen[0], len(seen)
    one_by_one = followed_ops(first) or (
        count > 1 and len(set(map(Tensor.data_ptr, seen))) < count  # a layer may stand twice
    )
    kernels = None if one_by_one else kernels_on(device := first.device)
    if kernels is not None and {amax.device for amax in amaxes} == {device}:
        kernels.raise_to(seen, amaxes)
        return
    values = [amax.detach() if amax.requires_grad else amax for amax in amaxes]
    if not one_by_one:
        torch._foreach_maximum_(list(seen), values)
        return
    for each, value in zip(seen, values, strict=True):
        torch.maximum(each, value, out=each)


@cache
def kernels_on(device: torch.device) -> Any:
    """The module of kernels for states and amaxes on a device, or None."""
    allowed = config.read().backends
    triton = backends().get("triton")
    if triton is None or (allowed and "triton" not in allowed):
        return None
    if triton.why_not_on(device) is not None:
        return None
    from ..kernels.triton import delayed as kernels

    return kernels
