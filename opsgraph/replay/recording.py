"""Makes a record: runs the lines of a pass one by one, watched, and sorts out what flows where.

The layers: `recorder` notes what each line did to memory; here lines become stretches and lines in
Python, and values get slots; `record` is the result, which `passes` replays.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guards.torch_private import same_layouts
from ..plan.lines import Function, Line
from .interpreter import run_line
from .record import NOTHING, InPython, Record, Result, Stretch, View, used
from .recorder import Event, Place, Recorder, span

STRUCTURAL = ("bind", "clear", "pass", "return")
"""Lines that move names and touch no memory."""
LARGE = 2**20
"""Bytes of a value that is let go within a stretch, from which the stretch ends there."""


class Geometry(NamedTuple):
    """A tensor as a view of a buffer."""

    place: Place
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class _Step(NamedTuple):
    """A line that ran, with the slots that it read and made."""

    number: int
    line: Line
    reads: dict[str, int]
    makes: dict[str, int]
    events: Sequence[Event]
    reason: str | None


class Recording:
    """One recording of a pass. `run()` returns what the pass returns; `record()` the record.

    arguments: by the names that lines read. in_python: the numbers of lines that must stay so.
    """

    def __init__(
        self, function: Function, ops: Any, names: Sequence[str], arguments: Sequence[Any],
        saved: int, in_python: Collection[int], device: torch.device,
    ) -> None:  # fmt: skip
        """saved: how many of the arguments, the last ones, come in a list."""
        self.saved = saved
        self.function, self.ops, self.device = function, ops, device
        self.count, self.in_python = len(arguments), set(in_python)
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        self.fits = same_layouts(tensors)
        self.present = [isinstance(argument, Tensor) for argument in arguments]
        self.recorder = Recorder(len(arguments))
        self.values = [self._handed(k, argument) for k, argument in enumerate(arguments)]
        """What each slot holds: a tensor's geometry, the type of what has none, or None."""
        self.slots = {name: k for k, name in enumerate(names)}
        self.steps: list[_Step] = []
        self.returned: Any = None

    def run(self, variables: dict[str, Any]) -> Any:
        """Run the pass. variables: the arguments by name, and what the lines bind them from."""
        result: Any = None
        for number, line in enumerate(self.function.lines):
            reads = {name: self.slots[name] for name in line.reads if name in self.slots}
            if line.function in STRUCTURAL:
                self._move(line)
                result = run_line(line, self.ops, variables)
                continue
            read = [self.values[slot] for slot in reads.values()]
            self.recorder.reading = {v.place.buffer for v in read if isinstance(v, Geometry)}
            with self.recorder:
                if number in self.in_python:
                    self.recorder.refuse("a line in Python reads what it makes")
                elif not _ours(line):
                    self.recorder.refuse("it is no function of opsgraph's")
                elif any(self._size(reads.get(name)) >= LARGE for name in line.overwrites):
                    self.recorder.refuse("it lets go of large memory midway")
                run_line(line, self.ops, variables)
            events, reason = self.recorder.take()
            makes = {}
            for made in line.makes:
                self.slots[made] = makes[made] = k = len(self.values)
                value = variables.get(made)
                known = self._described(value) if reason is None else self._made(k, value)
                self.values.append(known)
            self.steps.append(_Step(number, line, reads, makes, events, reason))
        return result

    def _handed(self, slot: int, value: Any) -> Any:
        """What a slot holds that a replay does not make itself."""
        return _described(value, lambda: self.recorder.argument(slot, value))

    def _made(self, slot: int, value: Any) -> Any:
        """What a slot holds that a line in Python makes.

        Expanded tensors have no memory of their own, into which those of later calls could be laid.
        """
        if isinstance(value, Tensor) and span(value) < value.numel() * value.element_size():
            return type(value)
        return self._handed(slot, value)

    def _described(self, value: Any) -> Any:
        """What a slot holds that a stretch makes."""
        return _described(value, lambda: self.recorder.find(value.data_ptr()))

    def _move(self, line: Line) -> None:
        """Follow names through a line that moves them."""
        if line.function == "return":
            results = line.arguments
            self.returned = self._leaves(results if len(results) > 1 else results[0])
        elif line.function == "bind" and isinstance(line.results, str):
            self.slots[line.results] = self.slots[line.arguments[0].text]  # type: ignore[union-attr]

    def _leaves(self, nested: Any) -> Any:
        if isinstance(nested, tuple) and not hasattr(nested, "category"):
            return tuple(map(self._leaves, nested))
        if nested.category == "literal" and nested.value is None:
            return None
        return nested.category, self.slots[nested.text]

    # -- the record --

    def record(self) -> Record | None:
        """The record, or None where a value has to be made by a line in Python: see `in_python`."""
        python = [step for step in self.steps if step.reason is not None]
        leaves = {slot for _, slot in _flat(self.returned)}
        needed = {k for step in python for k in step.reads.values()} | leaves
        opaque = {k for k in needed if isinstance(self.values[k], type)}
        again = {
            step.number
            for step in self.steps
            if step.reason is None and opaque.intersection(step.makes.values())
        }
        if again:
            self.in_python |= again
            return None
        return _Assembly(self, self._groups(), needed).record()

    def _groups(self) -> list[list[_Step]]:
        """Lines in Python alone, others together as far as memory allows."""
        groups: list[list[_Step]] = []
        joined = False
        for step in self.steps:
            native = step.reason is None
            if native and joined:
                groups[-1].append(step)
            else:
                groups.append([step])
            joined = native and not self._lets_go(step)
        return groups

    def _lets_go(self, step: _Step) -> bool:
        """Whether large memory is let go after a line, which later ones may be given."""
        return any(self._size(step.reads.get(name)) >= LARGE for name in step.line.dead)

    def _size(self, slot: int | None) -> int:
        """Bytes of the memory of an argument; 0 of what is none."""
        value = self.values[slot] if slot is not None and slot < self.count else None
        if not isinstance(value, Geometry):
            return 0
        return self.recorder.buffers[value.place.buffer].size


