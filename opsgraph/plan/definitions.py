"""What variables mean that no step makes: casts, and quantized values with their parts.

A plan's arguments and what it saves are tensors. A quantized weight is quantized outside the plan
and handed in as the parts of its copies, `weight2_row0, weight2_row1, ...`; a quantized value `xq2`
is saved as the parts of the one copy that the backward reads, `xq2_0, xq2_1`. Under autocast an
argument in another dtype is `weight2_stored`, and `weight2` is its cast.
"""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from ..guards.cached import cached_property
from ..op import BACKWARD, FORWARD, STORED, Spec
from .claims import Space
from .lines import Line, Writer
from .planner import Cover
from .program import Argument


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


class Definitions:
    """Defines variables in both passes of a cover; knows the arguments and the specs of all."""

    def __init__(self, space: Space, cover: Cover) -> None:
        self.space, self.cover, self.program = space, cover, space.program
        slots = self.program.weight_names.items()
        self._packed = {f"q{n}": slot for slot, n in slots if slot in self.program.run.quantizers}

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
        return self._specs.get(name) or self.program.spec(name)

    @cached_property
    def _specs(self) -> dict[str, Spec | None]:
        specs = {argument.name: argument.spec for argument in self.inputs}
        return specs | {part: spec for parts in self.kept.values() for part, spec in parts.items()}

    # -- copies of quantized values --

    @cached_property
    def _reads(self) -> tuple[set[str], set[str]]:
        """The variables that backward calls read, and those that what is made again reads."""
        calls = [call for claim in self.cover.backward for call in claim.calls]
        again = [remake.call for remake in self.cover.keeper.again.values()]
        first, second = ({a.text for c in some for a in c.arguments} for some in (calls, again))
        return first, second

    def _copies(self, name: str, i: int, direction: str) -> list[str]:
        """The copies of an operand of the quantized linear layer i that a pass reads."""
        if direction == FORWARD:
            return ["row"]
        backward, again = self._reads
        row = name in again or (name in backward and i in self.program.run.overrides)
        return ["row"] * row + ["col"] * (name in backward and i not in self.program.run.overrides)

    def made(self, value: str, direction: str) -> list[str]:
        """The copies of a quantized value that a pass has made."""
        copies = self._copies(value, self.program.values[value].place, direction)
        kept = direction == FORWARD and value in self.kept
        return list(dict.fromkeys((*copies, *[self._kept_copy(value)] * kept)))

    def gradient(self, gap: int) -> list[str]:
        """The copies of the gradient at a gap that the linear layer before it reads."""
        program = self.program
        if gap >= program.count or not program.kinds[gap].packs_gradient:
            return []
        wanted = ["row"] if program.flows[gap - 1] else []
        return wanted + ["col"] * any(program.gradient_names(gap - 1))

    def _kept_copy(self, value: str) -> str:
        return "row" if self.program.values[value].place in self.program.run.overrides else "col"

    def _quantizer(self, value: str) -> Any:
        return self.program.ops[self.program.values[value].place - 1].quantizer

    @cached_property
    def kept(self) -> dict[str, dict[str, Spec]]:
        """Of each quantized value that is saved, the parts of the copy."""
        kept = {}
        for value in sorted(self.cover.keeper.kept):
            if (spec := self.program.spec(value)).storage is not None:
                specs = self._quantizer(value).part_specs(spec, self._kept_copy(value))
                kept[value] = {f"{value}_{k}": part for k, part in enumerate(specs)}
        return kept

    def _weight_parts(self, i: int, name: str, copy: str) -> dict[str, Spec]:
        """The parts of a copy of a weight; of one that is shared those of either copy."""
        variable = self.program.weight_names[i, name]
        quantizer = self.program.run.quantizers[i, name]
        stem = f"{variable}_{'row' if quantizer.shared else copy}"
        specs = quantizer.part_specs(self.program.request.weights[variable], copy)
        return {f"{stem}{k}": spec for k, spec in enumerate(specs)}

    @cached_property
    def weights(self) -> list[tuple[int, str, tuple[str, ...]]]:
        """Quantized weights with the copies that the passes read, in the order of arguments."""
        weights = []
        for variable, (i, name) in self._packed.items():
            copies = ["row", *self._copies(variable, i, BACKWARD)]
            if self.program.run.quantizers[i, name].shared:
                copies = ["row"]
            weights.append((i, name, tuple(dict.fromkeys(copies))))
        return weights

    @cached_property
    def parts(self) -> dict[str, Spec]:
        """The parts of all quantized weights, in the order in which they are handed in."""
        slots = ((i, name, copy) for i, name, copies in self.weights for copy in copies)
        return {part: spec for slot in slots for part, spec in self._weight_parts(*slot).items()}

    # -- lines --

    def define(self, name: str, direction: str, writer: Writer) -> Sequence[Line]:
        """The line that makes a variable in a pass, if it is defined here."""
        activations = self.program.activations  # the forward casts them, and saves the result
        if name in self.program.casts and (direction == FORWARD or name not in activations):
            given = Argument("weight", name + STORED), dtype(self.program.request.compute)
            return [Line("cast", given, name, note="autocast")]
        if name in self._packed:
            i, weight = self._packed[name]
            copies = self._copies(name, i, direction)
            parts = {copy: self._weight_parts(i, weight, copy) for copy in copies}
            quantizer = self.program.run.quantizers[i, weight]
            return [self._load(name, quantizer, self.program.specs[i], parts, writer)]
        if direction == BACKWARD and name in self.kept:
            parts = {self._kept_copy(name): self.kept[name]}
            return [self._load(name, self._quantizer(name), self.program.spec(name), parts, writer)]
        return list(self._keep(name, writer)) if direction == FORWARD else ()

    def _load(
        self,
        name: str,
        quantizer: Any,
        spec: Spec,
        parts: dict[str, dict[str, Spec]],
        writer: Writer,
    ) -> Line:
        """A quantized value put together from the parts of its copies."""
        function, target = writer.quantizer(quantizer)
        words = tuple((c, tuple(Argument("value", p) for p in ps)) for c, ps in parts.items())
        return Line(f"{function}.load", (dtype(spec.dtype),), name, target, words, "load")

    def _keep(self, name: str, writer: Writer) -> Iterator[Line]:
        """A quantized value taken apart."""
        for value, parts in self.kept.items():
            if name in parts:
                function, target = writer.quantizer(self._quantizer(value))
                copy = self._kept_copy(value)
                given = Argument("value", value), Argument("literal", repr(copy), value=copy)
                yield Line(f"{function}.parts", given, tuple(parts), target, note="keep")


def dtype(kind: Any) -> Argument:
    """A dtype as an argument."""
    return Argument("literal", str(kind), value=kind)
