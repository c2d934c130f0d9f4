"""Planning: cover a program with claims, backward and forward, at the least cost.

A claim is a fuser at a place. The backward's steps say which values the forward must keep (what
they need is live); a forward claim qualifies when it hands out every live value that it spans.
Planning is therefore a path: nodes are the gaps between ops, edges are claims, weights are costs
in bytes per row. `greedy` walks the backward first and takes at each gap the best claim by backend
order, then length. Claims of a higher priority come first: it walks once for each priority that
fusers have and leaves in place what it took before.

`claims.py` says what claims there are, `recompute.py` which values are kept and which made again.
The planner knows no concrete op.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

from ..op import BACKWARD, FORWARD
from .claims import Claim, Space
from .recompute import Keeper


class Cover(NamedTuple):
    """A choice of claims: forward in order, backward in order, and what is kept or made again."""

    forward: list[Claim]
    backward: list[Claim]
    keeper: Keeper
    costs: Mapping[str, float] = {}
    """Of what each planner would have chosen, where they were compared."""


Planner: TypeAlias = Callable[[Space], Cover]


def qualifying(space: Space, live: Iterable[str]) -> Callable[[Claim], bool]:
    """Tells whether a forward claim hands out all live values that it spans; records if not."""
    near: dict[int, set[str]] = {}  # by position, so that a claim is compared with those alone
    for name in live:
        near.setdefault(space.program.values[name].place, set()).add(name)

    def qualifies(claim: Claim) -> bool:
        local = {name for i in range(claim.start, claim.stop) for name in near.get(i, ())}
        hidden = sorted(name for name in local if space.hides(claim, name))
        if hidden:
            space.reject(claim, FORWARD, f"backward needs {', '.join(hidden)}")
        return not hidden

    return qualifies


def greedy(space: Space) -> Cover:
    """The backward first, then the forward; at each gap the best by backend order, then length."""
    backward = _walk(space, BACKWARD, partial(filter, space.admitted))
    keeper = Keeper(space).settle(need for claim in backward for need in claim.needs)
    qualifies = qualifying(space, keeper.live)
    first = {other for claim in backward for other in space.partners(claim) or ()}
    # All are looked at, so that all refusals are known.
    forward = _walk(space, FORWARD, lambda claims: iter([*filter(qualifies, claims)]), first)
    return Cover(forward, backward, keeper)


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
                here.sort(key=lambda claim: (claim.rank, -len(claim.ops)))
                best = next((c for c in usable(here) if all(free[c.start : c.stop])), None)
            if best is None:
                gap += 1 if forward else -1
            else:
                taken[gap] = best
                free[best.start : best.stop] = [False] * (best.stop - best.start)
                gap = best.stop if forward else best.start
    return [taken[gap] for gap in sorted(taken, reverse=not forward)]
