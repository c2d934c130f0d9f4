"""The planner `optimal` without measured times: a cover of the least cost, by a shortest path.

Its nodes are pairs (last forward claim, last backward claim): whichever pass is behind advances,
and an edge exists only if the two claims are compatible. No bytes outweigh an op that a fuser of a
lower priority takes.
"""

import itertools
from functools import cache
from heapq import heappop, heappush
from math import inf
from operator import itemgetter
from typing import NamedTuple

from ..op import BACKWARD, FORWARD
from ..plan.claims import Claim, Space
from ..plan.planner import Cover, greedy, qualifying
from ..plan.recompute import SAVED, Keeper

LEVEL = 1e9
"""Bytes per row that an op is worth which a fuser of the next higher priority takes."""


def shortest(space: Space) -> Cover:
    """The least total cost found by a shortest path; never costlier than `greedy`.

    Where priorities differ, of the covers with most ops of a high one.
    """
    first = greedy(space)
    backward = _pair_path(space)
    keeper = Keeper(space).settle(need for claim in backward for need in claim.needs)
    second = Cover(_forward_path(space, keeper.live), backward, keeper)
    costs = [weighted(space, cover) for cover in (first, second)]
    ranked = (_lowered(first), costs[0], first), (_lowered(second), costs[1], second)
    _, cost, best = min(ranked, key=itemgetter(0, 1))
    _forget_taken(space, best)
    return best._replace(costs={"greedy": costs[0], "optimal": cost})


def _forget_taken(space: Space, cover: Cover) -> None:
    """A claim that was refused on the way and taken in the end is no refusal."""
    steps = (*cover.forward, *cover.backward)
    taken = {(c.ops, c.fuser.name, c.direction, c.fuser.backend) for c in steps}
    for key, refused in [*space.rejected.items()]:
        if (*refused[:3], refused.backend) in taken:
            del space.rejected[key]


def weighted(space: Space, cover: Cover) -> float:
    """Weighted bytes per row of a cover."""
    handed = cover.keeper.live
    cost = cover.keeper.cost + sum(map(space.moved, cover.backward))
    return cost + sum(space.moved(claim, handed & claim.gives) for claim in cover.forward)


def _lowered(cover: Cover) -> int:
    """How many levels below the highest its ops are, in sum."""
    return sum(claim.level * len(claim.ops) for claim in (*cover.forward, *cover.backward))


def _weight(claim: Claim, moved: float) -> float:
    """What a claim that moves `moved` bytes per row adds to a path's length."""
    return moved + 1e-3 * claim.rank + LEVEL * claim.level * len(claim.ops)


def _forward_path(space: Space, live: set[str]) -> list[Claim]:
    """The cheapest forward under a given set of live values."""
    count, qualifies = space.program.count, qualifying(space, live)
    costs = [0.0] + [inf] * count
    last: list[Claim | None] = [None] * (count + 1)
    for gap in range(count):
        if space.program.still[FORWARD][gap] and costs[gap] < costs[gap + 1]:
            costs[gap + 1], last[gap + 1] = costs[gap], None
        for claim in space.starting[FORWARD][gap]:
            if not qualifies(claim):
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
            keeper = Keeper(space).settle(["x0", name])
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
        if program.still[direction][gap] or (direction == BACKWARD and not program.flows[gap + 1]):
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
