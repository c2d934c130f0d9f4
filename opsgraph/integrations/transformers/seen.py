"""Whether what a value is computed of is still as the model's code found it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .states import State


def version(x: Tensor) -> int:
    """How often a tensor was changed in place, as far as it tells."""
    return 0 if x.is_inference() else x._version


Seen = tuple[Tensor, int, dict[str, Any] | None, str]
"""A tensor that a value is computed of, its version then, and where it is to be found, if it is a
parameter."""


def unchanged(seen: Sequence[Seen]) -> bool:
    """Whether what was seen is as it was, and in its place."""
    for x, then, place, name in seen:
        if version(x) != then or (place is not None and place.get(name) is not x):
            return False
    return True


def seen_by(
    state: State, root: Tensor, parents: tuple[Any, ...], extras: tuple[Tensor, ...]
) -> tuple[Seen, ...]:
    """What the step of a value reads besides other values, as it was when the code reached it."""
    kind, what = state.step
    of_root = any(parent is None for parent in parents)  # `in` would compare values
    read = ((root, version(root), None, ""),) if of_root else ()
    if kind == "extra":
        return (*read, (extras[-1], version(extras[-1]), None, ""))
    if kind in ("module", "vector"):
        held = what.module._parameters
        names = what.leaf.names.values() if kind == "module" else (what.attribute,)
        found = ((held.get(name), name) for name in names)
        return (*read, *((p, version(p), held, name) for p, name in found if p is not None))
    return read


def all_seen(deferred: Any) -> list[Seen]:
    """What a value is computed of; each value before it counts once."""
    found, waiting = {id(deferred): deferred}, [deferred]
    while waiting:
        for parent in waiting.pop().parents:
            if parent is not None and id(parent) not in found:
                found[id(parent)] = parent
                waiting.append(parent)
    return [seen for each in found.values() for seen in each.seen]
