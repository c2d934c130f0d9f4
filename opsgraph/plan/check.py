"""`OPSGRAPH_CHECK=1`: after every fused step the source runs the reference ops and compares.

The lines stand in the generated source like all others; the first step that differs raises an error
that names it. Before every exchange between ranks these compare what they are about to do, for an
exchange of tensors that do not fit would hang.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import OpsgraphError
from ..op import BACKWARD, FORWARD, differentiable

if TYPE_CHECKING:
    from .claims import Call, Claim, Space
    from .codegen import Writer

LINE = 256


def compare_ranks(step: str, x: Tensor, group: str, group_size: int) -> None:
    """Raises OpsgraphError on every rank if ranks differ in the step or in x's shape or dtype.

    Each sends one line of text, cut to `LINE` bytes.
    """
    told = f"{tuple(x.shape)} {x.dtype} in {step}".encode().ljust(LINE)[:LINE]
    mine = torch.frombuffer(bytearray(told), dtype=torch.uint8).to(x.device)
    ops = torch.ops._c10d_functional
    lines = ops.wait_tensor(ops.all_gather_into_tensor(mine, group_size, group)).view(-1, LINE)
    every = [bytes(line).decode(errors="replace").rstrip() for line in lines.tolist()]
    if len(set(every)) > 1:
        each = "; ".join(f"rank {rank} has {line}" for rank, line in enumerate(every))
        raise OpsgraphError(f"OPSGRAPH_CHECK: {step}: the ranks of group {group!r} differ: {each}")


def reference_calls(space: "Space", claim: "Claim") -> "Iterator[Call]":
    """What is run to check a backward step: its parameters have to be there."""
    for i in () if claim.is_reference else range(claim.start, claim.stop):
        for direction in (FORWARD, BACKWARD):
            for other in space.starting[direction][i]:
                yield from other.calls if other.is_reference else ()


class Checker:
    """Writes the reference lines for one claim; `known` maps names to variables at hand."""

    def __init__(self, writer: "Writer", claim: "Claim", label: str) -> None:
        self.writer, self.claim, self.label = writer, claim, label
        self.space, self.program = writer.space, writer.program
        self.known = {name: name for name in claim.needs} | {"dx": "ref_dx"}

    def _reference(self, direction: str, i: int) -> "Claim | None":
        found = [c for c in self.space.starting[direction][i] if c.is_reference]
        return found[0] if found else None

    def _call(self, claim: "Claim", call: "Call") -> tuple[str, set[str]]:
        named = [a._replace(text=self.known.get(a.text, a.text)) for a in call.arguments]
        gradients = differentiable(self.program.kinds[claim.start])
        want = ("x", "row", "col", *claim.fuser.saves, *gradients)
        text, reads = self.writer.call(claim, call._replace(arguments=tuple(named)), want)
        function, _, rest = text.partition("(")
        return f"run_reference({function}, {rest}", reads

    def _forward(self, i: int) -> bool:
        """One op forward; False if a value it needs is not at hand."""
        claim = self._reference(FORWARD, i)
        if claim is None:
            return True
        y = self.program.x(i + 1)
        random = self.program.kinds[i].random
        repeated = next(self.space.remakes(claim), None)
        call, needs = repeated if random and repeated else (claim.calls[0], claim.needs)
        if (random and not repeated) or any(need not in self.known for need in needs):
            return y in self.known
        text, reads = self._call(claim, call)
        made = [f"ref_{name}" if name else "_" for name in call.results]
        if call.function == "again":
            self.writer.add(f"ref_{y} = {text}", reads, [f"ref_{y}"], "check")
        else:
            right = f"({', '.join(made)},)" if made else "_"
            self.writer.add(f"ref_{y}, {right} = {text}", reads, [f"ref_{y}", *made], "check")
            self.known |= {
                result: variable
                for result, variable in zip(call.results, made, strict=True)
                if result is not None and result not in self.known
            }
        self.known.setdefault(y, f"ref_{y}")
        return True

    def _compare(self, name: str, found: str, expected: str) -> None:
        if expected != found:
            text = f"check({self.label!r}, {name!r}, {found}, {expected})"
            self.writer.add(text, [found, expected], [], "check")

    def forward(self, given: set[str]) -> None:
        """Compare a forward step: its output and what it handed out."""
        for i in range(self.claim.start, self.claim.stop):
            seeds = {
                self.program.name(n, i)
                for n in self.program.kinds[i].saves
                if self.program.kinds[i].random
            }
            self.known |= {name: name for name in seeds}
            self._forward(i)
        y = self.program.x(self.claim.stop)
        for name in sorted(given | {y}):
            self._compare(name, name, self.known.get(name, name))

    def backward(self, gradients: dict[str, str]) -> None:
        """Compare a backward step; `gradients` maps its results to variables, dx among them."""
        for i in range(self.claim.start, self.claim.stop):
            # Of a quantized weight the backward has but the copy for its own product.
            if not self.program.packed(i, "weight", FORWARD):
                self._forward(i)
        for i in reversed(range(self.claim.start, self.claim.stop)):
            claim = self._reference(BACKWARD, i)
            if claim is None:
                continue
            for call in claim.calls:
                values = [a.text for a in call.arguments if a.category == "value"]
                if any(name not in self.known for name in values):
                    self.writer.add("pass", note=f"{self.label} is not checked: {values} needed")
                    return
                text, reads = self._call(claim, call)
                made = [f"ref_{name}" if name else "_" for name in call.results]
                if call.function == "dgrad":
                    self.writer.add(f"ref_dx = {text}", reads, ["ref_dx"], "check")
                elif call.function == "wgrad":
                    self.writer.add(f"{made[0]} = {text}", reads, made, "check")
                else:
                    right = f"({', '.join(made)},)" if made else "_"
                    self.writer.add(f"ref_dx, {right} = {text}", reads, ["ref_dx", *made], "check")
        for name, variable in gradients.items():
            self._compare(name, variable, f"ref_{name}")
