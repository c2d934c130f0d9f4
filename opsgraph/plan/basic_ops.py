"""`BasicOps`: a run of basic ops with their channels joined, the same for every kind of call."""

from collections.abc import Iterable, Sequence
from copy import copy
from fractions import Fraction

from ..base.errors import PlanError
from ..guards.names import root, variable
from ..op import Factor, Op, Placed, weights


class Names:
    """The variables of a run's ops: `table` by position and the class's name, `roots` of them all.

    numbers, edges: see `BasicOps`.
    """

    def __init__(
        self, kinds: Sequence[type[Op]], numbers: Sequence[str], edges: Sequence[str]
    ) -> None:
        self.numbers = numbers
        self.roots = {"x", *(root(f"x{edge}") for edge in edges)}
        for number in numbers:
            self.roots |= {root(f"d{number}"), root(f"dy{number}")}
        self.table: dict[tuple[int, str], str] = {}
        for i, kind in enumerate(kinds):
            for name in dict.fromkeys((*weights(kind), *kind.extra_inputs, *kind.saves)):
                text = self.table[i, name] = variable(name, numbers[i], self.roots)
                self.roots.add(root(text))

    def __call__(self, name: str, i: int) -> str:
        """What something of op i is called."""
        return self.table.get((i, name)) or f"{name}{self.numbers[i]}"


class BasicOps:
    """What the ops of a stage lower to, in a row; knows neither parameters' values nor dtypes.

    entries: basic ops that were verified. labels: what errors call each of them ("0:Linear").
    inputs: `(position, name, channel)` of every extra input that no earlier Tee of the run
    provides; outputs: positions of Tees handed to the caller. numbers: what names and plans call
    the ops; one that a recipe or autocast adds shares the number of the op that it is for ("q2",
    "g2", "c2"), so that no other number changes.
    """

    def __init__(
        self, entries: Sequence[Placed], known: Iterable[str] = (), later: Iterable[str | None] = ()
    ) -> None:
        self._known, self._later = frozenset(known), frozenset(later)
        self._fill(entries)

    def _fill(self, entries: Sequence[Placed]) -> None:
        self.entries = entries
        self.kinds = [entry.kind for entry in entries]
        self.ops = [entry.op for entry in entries]
        self.labels = [entry.label for entry in entries]
        self._number()
        self.quantizers = {
            (i, name): q for i, entry in enumerate(entries) for name, q in entry.quantizers.items()
        }
        self.overrides = {i: e.override for i, e in enumerate(entries) if e.override is not None}
        self.factors: list[Factor] = [1]
        """For each gap, how many rows there are for each row of the input."""
        for kind, op in zip(self.kinds, self.ops, strict=True):
            own = kind.row_factor(op)
            self.factors.append(self.factors[-1] * (1 if own == 1 else Fraction(own)))
        self.slots = [(i, name) for i, kind in enumerate(self.kinds) for name in weights(kind)]
        self.name = Names(self.kinds, self.numbers, self.edges)
        self._connect()

    def _number(self) -> None:
        """The number of each op and each gap: of the op after it, with "q" where a Quantize ends.

        The value before a Quantize has the plain number, that after it, its linear layer's input,
        "q"; likewise for a cast.
        """
        self.numbers, self.edges = list[str](), list[str]()
        self.places = list[int]()
        """Where generated code finds each op: where it would be without casts."""
        count, after, casts = 0, "", 0
        for i, (_, _, _, attached, *_) in enumerate(self.entries):
            self.numbers.append(f"{attached}{count - 1 if attached == 'g' else count}")
            self.edges.append(f"{after}{count}")
            self.places.append(i - casts)
            after = "" if attached == "g" else attached
            casts += attached.startswith("c")
            count += not attached
        self.edges.append(f"{count}")

    def _connect(self) -> None:
        """Join extra inputs to Tees. Earlier runs provide `known`, later ones read `later`."""
        self.sources: dict[tuple[int, str], int] = {}
        self.inputs: list[tuple[int, str, str | None]] = []
        known, producers = set(self._known), dict[str, int]()
        for i, (kind, op) in enumerate(zip(self.kinds, self.ops, strict=True)):
            for name in kind.extra_inputs:
                channel = op.channels.get(name)
                if channel is not None and channel in producers:
                    self.sources[i, name] = producers[channel]
                    continue
                if channel is not None and channel not in known and name in op.strict:
                    raise PlanError(
                        f"{self.labels[i]}: got channel {channel!r} for {name}, expected one "
                        f"that an earlier op provides: {', '.join(sorted(known)) or 'none do'}"
                    )
                self.inputs.append((i, name, channel))
            channel = op.channels.get("d") if kind.taps else None
            if channel is not None:
                where = f"{self.labels[i]}: channel {channel!r}"
                if channel in {wanted for _, _, wanted in self.inputs}:
                    raise PlanError(f"{where} is read before it is provided")
                if channel in producers:
                    raise PlanError(f"{where} has two producers")
                producers[channel] = i
                known.add(channel)
        self.outputs = [i for i, kind in enumerate(self.kinds) if kind.taps and self._leaves(i)]

    def _leaves(self, i: int) -> bool:
        """Whether the caller, or a later run, gets what a Tee hands out."""
        op = self.ops[i]
        read = i in self.sources.values()
        return not read or op.channels.get("d") in self._later or getattr(op, "to_caller", False)

    def with_ops(self, ops: Sequence[Op]) -> "BasicOps":
        """The same over other modules."""
        other = copy(self)
        other.ops = list(ops)
        other.entries = [entry._replace(op=op) for entry, op in zip(self.entries, ops, strict=True)]
        return other

    def with_entries(self, entries: Sequence[Placed]) -> "BasicOps":
        """A run of more entries; its ops are connected, and their values called, as in this one."""
        other = copy(self)
        other._fill(entries)
        return other
