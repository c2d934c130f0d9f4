"""Passes of a plan under a recipe, joined with what is done around them, as one function each.

    forward   quantizes the weights, and notes the amaxes of weights and activations
    silent    the same and notes none, for calls without grad
    backward  notes the amaxes of gradients

Their arguments are the plan's own. In the place of parts of quantized weights come the scales of
the layers whose scaling is delayed, fp32 `[layers, 3]`, and for each the buffer of the amaxes that
are noted. So there is one native call where there were four, what only the forward reads of a
quantized weight is a temporary of it, and nothing is made for a scale. They save the scales where
the plan saves one.

Calls that something watches run the plan's own functions: `precision.reading.usual` says which.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any, NamedTuple

from torch import Tensor

from ..guards.names import of_opsgraph
from ..plan import Plan
from ..plan.lines import Function, Line, literal, value, values
from ..precision.recorded import note


class Layer(NamedTuple):
    """A quantized weight's place among the stage's weights, and those of its delayed scales."""

    weight: int
    activation: int | None = None
    gradient: int | None = None


class Joined(NamedTuple):
    """The functions; as calls run them, where they are replayed.

    silent: makes that function, once: no training step runs it.
    backward: None where the plan's own does nothing less. saved: what the backward reads, each
    once; places: where that is which the plan's own backward reads.
    """

    forward: Any
    silent: Any
    backward: Any
    saved: tuple[str, ...]
    places: tuple[int, ...]


def joined(plan: Plan, layers: Sequence[Layer]) -> Joined | None:
    """Those of a plan; None for one that quantizes no weight."""
    if not plan.specs.prepared:
        return None
    return _Joining(plan, layers).joined()


def part(scales: Tensor, layer: int, column: int) -> Tensor:
    """A scale, fp32 `[]`, of those of all layers."""
    return scales[layer, column]


_CALLED = {"part": part, "note": note}
"""What the added lines call."""


_SCALES = "scales"


def _seen(n: int) -> str:
    return f"seen_{n}"


class _Joining:
    """Joins a plan's functions. In the source layer n has a row of `scales`, and `seen_n`."""

    def __init__(self, plan: Plan, layers: Sequence[Layer]) -> None:
        self.specs = plan.specs
        self.forward, self.backward, self.prepare = plan.functions
        self.delayed = [layer for layer in layers if layer.activation is not None]
        self.parts = len(_returned(self.prepare)[0])
        self.count = len(self.specs.inputs) - self.parts
        self.owners: dict[str, tuple[int, int]] = {}
        """The layer and the column of each scale that is an argument."""
        for n, layer in enumerate(self.delayed):
            for column, place in ((0, layer.activation), (2, layer.gradient)):
                if place is not None:
                    self.owners[self.name(place)] = n, column
        parts = iter(self.specs.inputs[self.count :])
        numbers = {layer.weight: n for n, layer in enumerate(self.delayed)}
        for place, copies, number in self.specs.prepared:
            for _ in copies:
                _, scale, *_ = [next(parts).name for _ in range(number)]
                if place in numbers:  # the copy has the scale that it was made with
                    self.owners[scale] = numbers[place], 1
        self.names = [value.name for value in self.specs.saved]
        self.saved = tuple(dict.fromkeys(map(self.owner, self.names)))
        self.places = tuple(self.saved.index(self.owner(name)) for name in self.names)

    def name(self, place: int) -> str:
        """What the weight at a place is called."""
        return self.specs.inputs[self.specs.first_weight + place].name

    def owner(self, name: str) -> str:
        """What is saved in the place of a variable."""
        return _SCALES if name in self.owners else name

    def joined(self) -> Joined:
        more = self.delayed and self.backward.lines
        backward = self.noting_backward() if more else None
        silent = cache(partial(self.forward_of, False))
        return Joined(self.forward_of(True), silent, backward, self.saved, self.places)

    def part(self, n: int, column: int, name: str) -> Line:
        place = value(_SCALES), literal(n), literal(column)
        return Line("part", place, name, part, note="scale")

    def forward_of(self, noting: bool) -> Function:
        """The forward. noting: whether it notes amaxes."""
        noting = noting and bool(self.delayed)
        count = len(self.delayed)
        own = self.forward.parameters[: 1 + self.count]
        more = [*[_SCALES] * bool(count), *map(_seen, range(count * noting))]
        read = {name for line in self.forward.lines[:-1] for name in line.reads}
        read -= {name for line in self.prepare.lines for name in line.makes}
        lines = [self.part(*place, name) for name, place in self.owners.items() if name in read]
        weights = [self.name(place) for place, _, _ in self.specs.prepared]
        names = self.prepare.parameters[: len(weights)]
        both = zip(weights, names, strict=True)
        lines += [Line("bind", (value(given),), name) for given, name in both if given != name]
        scales = self.prepare.parameters[len(weights) :]
        lines += [self.part(n, 1, name) for n, name in enumerate(scales)]
        prepare = self.prepare.lines[:-1]
        if self.delayed:
            prepare = tuple(map(_preparing, prepare))
        lines += [*prepare, *map(_wanting, self.forward.lines[:-1])]
        outputs, _ = _returned(self.forward)
        first = len(outputs) - self.specs.reports
        if noting:
            amaxes = *outputs[first:], *_returned(self.prepare)[1]
            lines.append(_note([*range(count)] * 2, [0] * count + [1] * count, amaxes))
        lines.append(Line("return", (outputs[:first], values(self.saved))))
        called = self.prepare.namespace | self.forward.namespace | _CALLED
        return Function("forward", (*own, *more), lines, called)

    def noting_backward(self) -> Function:
        """The backward."""
        lines = list(self.backward.lines)
        start = 0
        if self.saved:
            lines[0], start = lines[0]._replace(results=self.saved), 2
        read = {name for line in lines[start:] for name in line.reads}
        lines[start:start] = [
            self.part(*place, name) for name, place in self.owners.items() if name in read
        ]
        gradients = list(_returned(self.backward)[0][: self.count])
        reported = self.specs.reported
        layers = [self.owners[self.specs.inputs[k].name][0] for k in reported]
        amaxes = tuple(gradients[k] for k in reported)
        notes = [_note(layers, [0] * len(layers), amaxes)] * bool(reported)
        for k in reported:
            gradients[k] = literal(None)
        lines[-1:] = [*notes, Line("return", (tuple(gradients),))]
        own = self.backward.parameters[:-1]
        lines = [*map(_wanting, lines)]
        parameters = (*own, *map(_seen, layers), "saved")
        return Function("backward", parameters, lines, self.backward.namespace | _CALLED)


