"""How a Sequential plans: its options, declared once, checked when they are given."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from . import config
from .backend import backends as known_backends
from .errors import OpError
from .fuser import registered
from .ops.delayed import Queue
from .planner import PLANNERS
from .validation import choice, flag

WHO = "Sequential"


def _expected(wrong: object, known: Collection[str]) -> str:
    """The nearest of some names, and all of them."""
    near = get_close_matches(str(wrong), known, 1)
    names = ", ".join(known)
    return f"{near[0]!r}, or another of {names}" if near else f"one of {names}"


def _names(option: str, given: Any) -> tuple[str, ...] | None:
    """A collection of names, or None."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Collection):
        one = given if isinstance(given, str) else "name"
        raise OpError(WHO, f"{option}={given!r}", f'a tuple of names: {option}=("{one}",)')
    return tuple(given)


def _verify_known(option: str, names: Collection[str] | None, known: Collection[str]) -> None:
    for name in names or ():
        if name not in known:
            raise OpError(WHO, f"{name!r} among {option}", _expected(name, known))


@dataclass(frozen=True, kw_only=True)
class Options:
    """Raises OpError for an unknown option or value, with the nearest that is known.

    Made by `of`; `with_` replaces one.
    """

    backends: tuple[str, ...] | None = None
    planner: str = "greedy"
    double_backward: bool = False
    recompute: bool = True
    checkpoint: bool = False
    delay_wgrad_compute: bool = False
    fusers: tuple[str, ...] | None = None
    """The only fusers that may be taken, by name; None: all that are registered."""
    config: config.Config = field(default_factory=config.read)
    queue: Queue = field(default_factory=Queue, compare=False, repr=False)
    """Weight gradients that `backward_dw` has yet to compute."""

    def __post_init__(self) -> None:
        choice(WHO, "planner", self.planner, PLANNERS)
        checked = {
            "backends": _names("backends", self.backends),
            "fusers": _names("fusers", self.fusers),
        }
        _verify_known("backends", checked["backends"], known_backends())
        for name in ("double_backward", "recompute", "checkpoint", "delay_wgrad_compute"):
            checked[name] = flag(WHO, name, getattr(self, name))  # type: ignore[assignment]
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, given: dict[str, Any]) -> Options:
        """Options by name."""
        for name in given:
            if name not in NAMES:
                raise OpError(WHO, f"an option {name!r}", _expected(name, (*NAMES, *_PLACES)))
        return cls(**given)

    def verify_fusers(self) -> None:
        """Raises OpError for a fuser that is not there: one may be registered before planning."""
        _verify_known("fusers", self.fusers, {fuser.name: None for fuser in registered()})

    def with_(self, **changed: Any) -> Options:
        """The same, but for some; what is queued stays queued."""
        return replace(self, **changed)

    def given(self) -> dict[str, Any]:
        """All options by name."""
        return {name: getattr(self, name) for name in NAMES}

    @property
    def order(self) -> tuple[str, ...]:
        """Backends in order of preference."""
        if self.double_backward:
            return ("reference",)
        return self.backends or self.config.backends or tuple(known_backends())

    @property
    def key(self) -> tuple[Any, ...]:
        """All of it, hashable."""
        return (self.order, *self.given().values(), self.config)


NAMES = tuple(f.name for f in fields(Options) if f.name not in ("config", "queue"))
_PLACES = ("device", "dtype")
