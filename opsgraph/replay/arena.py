"""The arena of a stretch: one piece of memory for all that the stretch alone reads."""

from collections.abc import Callable, Sequence

from .events import Buffer, Event, used

ALIGNMENT = 256
"""Bytes that temporaries in an arena begin at multiples of."""


def arena(
    events: Sequence[Event], temporary: Callable[[int], bool], buffers: Sequence[Buffer]
) -> tuple[dict[int, int], int]:
    """Where each temporary buffer of a stretch lies in its arena, and the arena's size in bytes.

    The largest first, each at the lowest place that is free while it is in use.
    """
    uses: dict[int, list[int]] = {}
    for number, event in enumerate(events):
        for buffer in used(event):
            if temporary(buffer):
                uses.setdefault(buffer, []).append(number)
    there: list[list[tuple[int, int]]] = [[] for _ in events]
    """What is taken at each event."""
    offsets, size = dict[int, int](), 0
    for buffer in sorted(uses, key=lambda b: -buffers[b].size):
        first, last = uses[buffer][0], uses[buffer][-1]
        need, at = -(-buffers[buffer].size // ALIGNMENT) * ALIGNMENT, 0
        during = there[first : last + 1]
        for start, end in sorted(set().union(*during)):
            if start < at + need and at < end:
                at = end
        for taken in during:
            taken.append((at, at + need))
        offsets[buffer], size = at, max(size, at + need)
    return offsets, size
