"""The shapes of parameters: as they are, and as their ops say that they must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..errors import OpError
from ..op import Op
from ..plan.run import Run


def shape_of(weight: Tensor | None) -> Any:
    """A parameter's shape; None where it, or its size, is not there."""
    if weight is None or isinstance(weight, UninitializedParameter):
        return None
    return tuple(weight.shape)


def check_shapes(
    run: Run,
    ops: Sequence[Op],
    places: Sequence[tuple[nn.Module, str]],
    weights: Sequence[Tensor | None],
) -> None:
    """Raises OpError for a parameter of another shape than its op says, by its owner's name."""
    for (i, name), (_, shown), weight in zip(run.slots, places, weights, strict=True):
        expected = run.kinds[i].shape_of(ops[i], name)
        if weight is None and name in run.kinds[i].required:
            shape = "" if expected is None else f" of shape {_text(expected)}"
            raise OpError(run.labels[i], f"{shown}=None", f"a parameter{shape}")
        if weight is None or expected is None:
            continue
        got = tuple(weight.shape)
        fits = (e in (None, g) for e, g in zip(expected, got, strict=False))
        if len(got) != len(expected) or not all(fits):
            raise OpError(run.labels[i], f"{shown} of shape {got}", _text(expected))


def _text(shape: Sequence[int | None]) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"