class _Assembly:
    """Puts a record together. needed: the slots that replays have to fill."""

    def __init__(
        self, recording: Recording, groups: list[list[_Step]], needed: Collection[int]
    ) -> None:  # fmt: skip
        self.recording, self.groups = recording, groups
        self.values, self.buffers = recording.values, recording.recorder.buffers
        self.free = len(self.values)
        """The next slot that nothing has."""
        self.base: dict[int, int] = {}
        """The slot of each buffer that is there between stretches."""
        self.same: dict[int, int] = {}
        """What slots hold that are another slot's value."""
        self.last: dict[int, int] = {}
        """The part after which nothing reads a slot."""
        uses = [
            {b for step in group for event in step.events for b in used(event)} for group in groups
        ]
        self.uses = uses
        kept = {
            b
            for n, some in enumerate(uses)
            for b in some
            if any(b in more for more in uses[n + 1 :])
        }
        self.native = {
            slot
            for group in groups
            for step in group
            if step.reason is None
            for slot in step.makes.values()
        }
        """The slots of what stretches make."""
        self.views: dict[int, list[View]] = {}
        self.results: dict[int, list[Result]] = {}
        for number, buffer in enumerate(self.buffers):
            if buffer.argument is not None:
                self.base[number] = buffer.argument
        self._place(needed, kept)

    def _place(self, needed: Collection[int], kept: Collection[int]) -> None:
        """Find out which buffers are results, and what shows each needed value."""
        makers = {
            k: n for n, group in enumerate(self.groups) for s in group for k in s.makes.values()
        }
        for slot in sorted(needed):
            value = self.values[slot]
            if not isinstance(value, Geometry) or slot < self.recording.count:
                continue
            place, dtype, sizes, strides = value
            buffer, maker = self.buffers[place.buffer], makers[slot]
            if buffer.argument == slot:  # made by a line in Python
                continue
            home = self.base.get(place.buffer)
            if home is None and _whole(value, buffer.size):
                self._result(place.buffer, slot, sizes, dtype, maker)
                continue
            if home is None:
                home = self._hidden(place.buffer, maker)
            if value == self.values[home] if home < len(self.values) else False:
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
        self, number: int, slot: int, sizes: tuple[int, ...], dtype: torch.dtype, maker: int
    ) -> None:  # fmt: skip
        first = next((n for n, uses in enumerate(self.uses) if number in uses), maker)
        self.base[number] = slot
        result = Result(slot, sizes, dtype, self.buffers[number].device)
        self.results.setdefault(first, []).append(result)

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
        for number, part in enumerate(parts):
            part.dead += [slot for slot, last in self.last.items() if last == number]
        made = self.recording
        has_ops = made.function.parameters[:1] == ("ops",)
        return Record(
            made.present, made.fits, made.saved, has_ops, parts, ends, returned, made.device,
            made.recorder.shared,
        )  # fmt: skip

    def _part(self, number: int, group: list[_Step]) -> Stretch | InPython:
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
        return Stretch(
            self.recording.device, events, names, inputs, results, views, self.base, self.buffers
        )

    def _home(self, slot: int) -> int:
        """The slot that holds the value of one; `NOTHING` for None that a stretch would make."""
        if self.values[slot] is None and slot in self.native:
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


def _described(value: Any, find: Callable[[], Place | None]) -> Any:
    if not isinstance(value, Tensor):
        return None if value is None else type(value)
    place = find() if value.numel() else None
    if place is None:
        return type(value)
    return Geometry(place, value.dtype, (*value.shape,), value.stride())


def _ours(line: Line) -> bool:
    """Whether a line calls a function of opsgraph's own, which does nothing on the side."""
    if line.function in ("weigh", "wgrad_by"):
        return False
    if line.target is None:
        return True
    kind = line.target if hasattr(line.target, "__module__") else type(line.target)
    return str(kind.__module__).startswith("opsgraph.") and "_vjp" not in line.function


def _whole(value: Geometry, size: int) -> bool:
    """Whether a value is all of its buffer, by rows."""
    count, stride = value.dtype.itemsize, 1
    for n, step in zip(reversed(value.sizes), reversed(value.strides), strict=True):
        if n != 1 and step != stride:
            return False
        count, stride = count * n, stride * n
    return value.place.offset == 0 and count == size


def _flat(nested: Any) -> Iterable[tuple[str, int]]:
    if nested is None:
        return
    if nested and isinstance(nested[0], str):
        yield nested
        return
    for item in nested:
        yield from _flat(item)


def _slots(nested: Any) -> Iterable[int]:
    if isinstance(nested, int):
        yield nested
    for item in nested if isinstance(nested, tuple) else ():
        yield from _slots(item)
