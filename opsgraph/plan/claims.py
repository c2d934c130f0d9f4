"""Claims: every place where a fuser, or an op itself, could run; what it needs, gives and costs.

A `Space` holds the claims of one program. For each pass it asks every fuser of the backends that
there are, at every op: does the pattern fit the classes from here on (`Matcher`), and does anything
speak against it (`reasons`)? What is refused is kept with its reason. Each op that does something
is a claim of its own, by its own functions (`Reference`); so there is always a plan.

A `Claim` says where it stands at once. What it needs, gives and calls follows from the names that
its fuser declares, and is worked out when a planner first asks: most claims are never looked at.

- A name `KEY_NAME` stands for what the op under KEY calls NAME (`Program.resolve`). What the class
  in that place lacks is None, in arguments and in results.
- A name without a key is the value before or after the run, its gradient, or private: a value that
  a forward hands to the backward of the same fuser at the same place, and to no other. A backward
  with such a need is admitted only where that forward could run.
- A backward that reads a Tee's gradient is refused where none arrives; one with an op whose
  gradient leaves in its midst is refused, for that gradient is not its own to give.

Costs are bytes per row of the input, read and written; rows differ where ranks exchange them.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from ..base.backend import backends
from ..base.errors import PlanError
from ..fuser import AGAIN, Function, Fuser, Match, Matcher, Name, Reference, reference, registered
from ..guards.cached import cached_property
from ..op import BACKWARD, FORWARD
from ..op.functions import family, passes, verify_backward
from .program import GAP, INPUT, PRIVATE, SAVED, Argument, Program, Value, variable_of
from .rejection import Rejection, reasons


class Call(NamedTuple):
    """A function of a claim with its arguments resolved: `results` follow y or dx, in order."""

    function: str
    arguments: tuple[Argument, ...]
    wants: bool
    results: tuple[str | None, ...]


class Claim:
    """A fuser at a place, for one pass.

    positions: of the op under each key of the pattern, None where it is left out. start, stop: the
    gaps that it joins. level: 0 for the highest priority of any fuser here, then 1, and so on.
    rank: by level, then by preference of its backend.
    """

    def __init__(self, program: Program, match: Match, way: str, level: int, rank: int) -> None:
        self.program, self.direction = program, way
        self.level, self.rank = level, rank
        self.fuser, self.positions, self.start, self.stop = match
        self.ops = tuple([i for i in match.positions.values() if i is not None])
        """The positions that it covers, dropped ops left out."""
        self.is_reference = isinstance(match.fuser, Reference)
        """Whether it is an op's own function."""

    @cached_property
    def where(self) -> str:
        """What plans call the ops that it covers: `3` or `3-5`."""
        ends = self.program.numbers[self.ops[0]], self.program.numbers[self.ops[-1]]
        return "-".join(dict.fromkeys(ends))

    @property
    def label(self) -> str:
        """What errors call the step."""
        return f"{self.direction} {self.where} {self.fuser.name} ({self.fuser.backend})"

    @cached_property
    def needs(self) -> tuple[str, ...]:
        """Values it reads, its input included: names of x's, saved values and extra inputs."""
        read = [a.text for call in self.calls for a in call.arguments if a.category == "value"]
        first = [self.program.x[self.start]] if self.direction == FORWARD else []
        return tuple(dict.fromkeys(first + read))

    @cached_property
    def gives(self) -> frozenset[str]:
        """Values it can hand out, its output apart."""
        return frozenset(filter(None, self.results if self.direction == FORWARD else ()))

    @cached_property
    def results(self) -> tuple[str | None, ...]:
        """Variables of what follows y or dx, in order."""
        declaration = self.fuser.declaration
        if self.direction == FORWARD:
            return tuple(map(self._result, declaration.saves))
        return tuple(map(self._gradient, declaration.gradients))

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """What it calls, in order."""
        unwanted = set[str]()
        if self.direction == BACKWARD:
            unwanted |= set() if any(self.results) else {"wgrad"}
            unwanted |= set() if self.program.flows[self.start] else {"dgrad"}
        functions = self.fuser.declaration.functions[self.direction]
        return tuple(self._call(f, self.results) for f in functions if f.name not in unwanted)

    @cached_property
    def weighed(self) -> dict[str, tuple[str, "Claim"]]:
        """Weight gradients that are steps of their own: the value that it gives them, the step."""
        steps = {}
        for name in self.fuser.declaration.gives:
            i = self.positions[name.key or ""]
            if i is not None and (gradient := self.program.gradient(i, "weight")):
                match = Match(reference(self.program.kinds[i]), {"op": i}, i, i + 1)
                step = Claim(self.program, match, BACKWARD, self.level, self.rank)
                steps[gradient] = self._argument(name).text, step
        return steps

    @cached_property
    def again(self) -> Call | None:
        """The call that makes y again of what `again` names, if its op has one."""
        functions = self.fuser.declaration.functions[AGAIN]
        return self._call(functions[0], ()) if functions else None

    def _call(self, function: Function, results: tuple[str | None, ...]) -> Call:
        arguments = tuple(map(self._argument, function.arguments))
        return Call(function.name, arguments, function.wants, results)

    def _result(self, name: Name) -> str | None:
        if name.key is None:
            return self.private(name.text)
        i = self.positions[name.key]
        value = None if i is None else self.program.resolve(i, name.value)
        ends = self.program.x[self.start], self.program.x[self.stop]  # there in any case
        return None if value is None or value.text in ends else value.text

    def _gradient(self, name: Name) -> str | None:
        i = self.positions[name.key or ""]
        if i is None or passes(self.program.kinds[i]):
            return None
        return self.program.gradient(i, name.value)

    def private(self, name: str) -> str:
        """The variable of a private saved name; no other fuser's, whatever that calls its own."""
        owner = name, self.fuser, tuple(self.positions.items())
        return self.program.private(name, owner, self.start)

    def _argument(self, name: Name) -> Argument:
        text, key, value, moved = name
        program = self.program
        if key is not None:
            i = self.positions[key]
            argument = None if i is None else program.resolve(i, value, self.direction)
            if argument is None and self.is_reference:
                label, kind = program.labels[self.start], program.kinds[self.start]
                raise PlanError(f"{label}: {kind.__name__} has no {value!r}")
            argument = argument or variable_of("literal", "None")
        elif text == "dy":
            argument = variable_of("gradient", "dx")
        elif text in ("x", "y"):
            argument = variable_of("value", program.x[self.start if text == "x" else self.stop])
        else:
            argument = variable_of("value", self.private(text))
        return argument._replace(moved=True) if moved else argument


