"""The parameters of a stage: whether they are there, and of the shapes that their ops demand."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..base.errors import OpError, PlanError
from ..op import Op
from ..plan.basic_ops import BasicOps


def shape_of(weight: Tensor | None) -> Any:
    """A parameter's shape; None where it, or its size, is not there."""
    if weight is None or isinstance(weight, UninitializedParameter):
        return None
    return tuple(weight.shape)


def check_shapes(
    run: BasicOps,
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


def joined_by(op: Op) -> Collection[str]:
    """Parameters that are no arguments of `fwd`, for the op joins them to one that is."""
    names: Any = getattr(op, "joined", tuple)
    joined: Collection[str] = names()
    return joined


def absent(run: BasicOps) -> list[tuple[nn.Module, str]]:
    """Where parameters may appear that no op of the run reads, for they were not there."""
    read = {(run.ops[i], name) for i, name in run.slots}
    places = (
        (op, name)
        for op in run.ops
        for name in (*op._parameters, *op._homes)
        if name not in joined_by(op)
    )
    gone = (op.home(n) for op, n in places if (op, n) not in read and not op.has(n))
    return list(dict.fromkeys(gone))


def verify_weights(run: BasicOps) -> None:
    """Raises PlanError unless `fwd` names just what the op has: all parameters, no other."""
    for i, name in run.slots:
        if not hasattr(*run.ops[i].home(name)):
            raise PlanError(
                f"{run.labels[i]}: got no {name!r}, which its fwd names, expected a parameter "
                "or buffer of that name, or a constant or extra input"
            )
    for i, op in enumerate(run.ops):
        named = {name for j, name in run.slots if run.ops[j] is op}
        held = {name for name in (*op._parameters, *op._homes) if op.has(name)}
        # What a hook reads before the op runs is no argument of fwd.
        if (missing := held - named - set(joined_by(op))) and not op._forward_pre_hooks:
            raise PlanError(
                f"{run.labels[i]}: parameters {sorted(missing)} are not arguments of fwd"
            )
