"""Which lines make a stretch: as many as the peak memory of the pass in Python allows.

A stretch allocates all its results at its beginning, has one room for its temporaries, and lets go
at its end of what its lines let go of. So the more lines it has, the more memory there may be.
"""

from collections.abc import Iterable, Mapping
from itertools import accumulate

from . import recording as recordings
from .arena import arena
from .events import used
from .recording import Recording, Step

NEAR = 1.01
"""The peak of a stretch over that of Python, up to which it counts as no more: for small results,
which are there from its beginning."""


def groups(recording: Recording) -> list[list[Step]]:
    """Lines in Python alone, others together.

    Once a stretch has let go of large memory that was there before it, which is what later lines
    may be given in Python, further lines join it only where its peak stays `NEAR` that of Python.
    """
    found: list[list[Step]] = []
    models: list[_Memory] = []
    joins, looks = False, False
    """Whether the next line joins the stretch, and whether its peak is to be looked at first."""
    for step in recording.steps:
        if step.reason is not None:
            found.append([step])
            joins = False
            continue
        if joins and looks:
            models = models or [_Memory(recording, over) for over in (recording.recorder.taken, {})]
            joins = all(memory.affords([*found[-1], step]) for memory in models)
        if joins:
            found[-1].append(step)
        else:
            found.append([step])
            joins, looks = True, False
        looks = looks or _lets_go(recording, step, found[-1])
    return found


def _lets_go(recording: Recording, step: Step, stretch: list[Step]) -> bool:
    """Whether a line lets go of large memory from before its stretch."""
    new = {k for before in stretch for k in before.makes.values()}
    old = _shown(recording, step.gone - new)
    return any(recording.recorder.buffers[b].size >= recordings.LARGE for b in old)


def _shown(recording: Recording, slots: Iterable[int]) -> set[int]:
    return {b for slot in slots for b in recording.shown(slot)}


class _Memory:
    """Bytes that a pass has at a time, by the times from which and up to which buffers are there:
    a time for each event, and one for the end of each line.

    In Python a buffer is there from its first use to its last one, or to the end of the line that
    lets go of it; so it is at least as long.
    """

    def __init__(self, recording: Recording, taken: Mapping[int, int]) -> None:
        """taken: the arguments whose memory results take, by these results' buffers; none do
        where someone else has them."""
        self.buffers, self.taken = recording.recorder.buffers, taken
        self.values = recording.values
        self.begins: dict[int, int] = {}
        self.ends: dict[int, int] = {}
        self.first: dict[int, int] = {}
        self.last: dict[int, int] = {}
        """When each line begins and ends, by its number."""
        self.peaks: dict[int, int] = {}
        """As `_peak`, of the times at which stretches begin."""
        self.count = 0
        """Of times."""
        for number, buffer in enumerate(self.buffers):
            if buffer.argument is not None and buffer.argument < recording.count:
                self.begins[number] = -1
        for step in recording.steps:
            self.first[step.number] = self.count
            for event in step.events:
                for b in used(event):
                    self.begins.setdefault(b, self.count)
                    self.ends[b] = self.count
                self.count += 1
            self.last[step.number] = self.count
            for b in _shown(recording, step.makes.values()):
                self.begins.setdefault(b, self.count)
            for b in _shown(recording, step.gone):
                self.ends[b] = self.count
            self.count += 1
        for b in _shown(recording, recording.slots.values()):
            self.ends[b] = self.count
        for b, operand in reversed(recording.same.items()):
            if self.begins.pop(b, None) is not None and b in self.ends:
                self.ends[operand] = max(self.ends[b], self.ends.get(operand, 0))
        for b, argument in taken.items():  # it is the argument's memory from then on
            for over in recording.shown(argument):
                self.ends[over] = self.begins.get(b, self.count) - 1

    def _peak(self, time: int) -> int:
        """Of the pass in Python, without the arguments that are let go of before a time.

        Someone else may have these. Then they add as much to a stretch that begins at that time,
        and nothing to the peak in Python where that comes before; so they count in neither.
        """
        there = [0] * (self.count + 3)
        for b, begin in self.begins.items():
            end = self.ends.get(b, begin)
            if begin >= 0 or end >= time:
                there[begin + 1] += self.buffers[b].size
                there[end + 2] -= self.buffers[b].size
        return max(accumulate(there))

    def affords(self, steps: list[Step]) -> bool:
        """Whether the peak of a stretch of lines, with what is there before it, is near that
        of Python, whichever arguments someone else has."""
        if any(isinstance(self.values[k], type) for step in steps for k in step.gone):
            return False  # nobody knows what memory that has
        begin, end = self.first[steps[0].number], self.last[steps[-1].number]
        if begin not in self.peaks:
            self.peaks[begin] = self._peak(begin)
        events = [event for step in steps for event in step.events]
        size, temporary = 0, set[int]()
        for b, first in self.begins.items():
            last = self.ends.get(b, first)
            if first >= begin and first <= end >= last:
                temporary.add(b)
            elif last >= begin and (first < begin or (first <= end and b not in self.taken)):
                size += self.buffers[b].size
        room = arena(events, temporary.__contains__, self.buffers)[1]
        return size + room <= NEAR * self.peaks[begin]
