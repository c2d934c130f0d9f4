"""How a Sequential plans: its options, declared once, checked when they are given."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

from ..base import config
from ..base.backend import backends as known_backends
from ..base.errors import PlanError
from ..features.optimal import PLANNERS
from ..fuser import registered
from ..guards.validation import flag
from ..ops.delayed import Queue

WHO = "Sequential"


def _unknown(what: str, wrong: object, known: Collection[str], expected: str) -> PlanError:
    near = get_close_matches(str(wrong), known, 1)
    nearest = f" (the nearest is {near[0]!r})" if near else ""
    return PlanError(
        f"{WHO}: got {what} {wrong!r}, expected {expected} {', '.join(known)}{nearest}"
    )


def _names(option: str, given: Any) -> tuple[str, ...] | None:
    """A collection of names, or None."""
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Collection):
        one = given if isinstance(given, str) else "name"
        expected = f'a tuple of names: {option}=("{one}",)'
        raise PlanError(f"{WHO}: got {option}={given!r}, expected {expected}")
    return tuple(given)


def _verify_known(what: str, names: Collection[str] | None, known: Collection[str]) -> None:
    for name in names or ():
        if name not in known:
            raise _unknown(what, name, known, "some of")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Raises an OpsgraphError for what is unknown, with the nearest that is known.

    Made by `of`; `with_` replaces some.
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
    stands_in: bool = False
    """Whether the reference ops run for a transform that follows them, not because of an option."""
    queue: Queue = field(default_factory=Queue, compare=False, repr=False)
    """Weight gradients that `backward_dw` has yet to compute."""

    def __post_init__(self) -> None:
        if not isinstance(self.planner, str) or self.planner not in PLANNERS:
            raise _unknown("planner", self.planner, PLANNERS, "one of")
        checked = {
            "backends": _names("backends", self.backends),
            "fusers": _names("fusers", self.fusers),
        }
        _verify_known("backend", checked["backends"], known_backends())
        for name in ("double_backward", "recompute", "checkpoint", "delay_wgrad_compute"):
            checked[name] = flag(WHO, name, getattr(self, name))  # type: ignore[assignment]
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, given: dict[str, Any], queue: Queue | None = None) -> Options:
        """Options by name. queue: whose the delayed gradients are, where not the module's own."""
        for name in given:
            if name not in NAMES:
                raise _unknown("an option", name, (*NAMES, *_PLACES), "some of")
        return cls(**given, queue=Queue() if queue is None else queue)

    def verify_fusers(self) -> None:
        """Raises PlanError for a fuser that is not there: one may be registered before planning."""
        if self.fusers is not None:
            _verify_known("fuser", self.fusers, {fuser.name: None for fuser in registered()})

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


NAMES = tuple(f.name for f in fields(Options) if f.name not in ("config", "stands_in", "queue"))
_PLACES = ("device", "dtype")
