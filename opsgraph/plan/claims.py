"""Claims: every place where a fuser, or an op itself, could run; what it needs, gives and costs."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..backend import backends
from ..errors import PlanError
from ..fuser import (
    Fuser,
    Match,
    Matcher,
    Reference,
    alternatives,
    reference,
    registered,
    vocabulary,
)
from ..op import BACKWARD, FORWARD, Spec, arguments
from ..op.functions import function, passes, verify_backward
from .cached import cached_property
from .names import root, variable
from .program import Argument, Program
from .rejection import Rejection


class Call(NamedTuple):
    """A function of a claim with its arguments found: `results` follow y or dx, in order."""

    function: str
    arguments: tuple[Argument, ...]
    wants: bool
    results: tuple[str | None, ...]


@dataclass(frozen=True, eq=False)
class Claim:
    """A fuser at a place, for one pass."""

    fuser: Fuser
    direction: str
    positions: dict[str, int | None]
    start: int
    stop: int
    rank: int
    calls: tuple[Call, ...]
    needs: tuple[str, ...]
    """Values it reads, its input included: names of x's, saved values and extra inputs."""
    gives: frozenset[str]
    """Values it can hand out, its output apart."""
    private: dict[str, Spec]
    numbers: tuple[str, ...]
    """What plans call the ops that it covers."""

    @cached_property
    def where(self) -> str:
        """Those as text: `3` or `3-5`."""
        return "-".join(dict.fromkeys((self.numbers[0], self.numbers[-1])))

    @cached_property
    def ops(self) -> tuple[int, ...]:
        """The positions that it covers, dropped ops left out."""
        return tuple(i for i in self.positions.values() if i is not None)

    @property
    def is_reference(self) -> bool:
        """Whether it is an op's own function."""
        return isinstance(self.fuser, Reference)


