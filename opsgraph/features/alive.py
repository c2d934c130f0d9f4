"""What is alive at each line of a backward, in bytes, by its plan alone.

A backward's variables stand for values, here by number: one that is made anew is another value, and
several may stand for the same. A value's size follows from the spec of what the line's claim makes;
what the caller holds, and what is allocated inside a call, does not count.

The hook is `Definitions.after`, see `Noted`.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import NamedTuple

from ..guards.names import of_opsgraph
from ..op import BACKWARD, Spec
from ..plan import Plan
from ..plan.claims import Claim
from ..plan.lines import Line
from ..plan.writer import Definitions, Writer


class Noted:
    """Takes note of a backward's steps; it is the last of `Definitions.after`."""

    definitions: Definitions | None = None

    def __init__(self) -> None:
        self.steps: list[tuple[Line, Claim]] = []

    def __call__(
        self, writer: Writer, claim: Claim, lines: Sequence[Line], again: bool = False
    ) -> Sequence[Line]:
        """The lines of a step as they are."""
        if writer.direction == BACKWARD:
            self.definitions = writer.definitions
            self.steps += [(line, claim) for line in lines]
        return lines

    def forget(self) -> None:
        """Let go of the definitions, which hold it: else what planned waits for the collector."""
        self.definitions, self.steps = None, []


class Size(NamedTuple):
    """Bytes: in any case, and for each row of the plan's input."""

    fixed: int = 0
    row: int = 0

    @staticmethod
    def of(spec: Spec) -> "Size":
        """That of a value of a spec."""
        if spec.bytes_per_row:
            return Size(0, spec.bytes_per_row)
        return Size(prod(size for size in spec.shape if size > 0) * spec.dtype.itemsize)

    def at(self, rows: int) -> int:
        """That with a number of rows."""
        return self.fixed + self.row * rows


class Step(NamedTuple):
    """A line with the values that its variables stand for."""

    line: Line
    reads: Mapping[str, int]
    makes: Mapping[str, int]
    values: tuple[int, ...]
    """All of these."""
    new: tuple[int, ...] = ()
    """Those that are not there before."""
    over: frozenset[int] = frozenset()
    """Those that it may overwrite."""
    product: bool = False
    """Whether it makes a weight gradient, which is returned, by a function of opsgraph's alone."""


class Values:
    """The values of a plan's backward: `steps` over them, `sizes` by number."""

    def __init__(self, plan: Plan, definitions: Definitions, noted: Noted) -> None:
        self.program, self.specs = definitions.program, list[Spec | None]()
        self.sizes = list[Size]()
        self.gradients = dict(_gradients(definitions))
        self.saved = {saved.name: saved for saved in plan.specs.saved}
        self.given = {name: self._add(None) for name in plan.functions.backward.parameters}
        """What the parameters stand for."""
        self.names = {**self.given}
        """What each variable stands for, in the end."""
        self.called = {self.given["dx"]: f"d{self.program.x[-1]}"}
        """What gradients may be called that are `dx` in their turn."""
        claims = {(id(line.arguments), line.results): claim for line, claim in noted.steps}
        self.steps = [
            self._step(line, claims.get((id(line.arguments), line.results)))
            for line in plan.functions.backward.lines
        ]

    def _add(self, spec: Spec | None, held: bool = False) -> int:
        self.specs.append(spec)
        self.sizes.append(Size() if held or spec is None else Size.of(spec))
        return len(self.specs) - 1

    def _step(self, line: Line, claim: Claim | None) -> Step:
        request = self.program.request
        reads = {name: self.names[name] for name in line.reads}
        over = frozenset(self.names[name] for name in line.overwrites)
        if line.function == "bind" and isinstance(line.results, str):
            self.names |= (made := {line.results: self.names[line.reads[0]]})
            return Step(line, reads, made, (*made.values(),))
        made = {name: self._made(line, claim, name) for name in line.makes}
        self.names |= made
        if claim is not None and "dx" in made:
            self.called[made["dx"]] = f"d{self.program.x[claim.start]}"
        product = line.function.endswith(".wgrad") and of_opsgraph(line.target) and not over
        elsewhere = line.results in request.late or line.results in request.accumulated
        new = (*made.values(),)
        return Step(
            line, reads, made, (*reads.values(), *new), new, over, product and not elsewhere
        )

    def _made(self, line: Line, claim: Claim | None, name: str) -> int:
        """A value that a line makes, by its number."""
        program = self.program
        if claim is not None:
            if claim.direction == BACKWARD and (name == "dx" or name in self.gradients):
                return self._add(self.gradients.get(name, program.specs[claim.start]))
            return self._add(program.spec(name) if name in program.values else None)
        if line.function == "bind":
            return self._add(self.saved[name].spec, self.saved[name].argument is not None)
        spec = self.specs[self.names[line.reads[0]]] if line.reads else None
        if spec is not None and line.function.startswith("cast"):
            spec = replace(spec, dtype=line.arguments[1].value)  # type: ignore[union-attr]
        return self._add(spec)


def _gradients(definitions: Definitions) -> Iterator[tuple[str, Spec | None]]:
    """The specs of the gradients that steps return beside the one that flows."""
    program = definitions.program
    specs: dict[str, Spec | None] = {program.name("d", i): program.specs[i] for i in program.tapped}
    for given, name in zip(definitions.inputs, program.arguments, strict=False):
        if given.gradient and given.spec and name != "x0":
            cast = program.request.compute if name in program.request.casts else None
            specs[given.gradient] = replace(given.spec, dtype=cast or given.spec.dtype)
    for name, spec in specs.items():
        yield from ((name, spec), (f"{name}_more", spec))


def last_uses(steps: Sequence[Step]) -> dict[int, int]:
    """For each value the last of some steps with it."""
    return {number: k for k, step in enumerate(steps) for number in step.values}


def alive(steps: Sequence[Step], sizes: Sequence[int], kept: Container[int] = ()) -> list[int]:
    """The bytes that are alive at each of some steps, more than before the first.

    A value dies after the last step with it, unless it is kept. One that may be overwritten makes
    room for what overwrites it.
    """
    gone = [0] * len(steps)
    for number, k in last_uses(steps).items():
        if number not in kept and number not in steps[k].over:
            gone[k] += sizes[number]
    live, found = 0, list[int]()
    for step, less in zip(steps, gone, strict=True):
        for number in step.new:
            live += sizes[number]
        for number in step.over:
            live -= sizes[number]
        found.append(live)
        live -= less
    return found


class Peak:
    """The most bytes that are alive at one step: of a number of rows of the plan's input."""

    def __init__(self, steps: Sequence[Step], sizes: Sequence[Size]) -> None:
        parts = (alive(steps, part) for part in zip(*sizes, strict=True))
        self.sizes = list[Size]()
        for size in sorted(map(Size._make, zip(*parts, strict=True)), reverse=True):
            if not self.sizes or size.row > self.sizes[-1].row:  # else less, however many rows
                self.sizes.append(size)

    def __call__(self, rows: int) -> int:
        return max(size.at(rows) for size in self.sizes)
