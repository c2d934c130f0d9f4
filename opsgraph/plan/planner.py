"""Planning: cover a program with claims, backward and forward, at the least cost.

A claim is a fuser at a place. The backward's steps say which values the forward must keep (what
they need is live); a forward claim qualifies when it hands out every live value that it spans.
Planning is therefore a path: nodes are the gaps between ops, edges are claims, weights are costs
in bytes per row. `greedy` walks the backward first and takes at each gap the best claim by backend
order, then length. `optimal` is a shortest path over pairs (last forward claim, last backward
claim): whichever pass is behind advances, and an edge exists only if the two are compatible.

Claims of a higher priority come first: `greedy` walks once for each priority that fusers have and
leaves in place what it took before; for `optimal` no bytes outweigh an op of a lower priority.

`claims.py` says what claims there are, `recompute.py` which values are kept and which made again.
The planner knows no concrete op.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache, partial
from heapq import heappop, heappush
from math import inf
from typing import NamedTuple

from ..op import BACKWARD, FORWARD
from .claims import Claim, Space
from .recompute import SAVED, Keeper

LEVEL = 1e9
"""Bytes per row that an op is worth which a fuser of the next higher priority takes."""


class Cover(NamedTuple):
    """A choice of claims: forward in order, backward in order, and what is kept or made again."""

    forward: list[Claim]
    backward: list[Claim]
    keeper: Keeper
    cost: float
    costs: dict[str, float]


def _keeper(space: Space) -> Keeper:
    options = space.program.request.options
    checkpoint = bool(options.get("checkpoint"))
    saved = SAVED if options.get("recompute", True) else 0.0
    return Keeper(space, float("inf") if checkpoint else saved, gemms=checkpoint)


def _finish(space: Space, forward: list[Claim], backward: list[Claim], keeper: Keeper) -> Cover:
    cost = keeper.cost + sum(map(space.moved, backward))
    handed = keeper.kept | space.teed()
    cost += sum(space.moved(claim, handed & claim.gives) for claim in forward)
    return Cover(forward, backward, keeper, cost, {})


def _better(claim: Claim) -> tuple[int, int]:
    return claim.rank, -len(claim.ops)


def _live(space: Space, backward: list[Claim]) -> tuple[Keeper, set[str]]:
    keeper = _keeper(space).settle(need for claim in backward for need in claim.needs)
    return keeper, keeper.kept | space.teed()


def _qualifies(space: Space, claim: Claim, live: set[str]) -> bool:
    hidden = sorted(name for name in live if space.hides(claim, name))
    if hidden:
        space.reject(claim.ops, claim.fuser, FORWARD, f"backward needs {', '.join(hidden)}")
    return not hidden


def greedy(space: Space) -> Cover:
    """The backward first, then the forward; at each gap the best by backend order, then length."""
    backward = _walk(space, BACKWARD, partial(filter, space.admitted))
    keeper, live = _live(space, backward)
    local = _by_place(space, live)

    def qualifying(claims: Iterable[Claim]) -> Iterator[Claim]:
        """All are looked at, so that all refusals are known."""
        return iter([claim for claim in claims if _qualifies(space, claim, local(claim))])

    first = {other for claim in backward for other in space.partners(claim) or ()}
    forward = _walk(space, FORWARD, qualifying, first)
    return _finish(space, forward, backward, keeper)


def _walk(
    space: Space, direction: str, usable: Callable[[Iterable[Claim]], Iterator[Claim]],
    first: Collection[Claim] = (),
) -> list[Claim]:  # fmt: skip
    """The claims of a pass, in its order: for each level a walk over what earlier ones left free.

    usable: of claims at one gap, the best first, those that may be taken. first: claims before all
    others, for they alone give a private value that the backward needs.
    """
    count, flows = space.program.count, space.program.flows
    forward = direction == FORWARD
    beginning = (space.starting if forward else space.ending)[direction]
    taken: dict[int, Claim] = {}
    free = [True] * count
    for level in range(-1 if first else 0, space.lowest + 1):
        gap, end = (0, count) if forward else (count, 0)
        while gap != end and (forward or flows[gap]):
            best = taken.get(gap)
            if best is None:
                here = [c for c in beginning[gap] if (-1 if c in first else c.level) == level]
                here.sort(key=_better)
                best = next((c for c in usable(here) if all(free[c.start : c.stop])), None)
            if best is None:
                gap += 1 if forward else -1
            else:
                taken[gap] = best
                free[best.start : best.stop] = [False] * (best.stop - best.start)
                gap = best.stop if forward else best.start
    return [taken[gap] for gap in sorted(taken, reverse=not forward)]


def _by_place(space: Space, live: set[str]) -> Callable[[Claim], set[str]]:
    """Live values by position, so that a claim is compared with those near it alone."""
    near: dict[int, set[str]] = {}
    for name in live:
        near.setdefault(space.place(name), set()).add(name)
    return lambda claim: {n for i in range(claim.start, claim.stop) for n in near.get(i, ())}


def optimal(space: Space) -> Cover:
    """The least total cost found by a shortest path; never costlier than `greedy`.

    Where priorities differ, of the covers with most ops of a high one.
    """
    first = greedy(space)
    backward = _pair_path(space)
    keeper, live = _live(space, backward)
    forward = _forward_path(space, live)
    second = _finish(space, forward, backward, keeper)
    best = min(first, second, key=lambda cover: (_lowered(cover), cover.cost))
    return best._replace(costs={"greedy": first.cost, "optimal": best.cost})


def _lowered(cover: Cover) -> int:
    """How many levels below the highest its ops are, in sum."""
    return sum(claim.level * len(claim.ops) for claim in (*cover.forward, *cover.backward))


def _weight(claim: Claim, moved: float) -> float:
    """What a claim that moves `moved` bytes per row adds to a path's length."""
    return moved + 1e-3 * claim.rank + LEVEL * claim.level * len(claim.ops)


