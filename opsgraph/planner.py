"""Planning: cover a program with claims, backward and forward, at the least cost.

A claim is a fuser at a place. The backward's steps say which values the forward must keep (what
they need is live); a forward claim qualifies when it hands out every live value that it spans.
Planning is therefore a path: nodes are the gaps between ops, edges are claims, weights are costs
in bytes per row. `greedy` walks the backward first and takes at each gap the best claim by backend
order, then length. `optimal` is a shortest path over pairs (last forward claim, last backward
claim): whichever pass is behind advances, and an edge exists only if the two are compatible.

What a GEMM-free forward claim makes may be made again in the backward when that moves fewer bytes
than `SAVED` times those that keeping it costs (`Keeper`). The planner knows no concrete op.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from .backend import backends
from .errors import PlanError
from .fuser import Fuser, Match, Matcher, Reference, registered
from .op import BACKWARD, FORWARD, arguments, differentiable
from .program import Argument, Program
from .spec import Spec

SAVED = 4.0
"""What a byte saved for the backward costs, in bytes moved."""
DEPTH = 64
"""The longest chain of values that are made again one from another just for the last."""


class Rejection(NamedTuple):
    """Why a fuser that fits somewhere is not used there."""

    ops: tuple[int, ...]
    name: str
    direction: str
    reason: str


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

    @property
    def ops(self) -> tuple[int, ...]:
        """The positions that it covers, dropped ops left out."""
        return tuple(i for i in self.positions.values() if i is not None)

    @property
    def is_reference(self) -> bool:
        """Whether it is an op's own function."""
        return isinstance(self.fuser, Reference)


class Keeper:
    """Decides for every value that the backward needs whether to keep it or to make it again."""

    def __init__(self, space: "Space", saved: float = SAVED, gemms: bool = False) -> None:
        self.space, self.saved, self.gemms = space, saved, gemms
        self.kept: set[str] = set()
        self.again: dict[str, Claim] = {}
        self._memo: dict[str, tuple[float, Claim | None]] = {}

    def settle(self, needs: Iterable[str]) -> "Keeper":
        """Decide for all these values, the earliest first, so that later ones find them live."""
        for name in sorted(set(needs), key=self.space.place):
            self._settle(name)
        return self

    def _settle(self, name: str) -> None:
        if name in self.kept or name in self.again:
            return
        claim = self._best(name)[1]
        if claim is None:
            self.kept.add(name)
        else:
            for need in self.space.remake(claim)[1]:
                self._settle(need)
            self.again[name] = claim
        self._memo.clear()

    def _best(self, name: str, depth: int = 0) -> tuple[float, Claim | None]:
        """The least cost of having a value in the backward, and the claim that makes it again."""
        if name in self.kept or name in self.again:
            return 0.0, None
        if name not in self._memo:
            self._memo[name] = self._compare(name, depth)
        return self._memo[name]

    def _compare(self, name: str, depth: int) -> tuple[float, Claim | None]:
        space = self.space
        keep = self.saved * size if (size := space.size(name)) else 0.0
        best: tuple[float, int, Claim | None] = (keep, -1, None)
        if keep and depth < DEPTH:
            for claim in space.makers(name, self.gemms):
                call, needs = space.remake(claim)
                if call is None:
                    continue
                cost = space.moved(claim, (name,))
                cost += sum(self._best(need, depth + 1)[0] for need in needs)
                if (cost, claim.rank) < best[:2]:
                    best = (cost, claim.rank, claim)
        return best[0], best[2]


