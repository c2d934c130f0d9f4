"""`Writer` collects the lines of one generated function.

It has every variable defined that a line reads, gives objects names in the source, spells calls,
and lets go of each variable after its last use.
"""

from collections.abc import Iterable, Sequence
from math import inf, nan
from typing import Any

import torch

from ..guards.results import First
from ..op import BACKWARD
from ..op.functions import backward_functions
from .claims import Call, Claim, Space
from .compiled import compiled
from .lines import Function, Line, Nested, Results
from .names import free
from .program import Argument


class Writer:
    """Writes one function. `free`: the variables that it reads and that nothing defines, in order.

    A subclass says in `define` what defines a variable.
    """

    def __init__(self, space: Space, parameters: Sequence[str]) -> None:
        self.space, self.program = space, space.program
        self.parameters = parameters
        self.lines: list[Line] = []
        self.available = set(parameters)
        self.free: dict[str, None] = {}
        self.namespace: dict[str, Any] = {"torch": torch, "inf": inf, "nan": nan}
        self.bound: dict[str, Any] = {}
        """Objects by what the source calls them."""

    def define(self, name: str) -> Sequence[Line]:
        """The lines that make a variable; none: it is free."""
        raise NotImplementedError

    def add(self, *lines: Line) -> None:
        """Append lines, each after what defines its variables.

        On a stack of its own, for what defines a variable may go deep.
        """
        for line in lines:
            waiting: list[str | Sequence[Line]] = [(line,), *reversed(line.reads)]
            while waiting:
                need = waiting.pop()
                if not isinstance(need, str):
                    self.lines += need
                elif need not in self.available:
                    defined = self.define(need)
                    if not defined:
                        self.free[need] = None
                    makes = {variable for line in defined for variable in line.makes}
                    self.available |= makes | {need}
                    reads = (read for line in defined for read in line.reads if read not in makes)
                    waiting += defined, *reversed([*reads])
            self.available.update(line.makes)

    # -- what objects are called --

    def bind(self, name: str, target: Any) -> str:
        """What an object is called in the source; a number is added where two share a name."""
        for text in free(name, self.program.roots):
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
            self.namespace[name].counts[call.function].add(len(call.results))
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
        arguments = tuple(
            a._replace(text=self.bind(a.text, a.value)) if a.category == "object" else a
            for a in call.arguments
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
        """The function, which returns `results`. Each variable is let go after its last use.

        held: variables that the caller holds in any case.
        """
        self.add(Line("return", results))
        living = {name for line in self.lines for name in line.makes}
        living = living.difference(held, self.lines[-1].reads)
        for number, line in reversed([*enumerate(self.lines[:-1])]):
            if dead := living.intersection((*line.reads, *line.makes)):
                self.lines[number] = line._replace(dead=tuple(sorted(dead)))
                living -= dead
        head = f"def {name}({', '.join(self.parameters)}):"
        source = "\n".join((head, *(text for line in self.lines for text in line.text()))) + "\n"
        call = compiled(name, source, self.namespace)
        return Function(source, call, tuple(self.parameters), tuple(self.lines))
