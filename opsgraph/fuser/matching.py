"""Where the patterns of fusers fit a run of ops."""

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import NamedTuple

from ..op import Op
from .base import Fuser, Variant, variants


class Match(NamedTuple):
    """A place where a fuser's pattern fits: the position under each key (None: left out)."""

    fuser: Fuser
    positions: dict[str, int | None]
    start: int
    stop: int


class Matcher:
    """Finds all places where fusers fit, by the class of their first op."""

    @staticmethod
    @lru_cache(maxsize=16)
    def of(fusers: tuple[Fuser, ...], direction: str) -> "Matcher":
        """The matcher of some fusers, made once."""
        return Matcher(fusers, direction)

    def __init__(self, fusers: Iterable[Fuser], direction: str) -> None:
        self.by_first: dict[type[Op], list[tuple[int, Fuser, Variant]]] = {}
        serving = (fuser for fuser in fusers if fuser.functions(direction))
        every = ((fuser, variant) for fuser in serving for variant in variants(fuser.pattern))
        for number, (fuser, variant) in enumerate(every):
            first = next(kind for _, kind in variant if kind)
            self.by_first.setdefault(first, []).append((number, fuser, variant))

    def at(
        self, start: int, kinds: Sequence[tuple[type[Op], ...]], crossed: list[bool]
    ) -> Iterator[Match]:
        """Matches that start at an op, in the order of the fusers.

        kinds: each op's `family`. crossed: which ops a pattern may step over.
        """
        first = [entry for kind in kinds[start] for entry in self.by_first.get(kind, ())]
        for _, fuser, variant in sorted(first, key=itemgetter(0)):
            positions: dict[str, int | None] = {}
            position = start
            for key, kind in variant:
                if kind is None:
                    positions[key] = None
                    continue
                while position > start and position < len(kinds) and kind not in kinds[position]:
                    if not crossed[position]:
                        break
                    position += 1
                if position == len(kinds) or kind not in kinds[position]:
                    break
                positions[key] = position
                position += 1
            else:
                yield Match(fuser, positions, start, position)
