"""The argument names of functions, which say what they need; results that a class caches."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")

STORED = "_stored"
"""`weight_stored` in `bwd` or `wgrad` is the parameter itself, where autocast has `weight` cast."""


def per_class(function: Callable[[type], T]) -> Callable[[type], T]:
    """Caches the result of a function of a class on that class; it dies with the class."""
    key = f"_opsgraph_{function.__name__}"

    @wraps(function)
    def cached(kind: type) -> T:
        try:
            return kind.__dict__[key]  # type: ignore[no-any-return]
        except KeyError:
            setattr(kind, key, result := function(kind))
            return result

    return cached


def constant_under_compile(function: F) -> F:
    """`torch.compiler.assume_constant_result`, without the seconds that importing Dynamo takes."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


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
