"""Puts a record together: which buffers are results, what shows each value, what lives how long."""

from collections.abc import Collection, Iterable
from math import prod
from typing import Any

import torch

from ..kernels.cpu import memory
from .events import used
from .grouping import groups
from .parts import NOTHING, Build, InPython, Layout, Result, Stretch, View
from .record import Record
from .recording import Composite, Geometry, Recording, Step, flat


def assembled(recording: Recording) -> Record | None:
    """The record, or None where some value has to be made by a line in Python."""
    needed = recording.needed()
    return None if needed is None else Assembly(recording, groups(recording), needed).record()


class Assembly:
    """Puts a record together. needed: the slots that replays have to fill."""

    def __init__(
        self, recording: Recording, groups: list[list[Step]], needed: Collection[int]
    ) -> None:  # fmt: skip
        self.recording, self.groups = recording, groups
        self.values, self.buffers = recording.values, recording.recorder.buffers
        self.base: dict[int, int] = {}
        """The slot of each buffer that is there between stretches."""
        self.same: dict[int, int] = {}
        """What slots hold that are another slot's value."""
        self.last: dict[int, int] = {}
        """The part after which nothing reads a slot."""
        self.uses = [
            {b for step in group for event in step.events for b in used(event)} for group in groups
        ]
        """The buffers that each group uses."""
        self.first: dict[int, int] = {}
        """The first group that uses a buffer."""
        kept = set[int]()
        for number, uses in enumerate(self.uses):
            kept |= uses & self.first.keys()
            self.first = dict.fromkeys(uses, number) | self.first
        self.views: dict[int, list[View]] = {}
        self.results: dict[int, list[Result]] = {}
        for number, buffer in enumerate(self.buffers):
            if buffer.argument is not None:
                self.base[number] = buffer.argument
        self.makers = {
            k: n for n, group in enumerate(groups) for s in group for k in s.makes.values()
        }
        """The group that makes each slot."""
        self.builds: dict[int, list[Build]] = {}
        leaves = set[int]()
        for slot in needed:
            if isinstance(value := self.values[slot], Composite):
                build = self._build(slot, value, self.makers[slot])
                self.builds.setdefault(self.makers[slot], []).append(build)
                leaves.update(build.slots)
        self.free = len(self.values)
        """The next slot that nothing has."""
        self._place({*needed, *leaves}, kept)
        self.layouts: dict[int, Layout] = {
            result.slot: result.layout for some in self.results.values() for result in some
        }
        for slot, value in enumerate(self.values[: recording.count]):
            if isinstance(value, Geometry):
                self.layouts[slot] = value[1:]
        for number, builds in self.builds.items():
            for build in builds:
                for k in build.slots:
                    self._read(self._home(k), number)

    def _build(self, slot: int, value: Composite, maker: int) -> Build:
        """How a value is made. Its tensors get slots of their own."""
        parts: list[Any] = []
        for part in value.parts:
            if isinstance(part, Composite):
                parts.append(self._build(slot, part, maker))
            elif isinstance(part, Geometry):
                self.makers[len(self.values)] = maker
                parts.append(len(self.values))
                self.values.append(part)
            else:
                parts.append(part)
        return Build(slot, value.kind, tuple(parts))

    def _place(self, needed: Collection[int], kept: Collection[int]) -> None:
        """Find out which buffers are results, and what shows each needed value."""
        for slot in sorted(needed):
            value = self.values[slot]
            if not isinstance(value, Geometry) or slot < self.recording.count:
                continue
            place, dtype, sizes, strides = value
            buffer, maker = self.buffers[place.buffer], self.makers[slot]
            if buffer.argument == slot:  # made by a line in Python
                continue
            home = self.base.get(place.buffer)
            small = buffer.device.type != "cpu" or buffer.size < memory.LEAST
            if home is None and _whole(value, buffer.size, small):
                self._result(place.buffer, slot, sizes, dtype, maker, strides)
                continue
            if home is None:
                home = self._hidden(place.buffer, maker)
            if home < len(self.values) and value == self.values[home]:
                self.same[slot] = home
                continue
            view = View(slot, home, dtype, sizes, strides, place.offset)
            self.views.setdefault(maker, []).append(view)
            self._read(home, maker)
        for number in kept:
            if number not in self.base:
                self._hidden(number)

    def _hidden(self, number: int, maker: int = 0) -> int:
        """A slot for a buffer that no value shows as a whole."""
        slot, self.free = self.free, self.free + 1
        self._result(number, slot, (self.buffers[number].size,), torch.uint8, maker)
        return slot

    def _result(
        self, number: int, slot: int, sizes: tuple[int, ...], dtype: torch.dtype, maker: int,
        strides: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        self.base[number] = slot
        over = self.recording.recorder.taken.get(number)
        if over is not None and not self._fits_over(over, number, slot, sizes, dtype, strides):
            over = None
        result = Result(slot, sizes, dtype, self.buffers[number].device, over, strides)
        self.results.setdefault(self.first.get(number, maker), []).append(result)

    def _fits_over(
        self, argument: int, number: int, slot: int, sizes: tuple[int, ...], dtype: torch.dtype,
        strides: tuple[int, ...] | None,
    ) -> bool:  # fmt: skip
        """Whether a result, a buffer that a slot shows, may take an argument's memory: it is laid
        out alike, and nothing reads the argument afterwards."""
        value = self.values[argument]
        if not isinstance(value, Geometry):
            return False
        size = self.buffers[value.place.buffer].size
        same = value.sizes, value.dtype, value.strides
        if slot < len(self.values) and same != (sizes, dtype, strides):
            return False
        whole = _whole(value, size) and prod(sizes) * dtype.itemsize == size
        return whole and not self._read_later(value.place.buffer, number)

    def _read_later(self, buffer: int, made: int) -> bool:
        """Whether a buffer, or a view of it, is read after the first use of another one."""
        begun = False
        for step in (step for group in self.groups for step in group):
            if begun and any(buffer in self.recording.shown(slot) for slot in step.reads.values()):
                return True
            for event in step.events:
                if begun and buffer in used(event):
                    return True
                begun = begun or made in used(event)
        returned = flat(self.recording.returned)
        return any(buffer in self.recording.shown(slot) for _, slot in returned)

    def _read(self, slot: int, part: int) -> None:
        self.last[slot] = max(part, self.last.get(slot, 0))

    def record(self) -> Record:
        """The record."""
        parts = [self._part(n, group) for n, group in enumerate(self.groups)]
        stretches = [part for part in parts if isinstance(part, Stretch)]
        read = {slot for part in stretches for slot in part.reads}
        for part in parts:
            if isinstance(part, InPython):
                part.layouts = {
                    made: (value.dtype, value.sizes, value.strides)
                    for made, slot in part.makes.items()
                    if slot in read and isinstance(value := self.values[slot], Geometry)
                }
        ends: dict[int, int] = {}
        returned = self._returned(self.recording.returned, ends)
        for slot in (*_slots(returned), *ends.values()):
            self.last.pop(slot, None)
        # After a stretch at the end the function itself lets go.
        count = len(parts) - isinstance(parts[-1] if parts else None, Stretch)
        for slot, number in self.last.items():
            if number < count:
                parts[number].dead.append(slot)
        made = self.recording
        has_ops = made.function.parameters[:1] == ("ops",)
        read = {k for part in parts for k in _read_by(part)}.union(*made.recorder.shared)
        layouts = {
            k: (value.dtype, value.sizes, value.strides)
            for k in made.present
            if k in read and isinstance(value := self.values[k], Geometry)
        }
        return Record(
            made.count, made.present, made.twins, made.fits, made.saved, has_ops, parts, ends,
            returned, made.device, made.recorder.shared, layouts,
        )  # fmt: skip

    def _part(self, number: int, group: list[Step]) -> Stretch | InPython:
        if group[0].reason is not None:
            (step,) = group
            reads = {name: self._home(k) for name, k in step.reads.items()}
            for slot in reads.values():
                self._read(slot, number)
            return InPython(step.line, reads, step.makes, group[0].reason)
        events = [(n, event) for n, step in enumerate(group) for event in step.events]
        results = self.results.get(number, [])
        made = {result.slot for result in results}
        inputs = sorted({self.base[b] for b in self.uses[number] if b in self.base} - made)
        for slot in inputs:
            self._read(slot, number)
        lines = [step.line for step in group]
        names = [f"{(*line.note.split(), line.function)[0]}:{line.function}" for line in lines]
        views = self.views.get(number, [])
        builds = [self._at_home(build) for build in self.builds.get(number, [])]
        return Stretch(
            self.recording.device, events, names, inputs, results, views, self.base,
            self.buffers, builds, self.layouts,
        )  # fmt: skip

    def _at_home(self, build: Build) -> Build:
        """A build of the slots that hold its values."""
        parts = [
            self._at_home(part)
            if isinstance(part, Build)
            else self._home(part)
            if type(part) is int
            else part
            for part in build.parts
        ]
        return build._replace(parts=tuple(parts))

    def _home(self, slot: int) -> int:
        """The slot that holds the value of one; `NOTHING` for None that a stretch would make."""
        maker = self.makers.get(slot)
        if self.values[slot] is None and maker is not None and not self.groups[maker][0].reason:
            return NOTHING
        return self.same.get(slot, slot)

    def _returned(self, nested: Any, ends: dict[int, int]) -> Any:
        if nested is None:
            return NOTHING
        if not isinstance(nested[0] if nested else None, str):
            return tuple(self._returned(item, ends) for item in nested)
        category, slot = nested
        slot = self._home(slot)
        if category != "view":
            return slot
        end, self.free = self.free, self.free + 1
        ends[end] = slot
        return end


def _read_by(part: Stretch | InPython) -> Iterable[int]:
    return part.bases if isinstance(part, Stretch) else part.reads.values()


def _whole(value: Geometry, size: int, in_any_order: bool = False) -> bool:
    """Whether a value is all of its buffer, by rows or in any order of its dimensions."""
    count, stride = value.dtype.itemsize, 1
    steps = [*zip(reversed(value.strides), reversed(value.sizes), strict=True)]
    if in_any_order:
        steps.sort()
    for step, n in steps:
        if n != 1 and step != stride:
            return False
        count, stride = count * n, stride * n
    return value.place.offset == 0 and count == size


def _slots(nested: Any) -> Iterable[int]:
    if isinstance(nested, int):
        yield nested
    for item in nested if isinstance(nested, tuple) else ():
        yield from _slots(item)
