"""`Definitions` says what variables mean; a `Writer` writes one function, which makes them.

A writer has every variable defined that a line reads, gives objects names in the source, spells
calls, and lets go of each variable after its last use. What no step makes is defined here: under
autocast an argument in another dtype is `weight2_stored`, and `weight2` is its cast.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf, nan
from typing import Any, NamedTuple, TypeAlias

import torch

from ..guards.names import free
from ..guards.results import First
from ..op import BACKWARD, FORWARD, ROWS, STORED, Spec
from ..op.functions import backward_functions
from .claims import Call, Claim, Space
from .lines import Function, Line, Nested, Results, let_go, literal, value
from .planner import Cover
from .program import Argument

After: TypeAlias = "Callable[[Writer, Claim, Sequence[Line], bool], Sequence[Line]]"
"""Makes other lines of those of a step. The last argument: whether it makes values again."""


class Input(NamedTuple):
    """An argument of the forward after `ops`: x, an extra input, a weight, or a part of one."""

    name: str
    """Its variable."""
    spec: Spec | None
    """None for a parameter that the module does not have."""
    dims: int | None
    """Its dimensions inside the plan; None for as they are."""
    gradient: str | None
    """The variable of the gradient that the backward returns in its place, if it does."""
    amax: bool
    """Whether that is an amax."""


class Definitions:
    """Defines variables in both passes of a cover; knows the arguments and the specs of all."""

    prepared: tuple[Any, ...] = ()
    """Weights that are handed in quantized."""

    def __init__(self, space: Space, cover: Cover, after: Sequence[After] = ()) -> None:
        self.space, self.cover, self.program = space, cover, space.program
        self.after = after
        """What makes other lines of those of a step."""
        self.inputs = tuple(self._inputs())
        """The arguments of the forward after `ops`."""
        self.specs = {argument.name: argument.spec for argument in self.inputs}
        self.bound: dict[str, Any] = {}
        """Objects by what the sources call them."""

    def _inputs(self) -> Iterator[Input]:
        program = self.program
        dims = {"x0": 2}
        for i, name, _ in program.run.inputs:
            inside = program.kinds[i].extra_spec(program.ops[i], name, program.specs[i])
            if inside is not None and ROWS in inside.shape:
                dims[program.name(name, i)] = len(inside.shape)
        for name, spec in program.arguments.items():
            amax = name in program.reported
            wanted = amax or (spec is not None and name in program.request.gradients)
            gradient = None if not wanted else "dx" if name == "x0" else f"d{name}"
            variable = name + STORED * (name in program.request.casts)
            yield Input(variable, spec, dims.get(name), gradient, amax)

    def spec(self, name: str) -> Spec:
        """The spec of a variable that the forward may save."""
        return self.specs.get(name) or self.program.spec(name)

    def define(self, name: str, writer: "Writer") -> Sequence[Line]:
        """The line that makes a variable for a writer, if it is defined here."""
        program, forward = self.program, writer.direction == FORWARD
        # Activations are cast by the forward alone, which saves the cast.
        if name in program.request.casts and (forward or name not in program.activations):
            arguments = value(name + STORED), literal(program.request.compute)
            return [Line("cast", arguments, name, note="autocast")]
        return ()

    def wanted(self, name: str, direction: str) -> list[str]:
        """The copies of a quantized value that the step which makes it in a pass hands out."""
        return []

    def gradient(self, gap: int) -> list[str]:
        """The copies of the gradient at a gap that the linear layer before it reads."""
        return []

    def prepare(self) -> Function:
        """The function that quantizes the weights of a plan."""
        return Function("prepare", (), ())


class Writer:
    """Writes one function. `free`: the variables that it reads and that nothing defines, in order.

    definitions: of the plan. direction: the pass that it is of. parameters: its own.
    """

    def __init__(self, definitions: Definitions, direction: str, *parameters: str) -> None:
        self.definitions, self.direction, self.parameters = definitions, direction, parameters
        self.program, self.cover = definitions.program, definitions.cover
        self.lines: list[Line] = []
        self.available = set(parameters)
        self.free: dict[str, None] = {}
        self.namespace: dict[str, Any] = {"torch": torch, "inf": inf, "nan": nan}
        self.bound = definitions.bound

    def define(self, name: str) -> Sequence[Line]:
        """The lines that make a variable; none: it is free."""
        return self.definitions.define(name, self)

    def after(self, claim: Claim, lines: Sequence[Line], again: bool = False) -> Sequence[Line]:
        """The lines of a step as features have them."""
        for change in self.definitions.after:
            lines = change(self, claim, lines, again)
        return lines

    def add(self, *lines: Line) -> None:
        """Append lines, each after what defines its variables.

        On a stack of its own, for what defines a variable may go deep.
        """
        for line in lines:
            there = self.available.issuperset(line.reads)
            waiting: list[Any] = [] if there else line.reads[::-1]
            while waiting:
                need = waiting.pop()
                if not isinstance(need, str):
                    self.lines += need
                elif need not in self.available:
                    self.available.add(need)
                    if defined := self.define(need):
                        makes = {variable for one in defined for variable in one.makes}
                        self.available |= makes
                        reads = [read for one in defined for read in one.reads if read not in makes]
                        waiting += defined, *reversed(reads)
                    else:
                        self.free[need] = None
            self.lines.append(line)
            self.available.update(line.makes)

    # -- what objects are called --

    def bind(self, name: str, target: Any) -> str:
        """What an object is called in the source; a number is added where two share a name."""
        again = self.bound.get(name) is target
        for text in (name,) if again else free(name, self.program.roots):
            if self.bound.setdefault(text, target) is target:
                self.namespace.setdefault(text, target)
                return text
        raise AssertionError

    def _name_of(self, claim: Claim, call: Call, target: Any) -> str:
        """A fuser's name in the source. The first results of a user's are checked."""
        name = self.bind(claim.fuser.name, target)
        kind = target if claim.is_reference else type(target)
        if not kind.__module__.startswith("opsgraph."):
            if self.namespace[name] is target:
                where = self.program.labels[claim.start] if claim.is_reference else claim.label
                self.namespace[name] = First(target, where)
            self.namespace[name].expect(call, self.program.specs[claim.start])
        return name

    def call(
        self, claim: Claim, call: Call, want: Iterable[str], first: str, names: Sequence[str]
    ) -> Line:
        """The line of a claim's call. want: what it is to hand out, by the names it declares.

        first: the variable of y or dx; names: those of what follows, "_" for what nothing reads.
        """
        target: Any = claim.fuser.kind if claim.is_reference else claim.fuser  # type: ignore[attr-defined]
        spelled = f"{self._name_of(claim, call, target)}.{call.function}"
        if claim.is_reference and claim.direction == BACKWARD:
            function = backward_functions(target)[call.function]
            if function is not getattr(target, call.function):  # derived from fwd
                suffix = "" if call.function == "bwd" else f"_{call.function}"
                spelled = self.bind(f"{target.__name__}_vjp{suffix}", function)
                target = function
        arguments = call.arguments
        if any(a.category == "object" for a in arguments):
            arguments = tuple(
                a._replace(text=self.bind(a.text, a.value)) if a.category == "object" else a
                for a in arguments
            )
        keywords: tuple[tuple[str, Nested], ...] = ()
        if call.wants:
            words = tuple(claim.fuser.wants.get(word, word) for word in want)
            keywords = (("want", Argument("literal", repr(words), value=words)),)
        results: Results = first, tuple(names) if set(names) - {"_"} else "_"
        if call.function in ("again", "dgrad", "wgrad"):  # they return one thing
            results = names[0] if call.function == "wgrad" else first
        note = f"{claim.where} {claim.fuser.backend}"
        return Line(spelled, arguments, results, target, keywords, note)

    # -- the end --

    def finish(
        self, name: str, *results: tuple[Argument, ...], held: Iterable[str] = ()
    ) -> Function:
        """The function, which returns `results`. held: variables that the caller holds anyway."""
        self.add(Line("return", results))
        living = {name for line in self.lines for name in line.makes}
        living = living.difference(held, self.lines[-1].reads)
        let_go(self.lines, living)
        return Function(name, self.parameters, self.lines, self.namespace)
