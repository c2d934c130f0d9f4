"""How a Sequential plans: its options, declared once, checked when they are given."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ..base import config
from ..base.backend import backends as known_backends
from ..features.measured import PLANNERS
from ..fuser import registered
from ..guards.validation import flag, known, listed
from ..ops.delayed import Queue

WHO = "Sequential"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Raises an OpsgraphError for what is unknown, with the nearest that is known.

    Made by `of`.
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
        known(WHO, "planner", [self.planner], PLANNERS, "one of")
        checked: dict[str, Any] = {
            "backends": listed(WHO, "backends", self.backends),
            "fusers": listed(WHO, "fusers", self.fusers),
        }
        given = ("()",) if checked["backends"] == () else checked["backends"]
        known(WHO, "backend", given, known_backends())
        for name in ("double_backward", "recompute", "checkpoint", "delay_wgrad_compute"):
            checked[name] = flag(WHO, name, getattr(self, name))
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, given: dict[str, Any], queue: Queue | None = None) -> Options:
        """Options by name. queue: whose the delayed gradients are, where not the module's own."""
        known(WHO, "an option", given, (*NAMES, "device", "dtype"))
        if not isinstance(queue, Queue | None):
            known(WHO, "an option", ["queue"], NAMES)
        return cls(**given, queue=Queue() if queue is None else queue)

    def verify_fusers(self) -> None:
        """Raises PlanError for a fuser that is not there: one may be registered before planning."""
        if self.fusers is not None:
            known(WHO, "fuser", self.fusers, {fuser.name: None for fuser in registered()})

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
