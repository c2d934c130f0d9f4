"""`OPSGRAPH_CHECK=1`: after every fused step the source runs the reference ops and compares.

The lines stand in the generated source like all others; the first step that differs raises an error
that names it. Before every exchange between ranks these compare what they are about to do, for an
exchange of tensors that do not fit would hang.
"""

from collections.abc import Iterator, Sequence

from ..op import BACKWARD, FORWARD, differentiable
from ..plan.claims import Call, Claim
from ..plan.lines import Line, literal, value
from ..plan.program import Argument
from ..plan.writer import Writer
from .casting import promoted
from .expected import compare, compare_ranks, run_reference

_NAMES = {"check": compare, "check_ranks": compare_ranks, "run_reference": run_reference}
"""What the lines that are added call."""


def checked(
    writer: Writer, claim: Claim, lines: Sequence[Line], again: bool = False
) -> Sequence[Line]:
    """The lines of a step with those that check it; the hook is `Definitions.after`."""
    writer.namespace |= _NAMES
    step = _Step(writer, claim, {name for line in lines for name in line.makes})
    before = list(step.ranks())
    if again or claim.is_reference or not lines:
        return [*before, *lines]
    if claim.direction == FORWARD:
        lines = step.seeded(lines)
        step.forward()
    else:
        before.append(Line("bind", (value("dx"),), "ref_dx", note="check"))
        step.backward()
    return [*before, *lines, *step.lines]


class _Step:
    """The reference ops of one claim; `known` maps names to the variables that have their values.

    makes: the variables that the step makes.
    """

    def __init__(self, writer: Writer, claim: Claim, makes: set[str]) -> None:
        self.writer, self.claim, self.makes = writer, claim, makes
        self.space, self.program = writer.definitions.space, writer.program
        self.known = {name: name for name in claim.needs} | {"dx": "ref_dx"}
        self.lines: list[Line] = []

    def ranks(self) -> Iterator[Line]:
        """Compares ranks before a step that exchanges tensors."""
        program, claim = self.program, self.claim
        still = program.still[claim.direction]
        talks = [program.ops[i] for i in claim.ops if program.kinds[i].collective and not still[i]]
        for op in talks[:1]:
            step = literal(f"{claim.label} {program.specs[claim.stop]}")
            x = value(program.x[claim.start] if claim.direction == FORWARD else "dx")
            group = literal(op.group), literal(op.group_size)
            yield Line("check_ranks", (step, x, *group), note="check")

    def _reference(self, direction: str, i: int) -> Claim | None:
        claims = self.space.starting[direction][i]
        return next((claim for claim in claims if claim.is_reference), None)

    def _run(self, claim: Claim, call: Call, first: str) -> Sequence[str]:
        """Run a reference call on what is known. Returns the variables of what follows y or dx."""
        known = [a._replace(text=self.known.get(a.text, a.text)) for a in call.arguments]
        call = call._replace(arguments=tuple(known))
        gradients = differentiable(self.program.kinds[claim.start])
        want = "x", "row", "col", *claim.fuser.saves, *gradients
        names = [f"ref_{name}" if name else "_" for name in call.results]
        line = self.writer.call(claim, call, want, first, names)._replace(note="check")
        every = Argument("object", line.function, value=line.target), *line.arguments
        self.lines.append(line._replace(function="run_reference", arguments=every, target=None))
        casts = promoted(self.program, claim.start) if claim.direction == BACKWARD else {}
        for name, dtype in casts.items():
            if (made := f"ref_{name}") in (first, *names):
                self.lines.append(Line("cast", (value(made), literal(dtype)), made, note="check"))
        return names

    def _forward(self, i: int) -> None:
        """One op forward, unless a value that it needs is not at hand."""
        if (claim := self._reference(FORWARD, i)) is None:
            return
        y = self.program.x[i + 1]
        random = self.program.kinds[i].random
        repeated = next(self.space.remakes(claim), None)
        call, needs = repeated if random and repeated else (claim.calls[0], claim.needs)
        if (random and not repeated) or any(need not in self.known for need in needs):
            return
        for name, variable in zip(call.results, self._run(claim, call, f"ref_{y}"), strict=True):
            if name is not None:
                self.known.setdefault(name, variable)
        self.known.setdefault(y, f"ref_{y}")

    def _compare(self, name: str, variable: str, expected: str) -> None:
        if expected != variable:
            labels, pair = map(literal, (self.claim.label, name)), map(value, (variable, expected))
            self.lines.append(Line("check", (*labels, *pair), note="check"))

    def seeded(self, lines: Sequence[Line]) -> Sequence[Line]:
        """The lines of a forward step, which bind its seeds also where no backward reads them."""
        (line, *rest), call, kinds = lines, self.claim.calls[0], self.program.kinds
        random = [i for i in range(self.claim.start, self.claim.stop) if kinds[i].random]
        seeds = {self.program.name(n, i) for i in random for n in kinds[i].saves}
        seeds &= self.makes if call.wants else set(filter(None, call.results))
        self.makes |= seeds
        self.known |= {name: name for name in seeds}
        if seeds:
            names = tuple(name if name in self.makes else "_" for name in call.results)
            line = line._replace(results=(self.program.x[self.claim.stop], names))
        return [line, *rest]

    def forward(self) -> None:
        """Compare a forward step: its output and what it handed out."""
        for i in range(self.claim.start, self.claim.stop):
            self._forward(i)
        y = self.program.x[self.claim.stop]
        for name in sorted((self.makes & self.claim.gives) | {y}):
            self._compare(name, name, self.known.get(name, name))

    def backward(self) -> None:
        """Compare a backward step: its gradients, dx among them."""
        for i in range(self.claim.start, self.claim.stop):
            # Of a quantized weight the backward has but the copy for its own product.
            if not self.program.packed(i, "weight", FORWARD):
                self._forward(i)
        waits = self.program.request.late
        for i in reversed(range(self.claim.start, self.claim.stop)):
            claim = self._reference(BACKWARD, i)
            for call in claim.calls if claim else ():
                if call.function == "wgrad" and call.results[0] in waits:
                    continue
                values = [a.text for a in call.arguments if a.category == "value"]
                if any(name not in self.known for name in values):
                    note = f"{self.claim.label} is not checked: {values} needed"
                    self.lines.append(Line("pass", note=note))
                    return
                self._run(claim, call, "ref_dx")  # type: ignore[arg-type]
        for name in ("dx", *filter(None, self.claim.results)):
            variable = f"{name}_more" if f"{name}_more" in self.makes else name
            if variable in self.makes and name not in waits:
                self._compare(name, variable, f"ref_{name}")
