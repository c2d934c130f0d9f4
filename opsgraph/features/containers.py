"""Lists and their like that ops hold: they change without a word, so calls compare what is in them.

The hook is `Sequential._prepare`, which looks closer at every call while there are any.
"""

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..guards.watched import Owner, Watched, contents, mutable
from ..op import Op

Container = tuple[Op, str, Any]
"""An op, the name of its attribute, and what was in it."""


def watch(owner: Owner, modules: Iterable[nn.Module | None]) -> list[Container]:
    """Have ops, and what they read parameters from, tell the owner of changes.

    Returns the containers in them, which tell nothing.
    """
    inner = [m for op in modules if isinstance(op, Op) for m in op.modules()]
    homes = [m for op in inner if isinstance(op, Op) for m, _ in op._homes.values()]
    for module in {*inner, *homes}:
        if isinstance(module, Watched):
            module.watch(owner)
    named = ((m, *item) for m in inner if isinstance(m, Op) for item in m.settings().items())
    return [(op, name, contents(value)) for op, name, value in named if mutable(value)]


def changed(containers: Iterable[Container]) -> bool:
    """Whether one holds something else now."""
    return any(contents(getattr(op, name, None)) != was for op, name, was in containers)
