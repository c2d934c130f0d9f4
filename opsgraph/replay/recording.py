"""Makes a record: runs the lines of a pass one by one, watched, and sorts out what flows where.

The layers: `recorder` notes what each line did to memory; here lines become stretches and lines in
Python, and values get slots; `assembly` says what each stretch is handed and what it allocates;
`record` is the result, which `passes` replays.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..guards.names import of_opsgraph
from ..guards.torch_private import same_layouts
from ..plan.lines import Function, Line
from .events import Event, Place
from .interpreter import run_line
from .parts import Constant
from .recorder import Recorder, span

STRUCTURAL = ("bind", "clear", "pass", "return")
"""Lines that move names and touch no memory."""
LARGE = 2**20
"""Bytes of a value that is let go within a stretch, from which its peak memory is looked at."""


class Geometry(NamedTuple):
    """A tensor as a view of a buffer."""

    place: Place
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Composite(NamedTuple):
    """A NamedTuple of geometries, of its like, and of constants, as quantized values are."""

    kind: Any
    parts: tuple[Any, ...]


class Step(NamedTuple):
    """A line that ran, with the slots that it read, made, and was the last to name."""

    number: int
    line: Line
    reads: dict[str, int]
    makes: dict[str, int]
    gone: set[int]
    events: Sequence[Event]
    reason: str | None


class Recording:
    """One recording of a pass. `run()` returns what the pass returns.

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
        first: dict[int, int] = {}
        tensors = [(k, t) for k, t in enumerate(arguments) if isinstance(t, Tensor)]
        self.twins = {k: n for k, t in tensors if (n := first.setdefault(id(t), k)) != k}
        """Of arguments that are a tensor which was an argument before: which one that was."""
        self.present = [k for k, _ in tensors if k not in self.twins]
        self.fits = same_layouts([arguments[k] for k in self.present])
        self.recorder = Recorder(len(arguments))
        self.values = [self._handed(k, argument) for k, argument in enumerate(arguments)]
        """What each slot holds: a tensor's geometry, the type of what has none, or None."""
        self.slots = {name: k for k, name in enumerate(names)}
        """By the names that there are."""
        self.same: dict[int, int] = {}
        """Of buffers that are memory of a line's operand: that one's."""
        self.steps: list[Step] = []
        self.returned: Any = None

    def run(self, variables: dict[str, Any]) -> Any:
        """Run the pass. variables: the arguments by name, and what the lines bind them from."""
        result: Any = None
        with self.recorder:
            for number, line in enumerate(self.function.lines):
                if line.function in STRUCTURAL:
                    self._move(line)
                    result = run_line(line, self.ops, variables)
                else:
                    self._step(number, line, variables)
        return result

    def _step(self, number: int, line: Line, variables: dict[str, Any]) -> None:
        """Run a line, and note what it does."""
        recorder = self.recorder
        reads = {name: self.slots[name] for name in line.reads if name in self.slots}
        read = [self.values[slot] for slot in reads.values()]
        recorder.begin()
        recorder.reading = {v.place.buffer for v in read if isinstance(v, Geometry)}
        if number in self.in_python:
            recorder.refuse("a line in Python reads what it makes")
        elif not ours(line):
            recorder.refuse("it is no function of opsgraph's")
        recorder.consumed = consumed = [reads.get(name) for name in line.overwrites]
        operands = {
            operand.data_ptr(): value.place.buffer
            for (name, slot) in reads.items()
            if isinstance(value := self.values[slot], Geometry)
            and isinstance(operand := variables.get(name), Tensor)
        }
        run_line(line, self.ops, variables)
        taken = recorder.taken.values()
        if any(self._size(k) >= LARGE and k not in taken for k in consumed):
            recorder.refuse("it lets go of large memory midway")
        events, reason = recorder.take()
        makes, named = {}, {*self.slots.values()}
        for made in line.makes:
            self.slots[made] = makes[made] = k = len(self.values)
            value = variables.get(made)
            known = self._described(value) if reason is None else self._made(k, value)
            self.values.append(known)
            if reason is not None and isinstance(known, Geometry) and value is not None:
                if (over := operands.get(value.data_ptr())) is not None:
                    self.same[known.place.buffer] = over
        self._forget(line)
        gone = named.union(makes.values()).difference(self.slots.values())
        self.steps.append(Step(number, line, reads, makes, gone, events, reason))

    def _forget(self, line: Line) -> None:
        """Forget the names that end with a line."""
        for name in line.dead:
            self.slots.pop(name, None)

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
        if not (isinstance(value, tuple) and hasattr(value, "_fields")):
            return _described(value, lambda: self.recorder.find(value.data_ptr()))
        parts = [
            self._described(part) if isinstance(part, Tensor | tuple) else Constant(part)
            for part in value
        ]
        opaque = any(isinstance(part, type) for part in parts)
        return type(value) if opaque else Composite(type(value), tuple(parts))

    def _move(self, line: Line) -> None:
        """Follow names through a line that moves them."""
        if line.function == "return":
            results = line.arguments
            self.returned = self._leaves(results if len(results) > 1 else results[0])
        elif line.function == "bind" and isinstance(line.results, str):
            self.slots[line.results] = self.slots[line.arguments[0].text]  # type: ignore[union-attr]
        self._forget(line)

    def _leaves(self, nested: Any) -> Any:
        if isinstance(nested, tuple) and not hasattr(nested, "category"):
            return tuple(map(self._leaves, nested))
        if nested.category == "literal" and nested.value is None:
            return None
        return nested.category, self.slots[nested.text]

    # -- for the record --

    def needed(self) -> set[int] | None:
        """The slots that replays have to fill; None where `in_python` has grown for it."""
        python = [step for step in self.steps if step.reason is not None]
        leaves = {slot for _, slot in flat(self.returned)}
        needed = {k for step in python for k in step.reads.values()} | leaves
        opaque = {k for k in needed if isinstance(self.values[k], type)}
        again = {
            step.number
            for step in self.steps
            if step.reason is None and opaque.intersection(step.makes.values())
        }
        self.in_python |= again
        return None if again else needed

    def _size(self, slot: int | None) -> int:
        """Bytes of the memory of a value; 0 of what has none."""
        value = None if slot is None else self.values[slot]
        if not isinstance(value, Geometry):
            return 0
        return self.recorder.buffers[value.place.buffer].size

    def shown(self, slot: int) -> set[int]:
        """The buffers that a value shows."""
        found, left = set[int](), [self.values[slot]]
        for value in left:
            if isinstance(value, Geometry):
                found.add(value.place.buffer)
            elif isinstance(value, Composite):
                left += value.parts
        return found


def _described(value: Any, find: Callable[[], Place | None]) -> Any:
    if not isinstance(value, Tensor):
        return None if value is None else type(value)
    place = find() if value.numel() else None
    if place is None:
        return type(value)
    return Geometry(place, value.dtype, (*value.shape,), value.stride())


def ours(line: Line) -> bool:
    """Whether a line calls a function of opsgraph's own, which does nothing on the side."""
    if line.function in ("weigh", "wgrad_by"):
        return False
    if line.target is None:
        return True
    return of_opsgraph(line.target) and "_vjp" not in line.function


def flat(nested: Any) -> Iterable[tuple[str, int]]:
    """What a pass returns, one after the other: category and slot."""
    if nested is None:
        return
    if nested and isinstance(nested[0], str):
        yield nested
        return
    for item in nested:
        yield from flat(item)
