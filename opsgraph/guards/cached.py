"""`cached_property` without a lock: a child would wait for one that was held at its fork."""

import sys

if sys.version_info >= (3, 12):
    from functools import cached_property
else:
    from collections.abc import Callable
    from typing import Any, Generic, TypeVar

    T = TypeVar("T")

    class cached_property(Generic[T]):
        """As Python's since 3.12: threads that come at once may each compute the value."""

        def __init__(self, function: Callable[[Any], T]) -> None:
            self.function, self.__doc__ = function, function.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self.name = name

        def __get__(self, instance: Any, owner: type | None = None) -> T:
            if instance is None:
                return self  # type: ignore[return-value]
            value = instance.__dict__[self.name] = self.function(instance)
            return value


__all__ = ["cached_property"]
