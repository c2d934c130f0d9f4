"""Numbers for recipes: equal recipes have one, which keys of plans hold.

A recipe is remembered by its fields, so that one made anew in each step is the same each time. One
with a function in a field is forgotten when that function is gone: a lambda in a loop is another
recipe each time, and would stay for ever.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NamedTuple

from ..base import config
from ..guards.torch_private import constant_under_compile


class _Entry(NamedTuple):
    """What is known of a number: the recipe's class, its fields and how to find a recipe."""

    key: int
    kind: type
    fields: tuple[Callable[[], Any], ...]
    """Return the values; None once a function is gone."""
    recipe: Callable[[], Any]
    weak: tuple[Callable[[], Any], ...]
    """Those of the fields that are held weakly."""

    def fits(self, recipe: Any) -> bool:
        """Whether a recipe has that number."""
        values = _values(recipe)
        return type(recipe) is self.kind and all(
            bool(get() == value) for get, value in zip(self.fields, values, strict=True)
        )

    @property
    def gone(self) -> bool:
        """Whether no recipe can have the number any more."""
        return any(get() is None for get in self.weak)


_entries: dict[int, _Entry] = {}
_numbers = itertools.count()
_traced: list[Any] = []
"""Recipes that are made inside compiled functions, which hold their numbers."""


@constant_under_compile
def names_of(kind: type) -> tuple[str, ...]:
    """The names of a recipe's fields."""
    return tuple(field.name for field in fields(kind))


def _values(recipe: Any) -> tuple[Any, ...]:
    return tuple(getattr(recipe, name) for name in names_of(type(recipe)))


def _getter(value: Any) -> Callable[[], Any]:
    """Returns the value; a function is held weakly where that can be."""
    if not callable(value):
        return lambda: value
    try:
        return weakref.WeakMethod(value) if hasattr(value, "__self__") else weakref.ref(value)
    except TypeError:
        return lambda: value


def key_of(recipe: Any) -> int:
    """The recipe's number: that of an equal one, or a new one."""
    with config.lock:
        for entry in list(_entries.values()):
            if entry.gone:
                del _entries[entry.key]
            elif entry.fits(recipe):
                first = entry.recipe()
                if first is None:
                    _entries[entry.key] = entry._replace(recipe=weakref.ref(recipe))
                else:  # the one that is found by the number lives as long as an equal one
                    object.__setattr__(recipe, "_first", first)
                return entry.key
        held = tuple(map(_getter, _values(recipe)))
        weak = tuple(get for get in held if isinstance(get, weakref.ref))
        reference = weakref.ref(recipe) if weak else lambda: recipe
        key = next(_numbers)
        _entries[key] = _Entry(key, type(recipe), held, reference, weak)
        return key


@constant_under_compile
def key_under_compile(kind: type, names: tuple[str, ...], values: tuple[Any, ...]) -> int:
    """The number of a recipe that a compiled function makes, found while Dynamo traces."""
    recipe = kind(**dict(zip(names, values, strict=True)))
    _traced.append(recipe)
    key: int = recipe.key
    return key


def known(key: int) -> bool:
    """Whether a recipe can still have that number."""
    entry = _entries.get(key)
    return entry is not None and not entry.gone


def drop_forgotten(by_key: dict[int, Any]) -> None:
    """Remove what is kept for numbers that no recipe can have any more."""
    for key in [key for key in by_key if not known(key)]:
        del by_key[key]


def recipe_of(key: int) -> Any:
    """A recipe with that number."""
    return _entries[key].recipe()