def _forward_path(space: Space, live: set[str]) -> list[Claim]:
    """The cheapest forward under a given set of live values."""
    count, local = space.program.count, _by_place(space, live)
    costs = [0.0] + [inf] * count
    last: list[Claim | None] = [None] * (count + 1)
    for gap in range(count):
        if space.program.still(FORWARD)[gap] and costs[gap] < costs[gap + 1]:
            costs[gap + 1], last[gap + 1] = costs[gap], None
        for claim in space.starting[FORWARD][gap]:
            if not _qualifies(space, claim, local(claim)):
                continue
            cost = costs[gap] + _weight(claim, space.moved(claim, live & claim.gives))
            if cost < costs[claim.stop]:
                costs[claim.stop], last[claim.stop] = cost, claim
    chosen: list[Claim] = []
    gap = count
    while gap:
        best = last[gap]
        if best is not None:
            chosen.append(best)
        gap = gap - 1 if best is None else best.start
    return chosen[::-1]


class _Pair(NamedTuple):
    """How far both passes have come, and the last claim of each that may conflict with the next."""

    forward: int
    backward: int
    forward_claim: Claim | None
    backward_claim: Claim | None

    def after(self, direction: str, gap: int, claim: Claim | None) -> "_Pair":
        """The pair after a pass has come to a gap; a claim that is passed can conflict no more."""
        if direction == FORWARD:
            beside = self.backward_claim if self.backward > self.forward else None
            return _Pair(gap, self.backward, claim, beside)
        beside = self.forward_claim if self.forward > self.backward else None
        return _Pair(self.forward, gap, beside, claim)


def _pair_path(space: Space) -> list[Claim]:
    """The backward claims of the shortest path over pairs of last claims."""
    program, count = space.program, space.program.count
    estimate: dict[str, tuple[float, frozenset[str]]] = {}

    def keeping(name: str) -> tuple[float, frozenset[str]]:
        if name not in estimate:
            keeper = _keeper(space).settle(["x0", name])
            free = 0.0 if name == "x0" else SAVED * space.size("x0")
            estimate[name] = keeper.cost - free, frozenset(keeper.kept)
        return estimate[name]

    @cache
    def compatible(forward: Claim | None, backward: Claim | None) -> bool:
        if forward is None or backward is None:
            return True
        needs = {k for name in backward.needs for k in keeping(name)[1]}
        return not any(space.hides(forward, name) for name in needs)

    @cache
    def advance(gap: int, direction: str) -> list[tuple[Claim | None, int, float]]:
        steps: list[tuple[Claim | None, int, float]] = []
        if program.still(direction)[gap] or (direction == BACKWARD and not program.flows[gap + 1]):
            steps.append((None, gap + 1, 0.0))
        for claim in space.starting[direction][gap]:
            if direction == BACKWARD and not space.admitted(claim):
                continue
            cost = _weight(claim, space.moved(claim))
            if direction == BACKWARD:
                cost += sum(keeping(name)[0] for name in claim.needs)
            steps.append((claim, claim.stop, cost))
        return steps

    start, serial = _Pair(0, 0, None, None), itertools.count(1)
    costs, previous, queue = {start: 0.0}, dict[_Pair, _Pair](), [(0.0, 0, start)]
    while queue:
        total, _, pair = heappop(queue)
        if pair.forward == pair.backward == count:
            break
        behind = FORWARD if pair.forward <= pair.backward else BACKWARD
        for claim, gap, cost in advance(min(pair[:2]), behind):
            after = pair.after(behind, gap, claim)
            if total + cost < costs.get(after, inf) and compatible(*after[2:]):
                costs[after], previous[after] = total + cost, pair
                heappush(queue, (total + cost, next(serial), after))
    chosen: dict[Claim, None] = {}
    while pair in previous:
        if pair.backward_claim is not None:
            chosen[pair.backward_claim] = None
        pair = previous[pair]
    return list(chosen)


PLANNERS = {"greedy": greedy, "optimal": optimal}
