"""What variables mean that no step makes: casts, and quantized values with their parts.

A plan's arguments and what it saves are tensors. A quantized weight is quantized outside the plan
and handed in as the parts of its copies, `weight2_row0, weight2_row1, ...`; a quantized value `xq2`
is saved as the parts of the one copy that the backward reads, `xq2_0, xq2_1`. Under autocast an
argument in another dtype is `weight2_stored`, and `weight2` is its cast.
"""

from collections.abc import Iterator, Sequence
from itertools import count, zip_longest
from typing import Any, NamedTuple

from ..guards.cached import cached_property
from ..op import BACKWARD, FORWARD, STORED, Spec
from .claims import Space
from .lines import Line, literal, value, values
from .planner import Cover
from .writer import Writer


class Input(NamedTuple):
    """An argument of the forward after `ops`: x, an extra input, a weight, or a part of one."""

    name: str
    """Its variable."""
    spec: Spec | None
    """None for a parameter that the module does not have."""
    dims: int | None
    """Its dimensions inside the plan; None for as they are."""
    gradient: str | None
    """The variable of the gradient that the backward returns in its place, if it does."""
    amax: bool
    """Whether that is an amax."""


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


class Definitions:
    """Defines variables in both passes of a cover; knows the arguments and the specs of all.

    prepared: the weights that are handed in quantized, in the order of arguments.
    """

    def __init__(self, space: Space, cover: Cover) -> None:
        self.space, self.cover, self.program = space, cover, space.program
        self.operands: dict[str, Operand] = {}
        self.parts: dict[str, Spec] = {}
        """The parts of all weights, in the order in which they are handed in."""
        self._kept: dict[str, tuple[str, str, Spec]] = {}
        """Of each part of a value that is saved: the value, the copy and the part's spec."""
        self.prepared = tuple(self._weights())
        for name in sorted(cover.keeper.kept):
            if self.program.spec(name).storage is not None:
                self._keep(name)

    def _weights(self) -> Iterator[Prepared]:
        program = self.program
        for k, ((i, name), variable) in enumerate(program.weight_names.items()):
            if (quantizer := program.run.quantizers.get((i, name))) is None:
                continue
            copies: dict[str, dict[str, Spec]] = {}
            for copy in dict.fromkeys(("row", *self._copies(f"q{variable}", i, BACKWARD))):
                # Where one is the transpose of the other, both have the parts of the rows.
                stem = f"{variable}_{'row' if quantizer.shared else copy}"
                specs = quantizer.part_specs(program.request.weights[variable], copy)
                copies[copy] = {f"{stem}{part}": spec for part, spec in enumerate(specs)}
                self.parts |= copies[copy]
            self.operands[f"q{variable}"] = Operand(quantizer, program.specs[i], i, copies)
            names = ("row",) if quantizer.shared else tuple(copies)
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

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """The arguments of the forward after `ops`."""
        program, inputs = self.program, list[Input]()
        dims = (2, *(program.extra_dims(*place) for place in program.run.inputs))
        for (name, spec), size in zip_longest(program.arguments.items(), dims):
            amax = name in program.reported
            wanted = amax or (spec is not None and name in program.request.gradients)
            gradient = None if not wanted else "dx" if name == "x0" else f"d{name}"
            variable = name + STORED * (name in program.casts)
            inputs.append(Input(variable, spec, size, gradient, amax))
        parts = (Input(name, spec, None, None, False) for name, spec in self.parts.items())
        return (*inputs, *parts)

    def spec(self, name: str) -> Spec:
        """The spec of a variable that the forward may save."""
        if name in self._kept:
            return self._kept[name][2]
        return self._arguments.get(name) or self.program.spec(name)

    @cached_property
    def _arguments(self) -> dict[str, Spec | None]:
        return {argument.name: argument.spec for argument in self.inputs}

    # -- copies of quantized values --

    @cached_property
    def _reads(self) -> tuple[set[str], set[str]]:
        """The variables that backward calls read, and those that what is made again reads."""
        calls = [call for claim in self.cover.backward for call in claim.calls]
        again = [remake.call for remake in self.cover.keeper.again.values()]
        first, second = ({a.text for c in some for a in c.arguments} for some in (calls, again))
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
        return wanted + ["col"] * any(program.gradient_names(gap - 1))

    # -- lines --

    def define(self, name: str, direction: str, writer: Writer) -> Sequence[Line]:
        """The line that makes a variable in a pass, if it is defined here."""
        program, forward = self.program, direction == FORWARD
        # Activations are cast by the forward alone, which saves the cast.
        if name in program.casts and (forward or name not in program.activations):
            arguments = value(name + STORED), literal(program.request.compute)
            return [Line("cast", arguments, name, note="autocast")]
        if (operand := self.operands.get(name)) is not None:
            function, target = writer.quantizer(operand.quantizer)
            words = [
                (copy, values(operand.copies[copy]))
                for copy in self._copies(name, operand.layer, direction)
            ]
            kind = literal(operand.spec.dtype)
            return [Line(f"{function}.load", (kind,), name, target, tuple(words), "load")]
        if forward and name in self._kept:
            owner, copy, _ = self._kept[name]
            function, target = writer.quantizer(self.operands[owner].quantizer)
            arguments, parts = (value(owner), literal(copy)), self.operands[owner].copies[copy]
            return [Line(f"{function}.parts", arguments, tuple(parts), target, note="keep")]
        return ()
