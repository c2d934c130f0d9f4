"""Delayed scales as calls read them: recorded for a checkpoint, and replayed in its recomputation.

Two opaque ops stand between compilers and the buffers, so that a checkpoint around compiled
functions records and replays as well.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch
from torch import Tensor

from ..base.errors import OpsgraphError
from ..guards.torch_private import graph_task


def recomputing() -> bool:
    """Whether a forward runs inside a backward, as torch.utils.checkpoint has it."""
    return graph_task() != -1


Place = tuple[Hashable, int]
"""A layer's scaling state, and the column of one of its scales."""


class Tape:
    """Scales that a checkpointed forward used, for its recomputation.

    A scale is found by its place and by how many contexts of delayed scaling have opened or ended
    since the forward began, which is when it may change. How often a call reads it does not count:
    one that makes a plan looks more often than the next. Compiled functions, whose calls all read
    alike, know no place; they go by order.
    """

    def __init__(self) -> None:
        self.placed: dict[tuple[Place, int], Tensor] = {}
        self.ordered: list[Tensor] = []
        self.start = tapes.turns

    def record(self, scale: Tensor, place: Place | None) -> None:
        """Take down a scale that the forward reads."""
        if place is None:
            self.ordered.append(scale)
        else:
            self.placed.setdefault((place, tapes.turns - self.start), scale)


class Replay:
    """A recomputation's reading of a tape."""

    def __init__(self, tape: Tape) -> None:
        self.tape, self.ordered, self.start = tape, iter(tape.ordered), tapes.turns

    def read(self, place: Place | None) -> Tensor:
        """The scale that the forward used. Raises OpsgraphError where that took none there."""
        if place is None:
            taped = next(self.ordered, None)
        else:
            taped = self.tape.placed.get((place, tapes.turns - self.start))
        if taped is None:
            raise OpsgraphError(
                "checkpoint_contexts: got a recomputation that takes a scale which its forward did "
                "not take, expected the same calls in both"
            )
        return taped


class _Tapes(threading.local):
    """The tapes that are running: all that record, and the innermost that replays."""

    recording: tuple[Tape, ...] = ()
    replaying: Replay | None = None
    turns: int = 0
    """How many contexts of delayed scaling have opened or ended."""


tapes = _Tapes()

_library = torch.library.Library("opsgraph", "FRAGMENT")
_library.define("snapshot(Tensor scale, int column) -> Tensor")
_library.define("seen(Tensor seen, Tensor amax, int column) -> Tensor")


def snapshot(scales: Tensor, column: int, place: Place | None = None) -> Tensor:
    """A copy of a scale, fp32 `[]`, for a plan to keep: an update may come before its backward.

    In a recomputation it is the one that the forward used.
    """
    fresh = tapes.replaying is None
    return taken(scales.select(0, column).clone() if fresh else scales, place)


def taken(scale: Tensor, place: Place | None) -> Tensor:
    """`snapshot` of a scale to which nothing writes: itself, or the one that the forward used."""
    if tapes.replaying is not None:
        scale = tapes.replaying.read(place)
    for tape in tapes.recording:
        tape.record(scale, place)
    return scale


def _opaque_snapshot(scales: Tensor, column: int) -> Tensor:
    """A copy: compilers may write where an op's result was once they have read it."""
    return snapshot(scales, column).clone()


def _opaque_seen(seen: Tensor, amax: Tensor, column: int) -> Tensor:
    """`seen`, with an amax in one column unless the forward recorded it already."""
    result = seen.clone()
    if tapes.replaying is None:
        result[column] = torch.maximum(result[column], amax)
    return result


_library.impl("snapshot", _opaque_snapshot, "CompositeExplicitAutograd")
_library.impl("seen", _opaque_seen, "CompositeExplicitAutograd")


def register_fakes() -> None:
    """What a compiler is told of the two ops, before it first traces one."""
    torch.library.register_fake("opsgraph::snapshot", lambda s, _: s.new_empty(()), lib=_library)
    torch.library.register_fake("opsgraph::seen", lambda s, *_: torch.empty_like(s), lib=_library)


def compiled_snapshot(scales: Tensor, column: int) -> Tensor:
    """`snapshot` inside a compiled function."""
    scale: Tensor = torch.ops.opsgraph.snapshot(scales, column)
    return scale


def compiled_record(seen: Tensor, amax: Tensor, column: int) -> None:
    """Note an amax in `seen` inside a compiled function."""
    seen.copy_(torch.ops.opsgraph.seen(seen, amax, column))