class Space:
    """All claims there are for a program, and what they cost."""

    def __init__(self, program: Program, order: tuple[str, ...], fuel: int | None = None) -> None:
        self.program, self.order = program, order
        self.rejected: list[Rejection] = []
        self.privates: dict[str, Spec] = {}
        self._private_places: dict[str, int] = {}
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
        known = backends()
        for name in self.order:
            if name not in known:
                raise PlanError(f"got backend {name!r}, expected some of {', '.join(known)}")
            reason = known[name].why_not_on(device)
            if reason is None:
                there.append(name)
            else:
                self.rejected.append(Rejection((), name, "both", reason))
        only = self.program.request.options.get("fusers")
        return [f for f in registered() if f.backend in there and (only is None or f.name in only)]

    def _fused(self, fusers: list[Fuser], direction: str) -> Iterator[Claim]:
        program = self.program
        still = program.still_forward if direction == FORWARD else program.still_backward
        crossed = [
            flag and not (direction == BACKWARD and kind.passes)
            for flag, kind in zip(still, program.kinds, strict=True)
        ]
        matcher = Matcher(fusers, direction)
        for start in range(program.count):
            for match in matcher.at(start, program.kinds, crossed):
                if direction == BACKWARD and not program.flows[match.stop]:
                    continue
                reason = self._refusal(match, direction)
                if reason is None and self._fuel == 0:
                    reason = "OPSGRAPH_FUEL is used up"
                if reason is not None:
                    ops = tuple(i for i in match.positions.values() if i is not None)
                    self.reject(ops, match.fuser.name, direction, reason)
                    continue
                if self._fuel:
                    self._fuel -= 1
                yield self._claim(match, direction)

    def _references(self, direction: str) -> Iterator[Claim]:
        program = self.program
        still = program.still_forward if direction == FORWARD else program.still_backward
        for i, kind in enumerate(program.kinds):
            if not still[i] and (direction == FORWARD or program.flows[i + 1]):
                yield self._claim(Match(Reference(kind), {"op": i}, i, i + 1), direction)

    def reject(self, ops: tuple[int, ...], name: str, direction: str, reason: str) -> None:
        """Record a refusal once."""
        rejection = Rejection(ops, name, direction, reason)
        if rejection not in self.rejected:
            self.rejected.append(rejection)

    def _refusal(self, match: Match, direction: str) -> str | None:
        program, fuser = self.program, match.fuser
        if direction == BACKWARD:
            for i in match.positions.values():
                if i is not None and program.kinds[i].passes and i != match.stop - 1:
                    return f"the gradient that leaves at {i} is inside it"
        for argument in arguments(fuser.bwd) if direction == BACKWARD and fuser.bwd else ():
            key, name = fuser.split(argument)
            i = match.positions.get(key) if key else None
            if i is not None and name == "d" and i not in program.tapped:
                return f"no gradient arrives at the Tee {i}"
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
                private = {f"{name}{match.start}": spec for name, spec in specs.items()}
                self.privates.update(private)
                self._private_places.update(dict.fromkeys(private, match.start))
            gives = {name for name in results if name is not None}
            found.insert(0, program.x(match.start))
        return Claim(
            fuser, direction, match.positions, match.start, match.stop,
            self.order.index(fuser.backend) if fuser.backend in self.order else len(self.order),
            calls, tuple(dict.fromkeys(found)), frozenset(gives), private,
        )  # fmt: skip

    def _calls(self, match: Match, direction: str) -> Iterator[Call]:
        fuser, program = match.fuser, self.program
        if direction == FORWARD:
            results = tuple(self._result(match, name) for name in fuser.saves)
        else:
            results = tuple(
                name
                for i in match.positions.values()
                if i is not None and not program.kinds[i].passes
                for name in program.gradient_names(i)
            )
        for name, function in fuser.functions(direction).items():
            if name == "wgrad" and not any(results):
                continue
            if name == "dgrad" and not program.flows[match.start]:
                continue
            names = arguments(function)
            own = ("self",) if isinstance(fuser, Reference) else ()
            found = tuple(self._argument(match, n) for n in (*own, *names) if n != "want")
            yield Call(name, found, "want" in names, results)

    def _result(self, match: Match, name: str) -> str | None:
        key, value = match.fuser.split(name)
        if key is None:
            return f"{name}{match.start}"
        i = match.positions[key]
        return None if i is None else self.program.resolve(i, value).text

    def _argument(self, match: Match, name: str) -> Argument:
        fuser, program = match.fuser, self.program
        if not isinstance(fuser, Reference):
            if name == "x":
                return Argument("value", program.x(match.start))
            if name == "y":
                return Argument("value", program.x(match.stop))
            if name == "dy":
                return Argument("gradient", "dx")
        key, value = fuser.split(name)
        if key is None:
            return Argument("value", f"{name}{match.start}")
        i = match.positions[key]
        if i is None or (value and not self._has(i, value)):
            return Argument("literal", "None")
        return program.resolve(i, value)

    def _has(self, i: int, name: str) -> bool:
        kind = self.program.kinds[i]
        known = {"x", "y", "dy", "d", *kind.saves, *kind.constants, *differentiable(kind)}
        return name in known

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

    # -- making again --

    def makers(self, name: str, gemms: bool = False) -> Iterator[Claim]:
        """Forward claims that could make a value once more."""
        program = self.program
        if name == "x0" or name in program.inputs or name in self.privates:
            return
        place = self.place(name)
        if name.startswith("x") and name == f"x{place}":
            claims = self.ending[FORWARD][place]
        else:
            claims = [c for c in self.starting[FORWARD][place] if name in c.gives]
        for claim in claims:
            if gemms or not any(program.kinds[i].gemm for i in claim.ops):
                yield claim

    def remake(self, claim: Claim) -> tuple[Call | None, tuple[str, ...]]:
        """The call that repeats a forward claim and the values it needs; None if none can."""
        kinds = [self.program.kinds[i] for i in claim.ops]
        function = kinds[0].again if claim.is_reference else None
        if function is None:
            repeatable = not any(kind.random for kind in kinds)
            return (claim.calls[0], claim.needs) if repeatable else (None, ())
        names = ("self", *arguments(function))
        match = Match(claim.fuser, claim.positions, claim.start, claim.stop)
        found = tuple(self._argument(match, name) for name in names)
        needs = tuple(a.text for a in found if a.category == "value")
        return Call("again", found, False, ()), needs

    # -- compatibility --

    def hides(self, claim: Claim, name: str) -> bool:
        """Whether a forward claim spans a value and cannot hand it out."""
        if name in claim.gives or name == "x0" or name in self.program.inputs:
            return False
        place = self.place(name)
        if name == f"x{place}":
            return claim.start < place < claim.stop and name != self.program.x(claim.stop)
        return claim.start <= place < claim.stop

    def teed(self) -> set[str]:
        """Values that later ops or the caller read, whatever the backward needs."""
        run = self.program.run
        return {self.program.x(i) for i in (*run.sources.values(), *run.outputs)}

    def admitted(self, claim: Claim) -> bool:
        """Whether a backward claim with private needs has its own forward, which gives them."""
        private = [n for n in claim.needs if n in self.privates]
        own = {f"{n}{claim.start}" for n in claim.fuser.saves if claim.fuser.split(n)[0] is None}
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
        return any(not any(self.hides(f, need) for need in claim.needs) for f in pairs)