class Space:
    """All claims there are for a program, and what they cost.

    starting, ending: claims of a pass by the gap where they start or end. lowest: the last level.
    """

    def __init__(self, program: Program, order: tuple[str, ...], fuel: int | None = None) -> None:
        self.program = program
        self.rejected: dict[tuple[Rejection, str], Rejection] = {}
        """What was refused, each once, in order."""
        self._sizes: dict[str, int] = {}
        self._fuel = fuel
        gaps, ways = range(program.count + 1), (BACKWARD, FORWARD)
        self.starting: dict[str, list[list[Claim]]] = {way: [[] for _ in gaps] for way in ways}
        self.ending: dict[str, list[list[Claim]]] = {way: [[] for _ in gaps] for way in ways}
        fusers = tuple(self._usable(order))
        ranks = {name: rank for rank, name in enumerate(order)}
        priorities = {fuser.declaration.priority for fuser in fusers}
        levels = {p: level for level, p in enumerate(sorted(priorities, reverse=True))}
        self.lowest = max(0, len(levels) - 1)
        for way in ways:
            for match in (*self._fused(fusers, way), *self._references(way)):
                level = levels.get(match.fuser.declaration.priority, self.lowest)
                rank = level * (len(order) + 1) + ranks.get(match.fuser.backend, len(order))
                claim = Claim(program, match, way, level, rank)
                self.starting[way][claim.start].append(claim)
                self.ending[way][claim.stop].append(claim)
                if way == FORWARD and claim.fuser.declaration.private:
                    self._add_private(claim)

    # -- building claims --

    def _usable(self, order: tuple[str, ...]) -> list[Fuser]:
        """The fusers of the backends that are here; of others it is told why they are not."""
        request, usable = self.program.request, set[str]()
        # Without a recipe a refusal of what is for recipes would say nothing.
        recipe = bool(self.program.run.quantizers)
        fusers = [f for f in registered() if recipe or not f.quantized]
        kinds, known = set().union(*map(family, self.program.kinds)), backends()
        for name in order:
            if name not in known:
                raise PlanError(f"got backend {name!r}, expected some of {', '.join(known)}")
            reason = known[name].why_not_on(request.x.device)
            if reason is None:
                usable.add(name)
            elif any(f.backend == name and f.declaration.fits(kinds) for f in fusers):
                backend = Rejection((), name, "both", reason)
                self.rejected[backend, ""] = backend
        only = request.options.get("fusers")
        return [f for f in fusers if f.backend in usable and (only is None or f.name in only)]

    def _fused(self, fusers: tuple[Fuser, ...], direction: str) -> Iterator[Match]:
        program = self.program
        still = program.still[direction]
        crossed = [
            flag and not (direction == BACKWARD and passes(kind))
            for flag, kind in zip(still, program.kinds, strict=True)
        ]
        matcher, kinds = Matcher.of(fusers, direction), list(map(family, program.kinds))
        for start in range(program.count):
            for match in matcher.at(start, kinds, crossed):
                if direction == BACKWARD and not program.flows[match.stop]:
                    continue
                spent = "OPSGRAPH_FUEL is used up" if self._fuel == 0 else None
                reason = next(reasons(program, match, direction, still), spent)
                if reason is None:
                    self._fuel = self._fuel and self._fuel - 1
                    yield match
                else:
                    self.reject(match, direction, reason)

    def _references(self, direction: str) -> Iterator[Match]:
        program = self.program
        still = program.still[direction]
        for i, kind in enumerate(program.kinds):
            if not still[i] and (direction == FORWARD or program.flows[i + 1]):
                if direction == BACKWARD:
                    verify_backward(kind, program.run.labels[i])
                yield Match(reference(kind), {"op": i}, i, i + 1)

    def _add_private(self, claim: Claim) -> None:
        """Tell the program of the private values that a forward claim gives."""
        ops = {k: None if i is None else self.program.ops[i] for k, i in claim.positions.items()}
        for name, spec in claim.fuser.saved(ops, self.program.specs[claim.start]).items():
            self.program.values[claim.private(name)] = Value(PRIVATE, claim.start, spec)

    def reject(self, where: Match | Claim, direction: str, reason: str) -> None:
        """Record why a fuser is refused at a place."""
        ops = tuple(i for i in where.positions.values() if i is not None)
        name, backend = where.fuser.name, where.fuser.backend
        refused = Rejection(ops, name, direction, reason, backend=backend)
        self.rejected.setdefault((refused, backend), refused)

    # -- costs --

    def size(self, name: str) -> int:
        """Bytes per row of a value."""
        if name not in self._sizes:
            self._sizes[name] = self.program.spec(name).bytes_per_row
        return self._sizes[name]

    def moved(
        self, claim: Claim, gives: Iterable[str] = (), needs: Iterable[str] | None = None
    ) -> float:
        """Bytes per row that a claim reads and writes.

        gives: what it hands out besides its output. needs: what it reads, where it is made again.
        """
        program = self.program
        total = sum(map(self.size, claim.needs if needs is None else needs))
        if claim.direction == FORWARD:
            written = {program.x[claim.stop], *gives}
            return total + sum(map(self.size, written))
        ends = (claim.stop, claim.start) if program.flows[claim.start] else (claim.stop,)
        return total + sum(program.specs[gap].bytes_per_row for gap in ends)

    # -- making again --

    def makers(self, name: str, gemms: bool) -> list[Claim]:
        """Forward claims that could make a value again. gemms: also by a matrix product."""
        kinds, value, claims = self.program.kinds, self.program.values[name], list[Claim]()
        if value.kind == GAP:
            claims = self.ending[FORWARD][value.place]
        elif value.kind == SAVED:
            claims = [c for c in self.starting[FORWARD][value.place] if name in c.gives]
        return [c for c in claims if gemms or not any(kinds[i].gemm for i in c.ops)]

    def remakes(self, claim: Claim) -> Iterator[tuple[Call, tuple[str, ...]]]:
        """The calls that repeat a forward claim, each with the values that it needs."""
        if (again := claim.again) is not None:
            yield again, tuple(a.text for a in again.arguments if a.category == "value")
        if not any(self.program.kinds[i].random for i in claim.ops):
            yield claim.calls[0], claim.needs

    # -- compatibility --

    def hides(self, claim: Claim, name: str) -> bool:
        """Whether a forward claim spans a value and cannot hand it out."""
        value = self.program.values[name]
        if value.kind == INPUT or name in claim.gives:
            return False
        if value.kind == GAP:
            return claim.start < value.place < claim.stop and name != self.program.x[claim.stop]
        return claim.start <= value.place < claim.stop

    def partners(self, claim: Claim) -> list[Claim] | None:
        """The forward claims that give a backward one its private needs; None if it has none."""
        if not any(claim.private(n) in claim.needs for n in claim.fuser.declaration.private):
            return None
        return [
            other
            for other in self.starting[FORWARD][claim.start]
            if other.fuser is claim.fuser and other.positions == claim.positions
        ]

    def admitted(self, claim: Claim) -> bool:
        """Whether a backward claim with private needs has its own forward, which gives them."""
        partners = self.partners(claim)
        if partners is None:
            return True
        wanted = {*claim.needs, *self.program.teed}
        return any(not any(self.hides(other, name) for name in wanted) for other in partners)
