"""The argument names of functions, which say what they need."""

import inspect
from collections.abc import Callable, Collection
from typing import Any
from weakref import WeakKeyDictionary

STORED = "_stored"
"""`weight_stored` in `bwd` or `wgrad` is the parameter itself, where autocast has `weight` cast."""


_arguments: WeakKeyDictionary[Any, tuple[str, ...]] = WeakKeyDictionary()


def arguments(function: Callable[..., Any]) -> tuple[str, ...]:
    """Argument names of a method, bound or not, without `self`."""
    plain = getattr(function, "__func__", function)  # a bound method would keep its object
    names = _arguments.get(plain)
    if names is None:
        declared = getattr(function, "declared_arguments", None)
        names = tuple(inspect.signature(plain).parameters)[1:] if declared is None else declared
        names = _arguments[plain] = tuple(names)
    return names


def is_names(value: Any) -> bool:
    """Whether a value is a collection of names."""
    collection = isinstance(value, Collection) and not isinstance(value, str)
    return collection and all(isinstance(name, str) for name in value)
