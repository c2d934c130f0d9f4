"""What tells updates of delayed scaling that states are not what they were, see `updates`."""

from __future__ import annotations

from typing import Any


class _States:
    changes = 0
    """How often anything changed but the memory of their buffers: that there are others, whom they
    serve, that something came late, whose scales they read."""


states = _States()
ready: dict[tuple[int, str], Any] = {}
"""By a recipe's number and a buffer of amaxes: how an update is done again."""


def gone(state: Any) -> None:
    """Have updates let go of what they have of a state that is no more."""
    states.changes += 1
    ready.clear()
