"""The registry of all fusers."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import count

from ..base import config
from ..base.errors import RegisterError
from .base import Fuser
from .matching import Matcher

_registered: list[Fuser] = []
_serial = count(1)
checks: list[Callable[[Fuser], None]] = []
"""Raise RegisterError for a wrong declaration; the room that checks declarations adds to them."""


class Handle(AbstractContextManager["Handle"]):
    """A registration: `unregister()` ends it, and so does leaving a `with` block."""

    def __init__(self, fuser: Fuser) -> None:
        self.fuser = fuser

    def unregister(self) -> None:
        """Take the fuser out; modules plan again at their next call. Harmless when repeated."""
        with config.lock:
            if self.fuser in _registered:
                _registered.remove(self.fuser)
                Matcher.of.cache_clear()
                config.touch()

    def __exit__(self, *error: object) -> None:
        self.unregister()


def register(fuser: Fuser | type[Fuser]) -> Handle:
    """Make a fuser known to every planner. Works as a decorator of a Fuser class.

    Returns a handle with `unregister()`, also a context manager. Raises RegisterError when the
    declaration names a backend, an op or a value that does not exist.
    """
    try:
        instance = fuser() if isinstance(fuser, type) else fuser
    except TypeError as error:
        raise RegisterError(
            f"{getattr(fuser, '__name__', fuser)}: cannot be made: {error}"
        ) from error
    if not isinstance(instance, Fuser):
        raise RegisterError(f"got {instance!r}, expected a Fuser or a class of one")
    for check in checks:
        check(instance)
    with config.lock:
        instance.serial = next(_serial)
        _registered.append(instance)
        config.touch()
    return Handle(instance)


def registered() -> list[Fuser]:
    """All registered fusers, in the order of their registration."""
    return list(_registered)
