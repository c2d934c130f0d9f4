"""The key of a call: all that changes what is right for it, and the request that it stands for.

Two calls of equal keys run the same plan, of modules that share a table. So what a plan bakes in is
in the key, in the table's key (`table`), or else a reason to make the stage anew (`Stage.renewed`).
Rows are in none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import index
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..op import ROWS, Op, Spec, row
from ..plan.basic_ops import BasicOps
from ..plan.program import Request
from .options import Options

WeightKey = tuple[torch.dtype, torch.Size, bool, bool]
"""Its dtype, its shape, whether it wants a gradient, whether it is where the input is."""
ExtraKey = tuple[torch.dtype, int, int, bool, bool]
"""Dtype, how many dimensions more than the input's, last size, and the same two flags."""


class Key(NamedTuple):
    """What distinguishes a call."""

    dtype: torch.dtype
    width: int
    kind: str
    """Of the device, with its number."""
    number: int | None
    gradient: bool
    """Whether the input's is wanted."""
    compute: torch.dtype | None
    """The dtype of an active autocast."""
    weights: tuple[WeightKey | None, ...]
    """None for a parameter that is not there."""
    extras: tuple[ExtraKey, ...]
    modes: tuple[bool, ...]
    """Of the ops that training matters to, whether they train."""


PlainKey = tuple[Any, ...]
"""A `Key` as a plain tuple: the same to a dict, and made faster."""


def key_of(
    x: Tensor,
    extras: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    modes: Sequence[Op],
    plain: bool,
) -> PlainKey:
    """The key of a call. plain: whether autograd runs through it, so that no gradient is ours."""
    grad = torch.is_grad_enabled() and not plain
    dtype, cpu = x.dtype, x.is_cpu
    kind, place = ("cpu", None) if cpu else (x.device.type, x.device.index)
    compute = None
    if kind != "meta" and torch.is_autocast_enabled(kind) and dtype != torch.float64:
        compute = torch.get_autocast_dtype(kind)
    parameters = [
        None
        if w is None
        else (
            w.dtype,
            w.shape,
            grad and w.requires_grad,
            w.is_cpu if cpu else w.device == x.device,
        )
        for w in weights
    ]
    others = tuple([_extra_key(x, extra, grad) for extra in extras]) if extras else ()
    trains = tuple([op.training for op in modes]) if modes else ()
    # index(): under torch.compile a width that varied is symbolic, and no part of a key.
    width, wanted = index(x.shape[-1]), grad and x.requires_grad
    return dtype, width, kind, place, wanted, compute, tuple(parameters), others, trains


def _extra_key(x: Tensor, extra: Tensor, grad: bool) -> ExtraKey:
    more, last = extra.dim() - x.dim(), index(extra.shape[-1]) if extra.dim() else 0
    return extra.dtype, more, last, grad and extra.requires_grad, extra.device == x.device


def request_of(
    plain: PlainKey,
    run: BasicOps,
    dims: Sequence[int | None],
    weights: Sequence[Tensor | None],
    options: Options,
) -> Request:
    """What a plan is made for.

    dims: of the extra inputs, see `ExtraInputs`. weights: for the devices of those elsewhere.
    """
    key = Key(*plain)
    device = torch.device(key.kind, key.number)  # type: ignore[arg-type]
    gradients = {"x0"} if key.gradient else set()
    parameters: dict[str, Spec | None] = {}
    for (i, name), part, weight in zip(run.slots, key.weights, weights, strict=True):
        variable = run.name(name, i)
        parameters[variable] = None
        if part is not None and weight is not None:
            dtype, shape, wanted, here = part
            parameters[variable] = Spec(tuple(shape), dtype, device if here else weight.device)
            if wanted:
                gradients.add(variable)
    extras = []
    for (i, name, _), extra, own in zip(run.inputs, key.extras, dims, strict=False):
        dtype, more, last, wanted, here = extra
        sizes = {0: (ROWS, last), -1: (ROWS,)}.get(more, (last,)) if own is not None else (last,)
        extras.append(Spec(sizes, dtype, device if here else torch.device("meta")))
        if wanted:
            gradients.add(run.name(name, i))
    modes = iter(key.modes)
    return Request(
        row(key.width, key.dtype, device),
        tuple(extras),
        parameters,
        frozenset(gradients),
        tuple(kind.training_matters and next(modes) for kind in run.kinds),
        key.compute,
        options.given(),
    )