class Space:
    """All claims there are for a program, and what they cost."""

    def __init__(self, program: Program, order: tuple[str, ...], fuel: int | None = None) -> None:
        self.program, self.order = program, order
        self.rejected: list[Rejection] = []
        self.privates: dict[str, Spec] = {}
        self._private_places: dict[str, int] = {}
        self._private_names: dict[tuple[str, int, tuple[Any, ...]], str] = {}
        self.roots = set(program.run.name.roots)
        """Roots of all variables, see `names`."""
        self._sizes: dict[str, int] = {}
        self._fuel = fuel
        self.starting: dict[str, list[list[Claim]]] = {}
        self.ending: dict[str, list[list[Claim]]] = {}
        fusers = self._usable()
        for direction in (BACKWARD, FORWARD):
            claims = [*self._fused(fusers, direction), *self._references(direction)]
            starting: list[list[Claim]] = [[] for _ in range(program.count + 1)]
            ending: list[list[Claim]] = [[] for _ in range(program.count + 1)]
            for claim in claims:
                starting[claim.start].append(claim)
                ending[claim.stop].append(claim)
            self.starting[direction], self.ending[direction] = starting, ending

    # -- building claims --

    def _usable(self) -> list[Fuser]:
        device, there = self.program.request.x.device, []
        # Without a recipe a refusal of what is for recipes would say nothing.
        recipe = bool(self.program.run.quantizers)
        fusers = [f for f in registered() if recipe or not f.quantized]
        known = backends()
        for name in self.order:
            if name not in known:
                raise PlanError(f"got backend {name!r}, expected some of {', '.join(known)}")
            reason = known[name].why_not_on(device)
            if reason is None:
                there.append(name)
            elif self._serves(name, fusers):
                self.rejected.append(Rejection((), name, "both", reason))
        only = self.program.request.options.get("fusers")
        return [f for f in fusers if f.backend in there and (only is None or f.name in only)]

    def _serves(self, backend: str, fusers: list[Fuser]) -> bool:
        """Whether a backend has a fuser for ops that are here: its absence is then worth a line."""
        kinds = {None, *self.program.kinds}
        return any(
            not any(kinds.isdisjoint(alternatives(entry)) for entry in fuser.pattern.values())
            for fuser in fusers
            if fuser.backend == backend
        )

    def _fused(self, fusers: list[Fuser], direction: str) -> Iterator[Claim]:
        program = self.program
        still = program.still(direction)
        crossed = [
            flag and not (direction == BACKWARD and passes(kind))
            for flag, kind in zip(still, program.kinds, strict=True)
        ]
        matcher = Matcher.of(tuple(fusers), direction)
        for start in range(program.count):
            for match in matcher.at(start, program.kinds, crossed):
                if direction == BACKWARD and not program.flows[match.stop]:
                    continue
                reason = self._refusal(match, direction)
                if reason is None and self._fuel == 0:
                    reason = "OPSGRAPH_FUEL is used up"
                if reason is not None:
                    ops = tuple(i for i in match.positions.values() if i is not None)
                    self.reject(ops, match.fuser, direction, reason)
                    continue
                if self._fuel:
                    self._fuel -= 1
                yield self._claim(match, direction)

    def _references(self, direction: str) -> Iterator[Claim]:
        program = self.program
        still = program.still(direction)
        for i, kind in enumerate(program.kinds):
            if not still[i] and (direction == FORWARD or program.flows[i + 1]):
                if direction == BACKWARD:
                    verify_backward(kind, program.run.labels[i])
                yield self._claim(Match(reference(kind), {"op": i}, i, i + 1), direction)

    def reject(self, ops: tuple[int, ...], fuser: Fuser, direction: str, reason: str) -> None:
        """Record a refusal once."""
        rejection = Rejection(ops, fuser.name, direction, reason, backend=fuser.backend)
        if (rejection, fuser.backend) not in ((known, known.backend) for known in self.rejected):
            self.rejected.append(rejection)

    def _refusal(self, match: Match, direction: str) -> str | None:
        program, fuser = self.program, match.fuser
        still = program.still(direction)
        for i in match.positions.values():
            if i is not None and still[i] and program.kinds[i].training_matters:
                return f"{program.kinds[i].__name__} does nothing in this mode"
            if i is None:
                continue
            for dtype in program.promoted(i):
                if dtype != program.specs[i].dtype:
                    return f"{program.numbers[i]} adds {dtype} to {program.specs[i].dtype}"
            if not program.packed(i, "weight", direction):
                continue
            if not fuser.quantized:
                return "it takes plain values, and the recipe quantizes the linear's"
            if fuser.reject_formats and (reason := fuser.reject_formats(*program.storages(i))):
                return reason
        if direction == BACKWARD:
            for i in match.positions.values():
                if i is not None and passes(program.kinds[i]) and i != match.stop - 1:
                    return f"the gradient that leaves at {program.numbers[i]} is inside it"
        for argument in arguments(fuser.bwd) if direction == BACKWARD and fuser.bwd else ():
            key, name = fuser.split(argument)
            i = match.positions.get(key) if key else None
            if i is not None and name == "d" and i not in program.tapped:
                return f"no gradient arrives at the Tee {program.numbers[i]}"
        if fuser.quantized and not any(
            i is not None and program.packed(i, "weight", direction)
            for i in match.positions.values()
        ):
            return "it takes quantized values, and these are not"
        if fuser.reject is None:
            return None
        values = {key: None if i is None else program.ops[i] for key, i in match.positions.items()}
        x = program.specs[match.start]
        return fuser.reject(*(values.get(name, x) for name in arguments(fuser.reject)))

    def _claim(self, match: Match, direction: str) -> Claim:
        program, fuser = self.program, match.fuser
        calls = tuple(self._calls(match, direction))
        found = [a.text for call in calls for a in call.arguments if a.category == "value"]
        gives, private = set(), {}
        if direction == FORWARD:
            results = calls[0].results
            ops = {k: None if i is None else program.ops[i] for k, i in match.positions.items()}
            if any(fuser.split(name)[0] is None for name in fuser.saves):
                specs = fuser.saved(ops, program.specs[match.start])
                private = {self._private(match, name): spec for name, spec in specs.items()}
                self.privates.update(private)
                self._private_places.update(dict.fromkeys(private, match.start))
            gives = {name for name in results if name is not None}
            found.insert(0, program.x(match.start))
        return Claim(
            fuser, direction, match.positions, match.start, match.stop,
            self.order.index(fuser.backend) if fuser.backend in self.order else len(self.order),
            calls, tuple(dict.fromkeys(found)), frozenset(gives), private,
            tuple(program.numbers[i] for i in match.positions.values() if i is not None),
        )  # fmt: skip

    def _calls(self, match: Match, direction: str) -> Iterator[Call]:
        fuser, program = match.fuser, self.program
        if direction == FORWARD:
            results = tuple(self._result(match, name) for name in fuser.saves)
        else:
            results = tuple(
                name
                for i in match.positions.values()
                if i is not None and not passes(program.kinds[i])
                for name in program.gradient_names(i)
            )
        for name, made in fuser.functions(direction).items():
            if name == "wgrad" and not any(results):
                continue
            if name == "dgrad" and not program.flows[match.start]:
                continue
            names = arguments(made)
            own = ("self",) if isinstance(fuser, Reference) else ()
            moved = fuser.consumes if direction == BACKWARD else ()
            given = {n: self._argument(match, n, direction) for n in (*own, *names) if n != "want"}
            found = tuple(a._replace(moved=n in moved) for n, a in given.items())
            yield Call(name, found, "want" in names, results)

    def _result(self, match: Match, name: str) -> str | None:
        key, value = match.fuser.split(name)
        if key is None:
            return self._private(match, name)
        i = match.positions[key]
        return None if i is None else self.program.resolve(i, value).text

    def _private(self, place: Match | Claim, name: str) -> str:
        """The variable of a private saved name; no other fuser's, whatever that calls its own."""
        key = name, id(place.fuser), tuple(place.positions.items())
        if key not in self._private_names:
            text = variable(name, self.program.numbers[place.start], self.roots)
            self._private_names[key] = text
            self.roots.add(root(text))
        return self._private_names[key]

    def _argument(self, match: Match, name: str, direction: str = FORWARD) -> Argument:
        fuser, program = match.fuser, self.program
        own = isinstance(fuser, Reference)
        if not own:
            if name == "x":
                return Argument("value", program.x(match.start))
            if name == "y":
                return Argument("value", program.x(match.stop))
            if name == "dy":
                return Argument("gradient", "dx")
        key, value = fuser.split(name)
        if key is None:
            return Argument("value", self._private(match, name))
        i = match.positions[key]
        if i is None or (value and not own and value not in vocabulary(program.kinds[i])):
            return Argument("literal", "None")
        return program.resolve(i, value, direction)

    # -- costs --

    def spec(self, name: str) -> Spec:
        """The spec of any value, private ones included."""
        return self.privates[name] if name in self.privates else self.program.value_spec(name)

    def size(self, name: str) -> int:
        """Bytes per row of a value."""
        if name not in self._sizes:
            self._sizes[name] = self.spec(name).bytes_per_row
        return self._sizes[name]

    def place(self, name: str) -> int:
        """Where a value comes into being: a position, for an order of the values."""
        places = self.program.places
        return places[name] if name in places else self._private_places[name]

    def moved(self, claim: Claim, gives: Iterable[str] = ()) -> float:
        """Bytes per row that a claim reads and writes, `gives` being what it hands out as well."""
        program = self.program
        total = sum(map(self.size, claim.needs))
        if claim.direction == FORWARD:
            written = {program.x(claim.stop), *gives}
            return total + sum(map(self.size, written))
        total += program.specs[claim.stop].bytes_per_row
        return total + (
            program.specs[claim.start].bytes_per_row if program.flows[claim.start] else 0
        )

    def read(self, needs: Iterable[str], claim: Claim) -> float:
        """Bytes per row of reading some values and writing a claim's output."""
        return sum(map(self.size, needs)) + self.program.specs[claim.stop].bytes_per_row

    def keeping(self, name: str) -> float:
        """Bytes per row of keeping a value, as a planner weighs them against making it again.

        A quantized value counts as the plain one, and half of itself for its own traffic: that a
        recipe is active then changes nothing in what is made again.
        """
        spec = self.spec(name)
        return (
            self.size(name) / 2 + spec.stored(None).bytes_per_row
            if spec.storage
            else self.size(name)
        )

    # -- making again --

    def makers(self, name: str, gemms: bool = False) -> Iterator[Claim]:
        """Forward claims that could make a value once more."""
        program = self.program
        if name == "x0" or name in program.inputs or name in self.privates:
            return
        place = self.place(name)
        if name in program.gaps:
            claims = self.ending[FORWARD][place]
        else:
            claims = [c for c in self.starting[FORWARD][place] if name in c.gives]
        for claim in claims:
            if gemms or not any(program.kinds[i].gemm for i in claim.ops):
                yield claim

    def remakes(self, claim: Claim) -> Iterator[tuple[Call, tuple[str, ...]]]:
        """The calls that repeat a forward claim, each with the values that it needs."""
        kinds = [self.program.kinds[i] for i in claim.ops]
        again = function(kinds[0], "again") if claim.is_reference else None
        if again is not None:
            names = ("self", *arguments(again))
            match = Match(claim.fuser, claim.positions, claim.start, claim.stop)
            found = tuple(self._argument(match, name) for name in names)
            needs = tuple(a.text for a in found if a.category == "value")
            yield Call("again", found, False, ()), needs
        if not any(kind.random for kind in kinds):
            yield claim.calls[0], claim.needs

    # -- compatibility --

    def hides(self, claim: Claim, name: str) -> bool:
        """Whether a forward claim spans a value and cannot hand it out."""
        if name in claim.gives or name == "x0" or name in self.program.inputs:
            return False
        place = self.place(name)
        if name in self.program.gaps:
            return claim.start < place < claim.stop and name != self.program.x(claim.stop)
        return claim.start <= place < claim.stop

    def teed(self) -> set[str]:
        """Values that later ops or the caller read, whatever the backward needs."""
        run = self.program.run
        found = {self.program.x(i) for i in (*run.sources.values(), *run.outputs)}
        return found.union(self.program.reports)

    def admitted(self, claim: Claim) -> bool:
        """Whether a backward claim with private needs has its own forward, which gives them."""
        private = [n for n in claim.needs if n in self.privates]
        own = {self._private(claim, n) for n in claim.fuser.saves if not claim.fuser.split(n)[0]}
        missing = own & set(claim.needs) - set(private)
        if missing:
            return False
        if not private:
            return True
        pairs = [
            f
            for f in self.starting[FORWARD][claim.start]
            if f.fuser is claim.fuser and f.positions == claim.positions
        ]
        wanted = {*claim.needs, *self.teed()}
        return any(not any(self.hides(f, name) for name in wanted) for f in pairs)
