"""Sizes that were left out of ops in a row: told by the neighbours on both sides."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..base.errors import OpError, OpsgraphError
from ..op import Op, row
from .parameters import known


def infer_sizes(
    modules: Sequence[nn.Module], first: int | None = None, last: int | None = None
) -> None:
    """Complete ops between a value of width `first` and one of width `last` (None: not known)."""
    width = first
    for k, module in enumerate(modules):
        if not isinstance(module, Op):
            width = None
            continue
        module.complete(width, width_between(modules[k + 1 :], last))
        width = known(module.in_width, width)
        for entry in module.lower():
            width = None if width is None else _out_width(entry.kind, entry.op, width)


def complete_sizes(modules: Mapping[str, nn.Module | None], width: int) -> None:
    """Make parameters whose sizes were left out. Raises OpError where neither side tells a size."""
    named = {f"{name}:{type(m).__name__}": m for name, m in modules.items() if m is not None}
    with torch.inference_mode(False):  # for they may be trained later
        infer_sizes([*named.values()], width)
    for label, module in named.items():
        if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
            raise OpError(label, "no size for it", "one given, or told by a neighbour")


def width_between(modules: Sequence[nn.Module], last: int | None = None) -> int | None:
    """The width that modules demand of the value before them; `last`: the width after them."""
    between: list[Op] = []
    width = last
    for module in modules:
        if not isinstance(module, Op):
            return None
        if module.in_width is not None:
            width = module.in_width
            break
        between.append(module)
    for op in reversed(between):
        width = None if width is None else op.width_before(width)
    return width


def _out_width(kind: type[Op], op: Op, width: int) -> int | None:
    try:
        return kind.out(op, row(width, torch.float32, torch.device("cpu"))).width
    except (OpsgraphError, RuntimeError, TypeError):
        return None