class Cover(NamedTuple):
    """A choice of claims: forward in order, backward in order, and what is kept or made again."""

    forward: list[Claim]
    backward: list[Claim]
    keeper: Keeper
    cost: float
    costs: dict[str, float]


def _keeper(space: Space) -> Keeper:
    checkpoint = bool(space.program.request.options.get("checkpoint"))
    return Keeper(space, float("inf") if checkpoint else SAVED, gemms=checkpoint)


def _finish(space: Space, forward: list[Claim], backward: list[Claim], keeper: Keeper) -> Cover:
    kept = keeper.kept
    cost = SAVED * sum(map(space.size, kept)) + sum(map(space.moved, backward))
    cost += sum(space.moved(claim, kept & claim.gives) for claim in forward)
    cost += sum(space.moved(claim, (name,)) for name, claim in keeper.again.items())
    return Cover(forward, backward, keeper, cost, {})


def _better(claim: Claim) -> tuple[int, int]:
    return claim.rank, -len(claim.ops)


def _greedy_backward(space: Space) -> list[Claim]:
    chosen: list[Claim] = []
    gap = space.program.count
    while gap and space.program.flows[gap]:
        found = [c for c in space.ending[BACKWARD][gap] if space.admitted(c)]
        if not found:
            gap -= 1
            continue
        chosen.append(min(found, key=_better))
        gap = chosen[-1].start
    return chosen


def _live(space: Space, backward: list[Claim]) -> tuple[Keeper, set[str]]:
    keeper = _keeper(space).settle(need for claim in backward for need in claim.needs)
    return keeper, keeper.kept | space.teed()


def _qualifies(space: Space, claim: Claim, live: set[str]) -> bool:
    hidden = sorted(name for name in live if space.hides(claim, name))
    if hidden:
        space.reject(claim.ops, claim.fuser.name, FORWARD, f"backward needs {', '.join(hidden)}")
    return not hidden


def greedy(space: Space) -> Cover:
    """The backward first, then the forward; at each gap the best by backend order, then length."""
    backward = _greedy_backward(space)
    keeper, live = _live(space, backward)
    local = _by_place(space, live)
    forward: list[Claim] = []
    gap = 0
    while gap < space.program.count:
        found = [c for c in space.starting[FORWARD][gap] if _qualifies(space, c, local(c))]
        if not found:
            gap += 1
            continue
        forward.append(min(found, key=_better))
        gap = forward[-1].stop
    return _finish(space, forward, backward, keeper)


