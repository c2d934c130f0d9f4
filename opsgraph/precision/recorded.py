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
from .tapes import compiled_record


def record(states: Sequence[Scaling], role: str, amaxes: Sequence[Any], grad: bool) -> None:
    """Note amaxes of activations or weights that were quantized, of a state each.

    amaxes: fp32 `[]`, None for a weight that was held quantized. grad: whether the call was made
    with grad enabled; without, nothing is noted.
    """
    pairs = zip(states, amaxes, strict=True)
    noted = [(s, amax) for s, amax in pairs if amax is not None and s.notes(role, grad)]
    column = ROLES.index(role)
    if torch.compiler.is_compiling():
        with torch.no_grad():
            for state, amax in noted:
                compiled_record(state.amax_forward, amax, column)
    elif noted:
        raise_to([s.seen(FORWARD, column) for s, _ in noted], [amax for _, amax in noted])


def raise_to(seen: Sequence[Tensor], amaxes: Sequence[Tensor]) -> None:
    """Write the larger of both, or a NaN, to each of `seen`, fp32 `[]`."""
    values = [amax.detach() if amax.requires_grad else amax for amax in amaxes]
    one_by_one = followed_ops(seen[0]) or len({each.data_ptr() for each in seen}) < len(seen)
    if not one_by_one:
        kernels = kernels_on(seen[0].device)
        if kernels is None or any(value.device != seen[0].device for value in values):
            torch._foreach_maximum_(list(seen), values)
        else:
            kernels.raise_to(seen, values)
        return
    for each, value in zip(seen, values, strict=True):  # a layer may stand twice in a stage
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
