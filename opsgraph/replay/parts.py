"""The parts of a record: stretches, replayed by one native call each, and lines in Python.

Each tells its lines of source, and so does what is made for them; `record` joins these.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.errors import OpsgraphError
from ..kernels.cpu import memory
from ..plan.lines import Line
from .arena import arena
from .calling import caller
from .events import Buffer, Event, Matmul, Operand, Place
from .exchanges import count, divided, texts
from .interpreter import run_line
from .native import ARENA, program

ALIGNED = 16
"""Bytes that arguments have to begin at multiples of, on CUDA."""


Layout = tuple[torch.dtype, tuple[int, ...], tuple[int, ...]]
"""Dtype, sizes, strides."""
NOTHING = -1
"""The slot of None."""


def name(slot: int) -> str:
    """What the variable of a slot is called."""
    return "None" if slot == NOTHING else f"v{slot}"


class View(NamedTuple):
    """A tensor over the memory of another slot's: what a variable of a line is."""

    slot: int
    base: int
    dtype: torch.dtype
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    """In bytes, from where the other one begins."""

    def text(self, namespace: dict[str, Any]) -> str:
        """The line that makes it."""
        namespace[f"view{self.slot}"] = self[2:]
        return f"{name(self.slot)} = view({name(self.base)}, *view{self.slot})"