def _returned(function: Function) -> Any:
    """What a function returns: its arguments, in tuples."""
    return function.lines[-1].arguments


def _wanting(line: Line) -> Line:
    """A line of a step as a joined pass has it: of Triton's kernels it wants amaxes in parts.

    So `note` is all that is launched for them. Passes that note none want them too: their first
    call runs the plan's own functions, and a kernel that was compiled for those is recorded.
    """
    if getattr(line.target, "backend", None) != "triton" or not of_opsgraph(line.target):
        return line
    keywords = dict(line.keywords)
    want: Any = keywords.get("want")
    if want is None:
        return line
    words = tuple("amaxes" if word == "amax" else word for word in want.value)
    return line._replace(keywords=(*(keywords | {"want": literal(words)}).items(),))


def _preparing(line: Line) -> Line:
    """The same of a line that quantizes a weight whose scaling is delayed."""
    if not line.note.endswith(" triton"):
        return line
    return line._replace(keywords=(("amax", literal(("amaxes",))),))


def _note(layers: Sequence[int], columns: Sequence[int], amaxes: Any) -> Line:
    """The line that notes amaxes, in a column of the buffer of a layer each."""
    seen = values(map(_seen, layers))
    return Line("note", (seen, literal(tuple(columns)), tuple(amaxes)), (), note, note="amaxes")
