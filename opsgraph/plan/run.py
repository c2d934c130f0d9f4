"""Lowered ops in a row, with their channels joined: what a plan is made for, whatever the call."""

from collections.abc import Collection, Iterable, Sequence
from copy import copy
from fractions import Fraction
from typing import Any

from torch import nn

from ..errors import PlanError
from ..guards.constants import plain, verify
from ..op import Lower, Op, Placed, lower_plainly, weights
from ..op.functions import verify_kind
from .names import Names, verify_names


class Run:
    """Lowered ops with their channels resolved; knows neither parameters' values nor dtypes.

    labels: what errors call each op ("0:Linear"). inputs: `(position, name, channel)` of every
    extra input that no earlier Tee of the run provides; outputs: positions of Tees handed to the
    caller. lower: how ops become basic ones, where a recipe adds some. numbers: what names and
    plans call the ops; one that a recipe adds shares the number of its linear layer ("q2", "g2"),
    so that no other number changes.
    """

    def __init__(
        self,
        ops: Sequence[Op],
        labels: Sequence[str],
        known: Iterable[str] = (),
        later: Iterable[str | None] = (),
        lower: Lower | None = None,
    ) -> None:
        entries = (lower or lower_plainly)(ops, labels)
        self.kinds = [entry.kind for entry in entries]
        self.ops = [entry.op for entry in entries]
        self.labels = [entry.label for entry in entries]
        self.numbers, self.edges = _numbers(entries)
        self.places = list(range(len(self.ops)))
        """Where generated code finds each op: other than its position if casts were inserted."""
        self.streams = False
        """Whether the input is left uncast under autocast, for casts that stand in the run."""
        self.quantizers = {
            (i, name): q for i, entry in enumerate(entries) for name, q in entry.quantizers.items()
        }
        self.overrides = {i: e.override for i, e in enumerate(entries) if e.override is not None}
        self.factors = [Fraction(1)]
        """For each gap, how many rows there are for each row of the input."""
        for kind, op in zip(self.kinds, self.ops, strict=True):
            self.factors.append(self.factors[-1] * kind.row_factor(op))
        for kind, label in zip(self.kinds, self.labels, strict=True):
            verify_kind(kind, label)
            verify_names(kind, label)
        self.slots = [(i, name) for i, kind in enumerate(self.kinds) for name in weights(kind)]
        self.sources: dict[tuple[int, str], int] = {}
        self.inputs: list[tuple[int, str, str | None]] = []
        self.outputs: list[int] = []
        self._verify_constants()
        self.name = Names(self.kinds, self.numbers, self.edges)
        self._connect(set(known), set(later))

    def _verify_constants(self) -> None:
        for kind, op, label in zip(self.kinds, self.ops, self.labels, strict=True):
            for name in kind.constants:
                if not hasattr(op, name):
                    raise PlanError(f"{label}: got no {name!r}, which its constants name")
                verify(plain(getattr(op, name)), label, name)

    def _connect(self, known: set[str], later: set[str | None]) -> None:
        """Join extra inputs to Tees. Earlier runs provide `known`, later ones read `later`."""
        producers: dict[str, int] = {}
        read: set[int] = set()
        for i, (kind, op) in enumerate(zip(self.kinds, self.ops, strict=True)):
            for name in kind.extra_inputs:
                channel = op.channels.get(name)
                if channel is not None and channel in producers:
                    self.sources[i, name] = producers[channel]
                    read.add(producers[channel])
                else:
                    if channel is not None and channel not in known and name in op.strict:
                        raise PlanError(
                            f"{self.labels[i]}: got channel {channel!r} for {name}, expected one "
                            f"that an earlier op provides: {', '.join(sorted(known)) or 'none do'}"
                        )
                    self.inputs.append((i, name, channel))
            if kind.taps:
                channel = op.channels.get("d")
                if channel is not None:
                    if channel in {wanted for _, _, wanted in self.inputs}:
                        raise PlanError(
                            f"{self.labels[i]}: channel {channel!r} is read before it is provided"
                        )
                    if channel in producers:
                        raise PlanError(f"{self.labels[i]}: channel {channel!r} has two producers")
                    producers[channel] = i
                    known.add(channel)
        for i, kind in enumerate(self.kinds):
            if not kind.taps:
                continue
            op = self.ops[i]
            if i not in read or op.channels.get("d") in later or getattr(op, "to_caller", False):
                self.outputs.append(i)

    def with_ops(self, ops: Sequence[Op]) -> "Run":
        """The same run over other modules."""
        other = copy(self)
        other.ops = list(ops)
        return other

    def absent(self) -> list[tuple[nn.Module, str]]:
        """Where parameters may appear that no op of the run reads, for they were not there."""
        read = {(self.ops[i], name) for i, name in self.slots}
        places = (
            (op, name)
            for op in self.ops
            for name in (*op._parameters, *op._homes)
            if name not in joined_by(op)
        )
        gone = (op.home(n) for op, n in places if (op, n) not in read and not op.has(n))
        return list(dict.fromkeys(gone))

    def verify_weights(self) -> None:
        """Raises PlanError unless `fwd` names just what the op has: all parameters, no other."""
        for i, name in self.slots:
            if not hasattr(*self.ops[i].home(name)):
                raise PlanError(
                    f"{self.labels[i]}: got no {name!r}, which its fwd names, expected a parameter "
                    "or buffer of that name, or a constant or extra input"
                )
        for i, op in enumerate(self.ops):
            named = {name for j, name in self.slots if self.ops[j] is op}
            held = {name for name in (*op._parameters, *op._homes) if op.has(name)}
            # What a hook reads before the op runs is no argument of fwd.
            if (missing := held - named - set(joined_by(op))) and not op._forward_pre_hooks:
                raise PlanError(
                    f"{self.labels[i]}: parameters {sorted(missing)} are not arguments of fwd"
                )


def joined_by(op: Op) -> Collection[str]:
    """Parameters that are no arguments of `fwd`, for the op joins them to one that is."""
    joined: Any = getattr(op, "joined", tuple)
    found: Collection[str] = joined()
    return found


def _numbers(entries: Sequence[Placed]) -> tuple[list[str], list[str]]:
    """The number of each op, and of each gap: of the op after it, with "q" where a Quantize ends.

    The value before a Quantize has the plain number, that after it, its linear layer's input, "q".
    """
    numbers: list[str] = []
    edges: list[str] = []
    count, after_quantize = 0, ""
    for entry in entries:
        own = count - 1 if entry.attached == "g" else count
        numbers.append(f"{entry.attached}{own}")
        edges.append(f"{after_quantize}{count}")
        after_quantize = "q" if entry.attached == "q" else ""
        count += not entry.attached
    return numbers, [*edges, f"{count}"]
