"""What is computed once: of an object, without a lock, and of a class."""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, Generic, TypeVar

T = TypeVar("T")

if sys.version_info >= (3, 12):
    from functools import cached_property
else:

    class cached_property(Generic[T]):
        """As Python's since 3.12: threads that come at once may each compute the value.

        Under a lock a child would wait for one that was held at its fork.
        """

        def __init__(self, function: Callable[[Any], T]) -> None:
            self.function, self.__doc__ = function, function.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self.name = name

        def __get__(self, instance: Any, owner: type | None = None) -> T:
            if instance is None:
                return self  # type: ignore[return-value]
            value = instance.__dict__[self.name] = self.function(instance)
            return value


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


__all__ = ["cached_property", "per_class"]