def view(
    base: Tensor, dtype: torch.dtype, sizes: tuple[int, ...], strides: tuple[int, ...], offset: int
) -> Tensor:
    """A tensor over the memory of another one, at an offset in bytes from where that begins."""
    if base.dtype != dtype:
        base = base.view(dtype)
    return base.as_strided(sizes, strides, base.storage_offset() + offset // dtype.itemsize)


class Build(NamedTuple):
    """A NamedTuple that a line makes of tensors. parts: slots, of its own kind, and constants."""

    slot: int
    kind: Any
    parts: tuple[Any, ...]

    @property
    def slots(self) -> list[int]:
        """Whose values it is made of."""
        found = list[int]()
        for part in self.parts:
            if isinstance(part, Build):
                found += part.slots
            elif type(part) is int:
                found.append(part)
        return found

    def make(self, values: Iterator[Any]) -> Any:
        """It, of the values of its slots in order."""
        parts = []
        for part in self.parts:
            if isinstance(part, Build):
                parts.append(part.make(values))
            else:
                parts.append(next(values) if type(part) is int else part.value)
        return self.kind(*parts)

    def text(self, namespace: dict[str, Any]) -> str:
        """The line that makes it."""
        namespace[f"make{self.slot}"] = lambda *values: self.make(iter(values))
        return f"{name(self.slot)} = make{self.slot}({', '.join(map(name, self.slots))})"


class Constant(NamedTuple):
    """What no tensor is in a NamedTuple."""

    value: Any


class Result(NamedTuple):
    """A dense tensor that PyTorch allocates; it is contiguous where no strides are given.

    over: the argument whose memory it may have.
    """

    slot: int
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    over: int | None = None
    strides: tuple[int, ...] | None = None

    @property
    def layout(self) -> Layout:
        """Dtype, sizes, strides."""
        return self.dtype, self.sizes, self.strides or memory.contiguous(self.sizes)

    def text(self, variable: str, number: int, namespace: dict[str, Any]) -> str | None:
        """The line of a stretch's that allocates it; None where `new` does, of its layout."""
        if self.over is not None:
            return f"{variable} = in_place_of({name(self.over)})"
        size = math.prod(self.sizes) * self.dtype.itemsize
        if self.device.type == "cpu" and size >= memory.LEAST:
            layout = f"kept{number}_{variable}"  # each stretch has a room
            namespace[layout] = self.sizes, self.dtype
            return f"{variable} = kept(*{layout})"
        return None


class Stretch:
    """Steps that are replayed by one native call. names: of the lines whose calls they are."""

    def __init__(
        self, device: torch.device, events: Sequence[tuple[int, Event]], names: Sequence[str],
        inputs: Sequence[int], results: Sequence[Result], views: Sequence[View],
        home: Mapping[int, int], buffers: Sequence[Buffer], builds: Sequence[Build] = (),
        layouts: Mapping[int, Layout] | None = None,
    ) -> None:  # fmt: skip
        """home: the slot of each buffer that is no temporary. layouts: of what slots hold."""
        self.builds = builds
        self.device, self.names, self.results, self.views = device, names, results, views
        self.dead, pieces = list[int](), divided(events)
        self.pieces = [len(piece) if isinstance(piece, list) else piece for piece in pieces]
        """Exchanges and waits, and how many launches there are before and after each."""
        alone = [event for _, event in events]
        offsets, self.arena = arena(alone, lambda buffer: buffer not in home, buffers)
        self.bases = (*inputs, *(result.slot for result in results))
        self.reads = {*inputs, *(view.base for view in views)}
        order = {slot: k for k, slot in enumerate(self.bases)}
        alone_on_cpu = device.type == "cpu" and self.arena < memory.LEAST and len(pieces) < 2
        self.provided = self.arena if alone_on_cpu else 0
        """The arena's size where the library provides it."""
        room = ARENA if self.provided else len(order)

        def locate(place: Place) -> tuple[int, int]:
            if place.buffer in home:
                return order[home[place.buffer]], place.offset
            return room, offsets[place.buffer] + place.offset

        def spelled(operand: Operand) -> str:
            place, layout = operand.place, (operand.dtype, operand.sizes, operand.strides)
            slot, offset = home.get(place.buffer), place.offset
            if slot is None:
                return (
                    f"view(room, {', '.join(map(str, layout))}, {offsets[place.buffer] + offset})"
                )
            if not offset and layouts is not None and layouts.get(slot) == layout:
                return name(slot)
            return f"view({name(slot)}, {', '.join(map(str, layout))}, {offset})"

        self.programs = [
            program(piece, locate, self.provided, device) if isinstance(piece, list) else None
            for piece in pieces
        ]
        self.spelled = spelled
        """How source spells the tensor of an operand."""
        self.held = [event for event in alone if isinstance(event, Matmul)]
        """What the programs have addresses of."""

    def text(self, number: int, namespace: dict[str, Any]) -> Iterator[str]:
        """Its lines of source, with what they name in the namespace."""
        given = [*map(name, self.bases)]
        results = [(name(result.slot), result) for result in self.results]
        if self.arena > self.provided:
            results.append(("room", Result(NOTHING, (self.arena,), torch.uint8, self.device)))
            given.append("room")
        new: dict[str, Any] = {}
        for variable, result in results:
            if (line := result.text(variable, number, namespace)) is not None:
                yield line
            else:
                dtype, sizes, strides = result.layout
                new[variable] = sizes, strides, dtype
        if new:
            namespace[f"layouts{number}"] = [*new.values()]
            yield f"{', '.join(new)}, = starmap(new, layouts{number})"
        namespace[f"fail{number}"] = self.fail
        stream = "0" if self.device.type == "cpu" else f"stream({self.device.index})"
        between = texts(self.pieces, self.spelled, namespace)
        for k, (made, exchange) in enumerate(zip(self.programs, between, strict=True)):
            yield from exchange
            if made is not None:
                namespace[f"replay{number}_{k}"] = caller(made, self.device.type)
                yield f"failed = replay{number}_{k}({', '.join((stream, *given))})"
                yield "if failed:"
                yield f"    fail{number}(failed)"
        for view in self.views:
            yield view.text(namespace)
        for build in self.builds:
            yield build.text(namespace)
        dead = [*map(name, self.dead), *given[len(self.bases) :]]  # with the room
        if dead:
            yield " = ".join((*dead, "None"))

    def __str__(self) -> str:
        where = dict.fromkeys(name.partition(":")[0] for name in self.names)
        return f"{', '.join(where)}: {count(self.pieces)}"

    def fail(self, failed: int) -> None:
        """Raise for the step that failed, whose code the library returned."""
        line, code = (failed & 0xFFFFFFFF) - 1, failed >> 32
        raise OpsgraphError(f"{self.names[line]}: got error {code} from its launch, expected none")


class InPython:
    """A line that runs in Python, on what `reads` names; it makes what `makes` names."""

    def __init__(
        self, line: Line, reads: Mapping[str, int], makes: Mapping[str, int], reason: str
    ) -> None:
        self.line, self.reads, self.makes, self.reason = line, dict(reads), dict(makes), reason
        self.dead = list[int]()
        self.layouts: Mapping[str, Layout] = {}
        """Of what it makes that stretches read."""

    def text(self, number: int, namespace: dict[str, Any]) -> Iterator[str]:
        """Its lines of source, with what they name in the namespace."""
        namespace[f"line{number}"] = self.run
        reads, makes = (", ".join(map(name, slots.values())) for slots in (self.reads, self.makes))
        variables = f"[{reads}]"
        if self.dead:  # so that the list alone has them
            yield f"variables = {variables}"
            yield " = ".join((*map(name, self.dead), "None"))
            variables = "variables"
        yield f"{f'{makes}, = ' if makes else ''}line{number}(ops, {variables})"

    def __str__(self) -> str:
        where = self.line.note.split()[:1]
        return f"{' '.join((*where, self.line.function))} in Python: {self.reason}"

    def run(self, ops: Any, values: list[Any]) -> list[Any]:
        """Run it, on the values that it reads, which are taken from the list."""
        variables = dict(zip(self.reads, values, strict=True))
        values.clear()
        run_line(self.line, ops, variables)
        for made, layout in self.layouts.items():
            variables[made] = self._laid_out(made, variables.get(made), *layout)
        return [variables.get(made) for made in self.makes]

    def _laid_out(
        self, made: str, value: Any, dtype: torch.dtype, sizes: Any, strides: Any
    ) -> Tensor:  # fmt: skip
        """A value in the layout that stretches read it in."""
        if not isinstance(value, Tensor) or (value.dtype, value.shape) != (dtype, sizes):
            got = f"{value.dtype} {[*value.shape]}" if isinstance(value, Tensor) else f"{value}"
            expected = f"{dtype} {[*sizes]} as in calls before"
            raise OpsgraphError(f"{self.line.function}: {made} is {got}, expected {expected}")
        if value.stride() == strides and value.data_ptr() % ALIGNED == 0:
            return value
        return torch.empty_strided(sizes, strides, dtype=dtype, device=value.device).copy_(value)
