"""Plans of quantized values: their parts, and the third function, which quantizes the weights.

A plan's arguments and what it saves are tensors. A quantized weight is quantized outside the plan
and handed in as the parts of its copies, `weight2_row0, weight2_row1, ...`; a quantized value `xq2`
is saved as the parts of the one copy that the backward reads, `xq2_0, xq2_1`.

    prepare(weights, scales that are delayed) -> (parts, amaxes)

The forward takes the parts behind its other arguments; there is an amax for each scale. Each line
of `prepare` calls one bound function, of a format and the copies that some pass reads. It is chosen
when the plan is made, once for all calls. It is handed a weight and, where that is delayed, a
scale, and returns the parts of the copies in order, and then the amax, or None where there is
nothing to note.

The hook is `make_plan(definitions=...)`.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

from ..guards.cached import cached_property
from ..op import BACKWARD, FORWARD, Spec
from ..plan.claims import Space
from ..plan.lines import Function, Line, literal, value, values
from ..plan.planner import Cover
from ..plan.writer import After, Definitions, Input, Writer
from .weight_gradients import gradient_names

Bind = Callable[[Any, Spec, tuple[str, ...]], tuple[str, Callable[..., Any]]]
"""Chooses for a quantizer, a weight and its copies: the function, and the backend that it is of."""


class Operand(NamedTuple):
    """A quantized weight or kept value, of which a pass has the parts of its copies."""

    quantizer: Any
    spec: Spec
    """Of what the linear layer reads: its dtype is the one that the copies stand for."""
    layer: int
    """The position of that layer."""
    copies: dict[str, dict[str, Spec]]
    """Of each copy the parts: their variables and specs."""


class Prepared(NamedTuple):
    """A weight that is handed in quantized: its place among the weights, its copies."""

    place: int
    copies: tuple[str, ...]
    parts: int
    """How many tensors each copy is made of."""


class QuantizedDefinitions(Definitions):
    """Defines quantized values too. prepared: in the order of arguments.

    bind: chooses what quantizes a weight.
    """

    def __init__(self, bind: Bind, after: Sequence[After], space: Space, cover: Cover) -> None:
        super().__init__(space, cover, after)
        self._bind = bind
        self.operands: dict[str, Operand] = {}
        self.parts: dict[str, Spec] = {}
        """The parts of all weights, in the order in which they are handed in."""
        self._kept: dict[str, tuple[str, str, Spec]] = {}
        """Of each part of a value that is saved: the value, the copy and the part's spec."""
        self.prepared = tuple(self._weights())
        self.specs |= self.parts
        self.inputs += tuple(Input(n, spec, None, None, False) for n, spec in self.parts.items())
        for name in sorted(cover.keeper.kept):
            if self.program.spec(name).storage is not None:
                self._keep(name)

    def _weights(self) -> Iterator[Prepared]:
        program = self.program
        for k, ((i, name), variable) in enumerate(program.weight_names.items()):
            if (quantizer := program.run.quantizers.get((i, name))) is None:
                continue
            weight = program.request.weights[variable]
            assert weight is not None
            copies: dict[str, dict[str, Spec]] = {}
            # Where one is the transpose of the other, both can have the parts of the rows. A GPU's
            # products read rows alone, so there a kernel writes both, from one reading.
            one = quantizer.shared and weight.device.type != "cuda"
            for copy in dict.fromkeys(("row", *self._copies(f"q{variable}", i, BACKWARD))):
                stem = f"{variable}_{'row' if one else copy}"
                specs = quantizer.part_specs(weight, copy)
                copies[copy] = {f"{stem}{part}": spec for part, spec in enumerate(specs)}
                self.parts |= copies[copy]
            self.operands[f"q{variable}"] = Operand(quantizer, program.specs[i], i, copies)
            names = ("row",) if one else tuple(copies)
            yield Prepared(k, names, len(copies["row"]))

    def _keep(self, name: str) -> None:
        layer, spec = self.program.values[name].place, self.program.spec(name)
        quantizer: Any = self.program.ops[layer - 1].quantizer
        number, copies = count(), dict[str, dict[str, Spec]]()
        for copy in self._copies(name, layer, BACKWARD):
            specs = quantizer.part_specs(spec, copy)
            copies[copy] = {f"{name}_{next(number)}": part for part in specs}
            self._kept |= {part: (name, copy, spec) for part, spec in copies[copy].items()}
        self.operands[name] = Operand(quantizer, spec, layer, copies)

    def spec(self, name: str) -> Spec:
        return self._kept[name][2] if name in self._kept else super().spec(name)

    @cached_property
    def _reads(self) -> tuple[set[str], set[str]]:
        """The variables that backward calls read, and those that what is made again reads."""
        calls = [call for claim in self.cover.backward for call in claim.calls]
        again = [remake.call for remake in self.cover.keeper.again.values()]
        first, second = (
            {a.text for c in some for a in c.arguments if a.category != "object"}
            for some in (calls, again)
        )
        return first, second

    def _copies(self, name: str, layer: int, direction: str) -> list[str]:
        """The copies that a pass reads of an operand: a forward multiplies rows."""
        if direction == FORWARD:
            return ["row"]
        backward, again = self._reads
        rows = name in again or (name in backward and layer in self.program.run.overrides)
        columns = name in backward and layer not in self.program.run.overrides
        return ["row"] * rows + ["col"] * columns

    def wanted(self, name: str, direction: str) -> list[str]:
        """The copies of a quantized value that the step which makes it in a pass hands out."""
        if self.program.spec(name).storage is None:
            return []
        copies = self._copies(name, self.program.values[name].place, direction)
        if direction == FORWARD and name in self.operands:
            copies += self.operands[name].copies
        return list(dict.fromkeys(copies))

    def gradient(self, gap: int) -> list[str]:
        """The copies of the gradient at a gap that the linear layer before it reads."""
        program = self.program
        if gap >= program.count or not program.kinds[gap].packs_gradient:
            return []
        wanted = ["row"] if program.flows[gap - 1] else []
        return wanted + ["col"] * any(gradient_names(program, gap - 1))

    def define(self, name: str, writer: Writer) -> Sequence[Line]:
        if lines := super().define(name, writer):
            return lines
        if (operand := self.operands.get(name)) is not None:
            function, target = _quantizer(writer, operand.quantizer)
            words = [
                (copy, values(operand.copies[copy]))
                for copy in self._copies(name, operand.layer, writer.direction)
            ]
            kind = literal(operand.spec.dtype)
            return [Line(f"{function}.load", (kind,), name, target, tuple(words), "load")]
        if writer.direction == FORWARD and name in self._kept:
            owner, copy, _ = self._kept[name]
            function, target = _quantizer(writer, self.operands[owner].quantizer)
            arguments, parts = (value(owner), literal(copy)), self.operands[owner].copies[copy]
            return [Line(f"{function}.parts", arguments, tuple(parts), target, note="keep")]
        return ()

    def prepare(self) -> Function:
        if not self.prepared:
            return super().prepare()
        program, quantizers = self.program, self.program.run.quantizers
        slots = [*program.weight_names.items()]
        prepared = [(*slots[place], copies) for place, copies, _ in self.prepared]
        names = [name for _, name, _ in prepared]
        delayed = [name for slot, name, _ in prepared if quantizers[slot].delayed]
        writer = Writer(self, FORWARD, *names, *(f"{name}_scale" for name in delayed))
        functions: dict[Any, Callable[..., Any]] = {}
        for slot, name, copies in prepared:
            quantizer, spec = quantizers[slot], program.request.weights[name]
            assert spec is not None
            backend, function = self._bind(quantizer, spec, copies)
            function = functions.setdefault((quantizer, copies, backend), function)
            called = writer.bind("_".join((quantizer.storage.name.upper(), *copies)), function)
            parts = self.operands[f"q{name}"].copies
            arguments, results = [name], [part for copy in copies for part in parts[copy]]
            if quantizer.delayed:
                arguments.append(f"{name}_scale")
                results.append(f"{name}_amax")
            note = f"{program.numbers[slot[0]]} {backend}"
            writer.add(Line(called, values(arguments), tuple(results), function, note=note))
        amaxes = [f"{name}_amax" for name in delayed]
        return writer.finish("prepare", values(self.parts), values(amaxes))


def _quantizer(writer: Writer, quantizer: Any) -> tuple[str, Any]:
    """A quantizer's name in the source, and the first one that is equal."""
    same = (known for known in writer.bound.values() if type(known) is type(quantizer))
    target = next((known for known in same if known == quantizer), quantizer)
    return writer.bind(quantizer.storage.name.upper(), target), target
