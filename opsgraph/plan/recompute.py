"""What the backward needs: kept by the forward, or made again.

What a GEMM-free forward claim makes may be made again in the backward when that moves fewer bytes
than `SAVED` times those that keeping it costs.
"""

from collections.abc import Iterable
from math import inf
from typing import NamedTuple

from .claims import Call, Claim, Space

SAVED = 4.0
"""What a byte saved for the backward costs, in bytes moved."""
DEPTH = 64
"""The longest chain of values that are made again one from another just for the last."""


class Remake(NamedTuple):
    """How a value is made again: the forward claim, the call that repeats it, what that needs."""

    claim: Claim
    call: Call
    needs: tuple[str, ...]
    moved: float


class Keeper:
    """Decides for every value that the backward needs whether to keep it or to make it again.

    With `checkpoint` nothing is kept but inputs and random values: a saved byte costs inf, and
    matrix products may be run again as well.
    """

    def __init__(self, space: Space) -> None:
        self.space, options = space, space.program.request.options
        self.gemms = bool(options.get("checkpoint"))
        self.saved = inf if self.gemms else SAVED if options.get("recompute", True) else 0.0
        self.kept: set[str] = set()
        self.again: dict[str, Remake] = {}
        self._memo: dict[str, tuple[float, Remake | None]] = {}

    def settle(self, needs: Iterable[str]) -> "Keeper":
        """Decide for all these values, the earliest first, so that later ones find them live."""
        values = self.space.program.values
        for name in sorted(set(needs), key=lambda name: (values[name].place, name)):
            self._settle(name)
        return self

    @property
    def live(self) -> set[str]:
        """What the forward has to hand out."""
        return self.kept | self.space.program.teed

    @property
    def cost(self) -> float:
        """Weighted bytes per row of keeping and making again."""
        kept = sum(map(self.space.size, self.kept))
        return SAVED * kept + sum(remake.moved for remake in self.again.values())

    def _settle(self, name: str) -> None:
        """Decide for a value, and first for what making it again needs: on a stack of its own."""
        waiting: list[tuple[str, Remake]] = []
        needs = [iter((name,))]
        while needs:
            need = next(needs[-1], None)
            if need is None:
                needs.pop()
                if waiting:
                    value, remake = waiting.pop()
                    self.again[value] = remake
                    self._memo.clear()
            elif need not in self.kept and need not in self.again:
                best = self._best(need)[1]
                if best is None:
                    self.kept.add(need)
                    self._memo.clear()
                else:
                    waiting.append((need, best))
                    needs.append(iter(best.needs))

    def _best(self, name: str, depth: int = 0) -> tuple[float, Remake | None]:
        """The least cost of having a value in the backward, and how it is made again."""
        if name in self.kept or name in self.again:
            return 0.0, None
        if name not in self._memo:
            self._memo[name] = self._compare(name, depth)
        return self._memo[name]

    def _compare(self, name: str, depth: int) -> tuple[float, Remake | None]:
        space = self.space
        size, makers = space.size(name), space.makers(name, self.gemms)
        if not size or not makers or depth >= DEPTH:
            return SAVED * size, None
        # A quantized value counts as the plain one, and half of itself for its own traffic: that a
        # recipe is active then changes nothing in what is made again.
        spec = space.program.spec(name)
        keeping = size / 2 + spec.stored(None).bytes_per_row if spec.storage else size
        best: tuple[float, int, Remake | None] = (self.saved * keeping, -1, None)
        for claim in makers:
            for call, needs in (r for r in space.remakes(claim) if name not in r[1]):
                picks = call.wants and claim.again is None
                written = () if call is claim.again else (name,) if picks else claim.gives
                moved = space.moved(claim, written, needs)
                cost = moved + sum(self._best(need, depth + 1)[0] for need in needs)
                if (cost, claim.rank) < best[:2]:
                    best = (cost, claim.rank, Remake(claim, call, needs, moved))
        return best[0], best[2]