def _by_place(space: Space, live: set[str]):  # type: ignore[no-untyped-def]
    """Live values by position, so that a claim is compared with those near it alone."""
    near: dict[int, set[str]] = {}
    for name in live:
        near.setdefault(space.place(name), set()).add(name)
    return lambda claim: {n for i in range(claim.start, claim.stop) for n in near.get(i, ())}


def optimal(space: Space) -> Cover:
    """The least total cost found by a shortest path; never costlier than `greedy`."""
    first = greedy(space)
    backward = _pair_path(space)
    keeper, live = _live(space, backward)
    forward = _forward_path(space, keeper, live)
    second = _finish(space, forward, backward, keeper)
    best = second if second.cost < first.cost else first
    return best._replace(costs={"greedy": first.cost, "optimal": best.cost})


def _forward_path(space: Space, keeper: Keeper, live: set[str]) -> list[Claim]:
    """The cheapest forward under a given set of live values."""
    import networkx as nx  # here: it takes longer to import than all of opsgraph

    graph, count, local = nx.DiGraph(), space.program.count, _by_place(space, live)
    for gap in range(count):
        if space.program.still_forward[gap]:
            graph.add_edge(gap, gap + 1, weight=0.0, claim=None)
        for claim in space.starting[FORWARD][gap]:
            if not _qualifies(space, claim, local(claim)):
                continue
            weight = space.moved(claim, keeper.kept & claim.gives) + 1e-3 * claim.rank
            known = graph.get_edge_data(gap, claim.stop)
            if known is None or weight < known["weight"]:
                graph.add_edge(gap, claim.stop, weight=weight, claim=claim)
    path = nx.shortest_path(graph, 0, count, weight="weight") if count else []
    edges = (graph.edges[edge]["claim"] for edge in pairwise(path))
    return [claim for claim in edges if claim is not None]


def _pair_path(space: Space) -> list[Claim]:
    """The backward claims of the shortest path over pairs of last claims."""
    import networkx as nx

    program, count = space.program, space.program.count
    estimate: dict[str, tuple[float, frozenset[str]]] = {}

    def keeping(name: str) -> tuple[float, frozenset[str]]:
        if name not in estimate:
            keeper = _keeper(space).settle(["x0", name])
            cost = sum(SAVED * space.size(n) for n in keeper.kept if n != "x0")
            cost += sum(space.moved(c, (n,)) for n, c in keeper.again.items())
            estimate[name] = cost, frozenset(keeper.kept)
        return estimate[name]

    def compatible(forward: Claim | None, backward: Claim | None) -> bool:
        if forward is None or backward is None:
            return True
        needs = {k for name in backward.needs for k in keeping(name)[1]}
        return not any(space.hides(forward, name) for name in needs)

    def advance(gap: int, direction: str) -> Iterator[tuple[Claim | None, int, float]]:
        still = program.still_forward if direction == FORWARD else program.still_backward
        if still[gap] or (direction == BACKWARD and not program.flows[gap + 1]):
            yield None, gap + 1, 0.0
        for claim in space.starting[direction][gap]:
            cost = space.moved(claim) + 1e-3 * claim.rank
            if direction == BACKWARD:
                if not space.admitted(claim):
                    continue
                cost += sum(keeping(name)[0] for name in claim.needs)
            yield claim, claim.stop, cost

    start: tuple[int, int, Claim | None, Claim | None] = (0, 0, None, None)
    graph, frontier, seen = nx.DiGraph(), [start], {start}
    graph.add_node(start)
    goals = []
    while frontier:
        node = frontier.pop()
        f_gap, b_gap, f_claim, b_claim = node
        if f_gap == b_gap == count:
            goals.append(node)
            continue
        behind = FORWARD if f_gap <= b_gap else BACKWARD
        for claim, gap, cost in advance(min(f_gap, b_gap), behind):
            after: tuple[int, int, Claim | None, Claim | None]
            if behind == FORWARD:
                after = (gap, b_gap, claim, b_claim if b_gap > f_gap else None)
            else:
                after = (f_gap, gap, f_claim if f_gap > b_gap else None, claim)
            if not compatible(after[2], after[3]):
                continue
            graph.add_edge(node, after, weight=cost)
            if after not in seen:
                seen.add(after)
                frontier.append(after)
    lengths, paths = nx.single_source_dijkstra(graph, start, weight="weight")
    best = paths[min(goals, key=lengths.__getitem__)]
    chosen = dict.fromkeys(node[3] for node in best if node[3] is not None)
    return list(reversed(chosen))


PLANNERS = {"greedy": greedy, "optimal": optimal}
