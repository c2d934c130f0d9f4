"""Quantized values as the tensors that they are made of, decided before anything runs.

A plan's arguments and what it saves are tensors. A quantized weight is quantized outside the plan
and handed in as the parts of its copies, `weight2_row0, weight2_row1, ...`; a kept value `xq2` is
saved as the parts of the one copy that the backward reads, `xq2_0, xq2_1`.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..guards.cached import cached_property
from ..op import BACKWARD, FORWARD, Spec
from .claims import Call, Space

if TYPE_CHECKING:
    from .planner import Cover

Parts = list[tuple[str, Spec]]


class Packing:
    """Which copies of quantized values a cover uses, and what their parts are called."""

    def __init__(self, space: Space, cover: "Cover") -> None:
        self.space, self.cover, self.program = space, cover, space.program

    def quantizer(self, value: str) -> Any:
        """The quantizer of a value."""
        return self.program.ops[self.program.values[value].place - 1].quantizer

    @cached_property
    def _remakes(self) -> list[Call]:
        return [remake.call for remake in self.cover.keeper.again.values()]

    def _copies(self, i: int) -> tuple[str, str]:
        """What the passes of the linear layer i read: the backward both rows with an override."""
        return "row", "row" if i in self.program.run.overrides else "col"

    def _reads(self, calls: list[Call], text: str) -> bool:
        return any(argument.text == text for call in calls for argument in call.arguments)

    @cached_property
    def _backward(self) -> list[Call]:
        return [call for claim in self.cover.backward for call in claim.calls]

    # -- values --

    def _backward_copies(self, value: str) -> list[str]:
        i = self.program.values[value].place
        forward, backward = self._copies(i)
        wanted = [backward] if self._reads(self._backward, value) else []
        if self._reads(self._remakes, value):
            wanted.append(forward)
        return list(dict.fromkeys(wanted))

    def made(self, value: str) -> list[str]:
        """The copies of a value that the forward makes."""
        kept = [self.kept[value][0]] if value in self.kept else []
        return list(dict.fromkeys(("row", *kept)))

    def remade(self, value: str) -> list[str]:
        """The copies of a value that the backward makes again."""
        return self._backward_copies(value)

    @cached_property
    def kept(self) -> Mapping[str, tuple[str, Parts]]:
        """Of each quantized value that is saved, the copy and its parts."""
        found = {}
        for value in sorted(self.cover.keeper.kept):
            spec = self.space.spec(value)
            if spec.storage is not None:
                copy = self._copies(self.program.values[value].place)[1]
                specs = self.quantizer(value).part_specs(spec, copy)
                found[value] = copy, [(f"{value}_{k}", s) for k, s in enumerate(specs)]
        return found

    def gradient(self, gap: int) -> list[str]:
        """The copies of the gradient at a gap that the linear layer before it reads."""
        program = self.program
        if gap >= program.count or not program.kinds[gap].packs_gradient:
            return []
        wanted = ["row"] if program.flows[gap - 1] else []
        return wanted + ["col"] * any(program.gradient_names(gap - 1))

    # -- weights --

    def weight_parts(self, i: int, name: str, direction: str) -> dict[str, Parts]:
        """The parts of a quantized weight that a pass reads, by copy."""
        program, found = self.program, dict[str, Parts]()
        if (i, name) not in program.run.quantizers:
            return found
        variable = program.weight_names[i, name]
        forward, backward = self._copies(i)
        wanted = {forward} if direction == FORWARD else set()
        if direction == BACKWARD and self._reads(self._backward, f"q{variable}"):
            wanted.add(backward)
        if direction == BACKWARD and self._reads(self._remakes, f"q{variable}"):
            wanted.add(forward)
        quantizer, spec = program.run.quantizers[i, name], program.request.weights[variable]
        assert spec is not None
        for copy in sorted(wanted, reverse=True):
            specs = quantizer.part_specs(spec, copy)
            stem = "row" if quantizer.shared else copy
            found[copy] = [(f"{variable}_{stem}{k}", s) for k, s in enumerate(specs)]
        return found

    def weights(self) -> Iterator[tuple[int, str, tuple[str, ...]]]:
        """Quantized weights with the copies that some pass reads, in the order of parameters."""
        for i, name in self.program.weight_names:
            wanted = {
                copy
                for direction in (FORWARD, BACKWARD)
                for copy in self.weight_parts(i, name, direction)
            }
            if wanted and self.program.run.quantizers[i, name].shared:
                wanted = {"row"}
            if wanted:
                yield i, name, tuple(sorted(wanted, reverse=True))

    @cached_property
    def parameters(self) -> Parts:
        """The parts of all quantized weights, in the order in which they are handed in."""
        found = dict[str, Spec]()
        for i, name, _ in self.weights():
            for direction in (FORWARD, BACKWARD):
                for parts in self.weight_parts(i, name, direction).values():
                    found |= dict(parts)
        return list(found.items())
