"""Two straight-line Python functions for a cover, as text that tracebacks and pdb can show.

The contract:

    forward(ops, x0, extra inputs, weights, parts of quantized weights) -> (outputs, saved)
    backward(ops, dx, gradients of extra outputs, saved) -> a gradient for each input, or None

Amaxes that a recipe wants follow the outputs, and stand where their scales have no gradient.

The layers, each a file that knows those before it:

    planner      a Cover: which calls, in which order, what is kept and what is made again
    lines        a Line is one call as data, from which its text is printed
    writer       collects the lines of a function; has every variable defined that one reads
    codegen      the steps of both passes, what flows between them, what comes back

A recipe has definitions of its own: of quantized values, and of a third function, `prepare`, which
quantizes the weights that both are handed in parts. `After` changes the lines of a step.

There is one way to have a variable. `Writer.add` has it defined when the first line reads it: by
the call that makes it again, by a cast, by a load. What nothing defines is free, and the free
variables of the backward are what the forward saves. So the backward is written first.

Rules, each of them broken once:

- A variable is made once, but for gradients: `dx` flows from step to step, and `d3` adds up what
  arrives for the value that Tee 3 hands out. The first gradient that arrives binds it.
- What the caller has already, or gets twice, is returned as a view: autograd then refuses to have
  it changed in place.
- `saved` is emptied, for the list would hold every value until the end. Each variable is let go
  after its last use, but for inputs and weights: the caller holds them anyway, and nothing may
  overwrite them.
- A callee takes what it consumes from a list of one. The variable goes only if nothing reads it
  afterwards; the callee may then overwrite the value.
- Chains of values that are made again may be thousands long: no recursion.
- An op that passes its gradient on is no step of the backward: each of its inputs gets the gradient
  in its own dtype.
- Users name ops, values and parameters. `guards.names` keeps them apart from what the source adds.
- A plan outlives the modules that it was made for: lines hold no op and no program.
"""

from collections.abc import Iterable, Sequence

import torch

from ..op import BACKWARD, FORWARD
from ..op.functions import passes
from .claims import Call, Claim
from .lines import Function, Line, literal, value, values
from .program import Argument
from .writer import Definitions, Writer


def write(definitions: Definitions) -> tuple[Function, Function, tuple[str, ...]]:
    """The forward and the backward of a cover, and the variables that are saved."""
    backward = _Backward(definitions)
    function, saved = backward.written(), tuple(backward.free)
    return _forward(definitions, saved), function, saved


def _forward_step(
    writer: Writer, claim: Claim, call: Call, used: Iterable[str], again: bool = False
) -> Sequence[Line]:
    """The lines of a forward claim; of what it can hand out only `used` is bound."""
    y = writer.program.x[claim.stop]
    names = [name if name and name in used else "_" for name in call.results]
    want = [saved for saved, name in zip(claim.fuser.saves, names, strict=False) if name != "_"]
    want += writer.definitions.wanted(y, writer.direction)
    first = "_" if again and y not in used else y
    line = writer.call(claim, call, want, first, names)
    line = line._replace(note=f"{line.note}, again") if again else line
    return writer.after(claim, [line], again)


def _forward(definitions: Definitions, saved: Sequence[str]) -> Function:
    program, cover, run = definitions.program, definitions.cover, definitions.program.run
    arguments = [argument.name for argument in definitions.inputs]
    writer = Writer(definitions, FORWARD, "ops", *arguments)
    used = {*saved, *program.teed}
    for claim in cover.forward:
        writer.add(*_forward_step(writer, claim, claim.calls[0], used))
    outputs = [program.x[-1], *(program.x[i] for i in run.outputs)]
    shared = {n for n in outputs if outputs.count(n) > 1 or n in program.activations}
    if not (cover.forward or cover.backward or run.outputs):
        shared = set()  # a sequence that does nothing returns its input itself
    returned = [Argument("view" if name in shared else "value", name) for name in outputs]
    return writer.finish("forward", (*returned, *values(program.reports)), values(saved))


class _Backward(Writer):
    def __init__(self, definitions: Definitions) -> None:
        program = definitions.program
        outs = [program.name("d", i) for i in program.run.outputs if i in program.tapped]
        super().__init__(definitions, BACKWARD, "ops", "dx", *outs, "saved")
        self.sums = {program.name("d", i) for i in program.tapped}
        """Gradients of what several steps read."""
        self.together: dict[int, set[str]] = {}
        """What each call makes again."""
        for name, remake in self.cover.keeper.again.items():
            self.together.setdefault(id(remake.call), set()).add(name)

    def define(self, name: str) -> Sequence[Line]:
        if (remake := self.cover.keeper.again.get(name)) is None:
            return super().define(name)
        together = self.together[id(remake.call)]
        return _forward_step(self, remake.claim, remake.call, together, again=True)

    def written(self) -> Function:
        gap = self.program.count
        for claim in self.cover.backward:
            self.cross(range(claim.stop, gap))
            self.cross(claim.ops)
            self.step(claim)
            gap = claim.start
        self.cross(range(gap))
        results = self.results()
        if self.free:
            unpack = Line("bind", (value("saved"),), tuple(self.free))
            self.lines[:0] = unpack, Line("clear", (value("saved"),))
        arguments = self.definitions.inputs[: len(self.program.arguments)]  # but for parts
        return self.finish("backward", results, held=[argument.name for argument in arguments])

    def arrive(self, name: str, gradient: str, kind: torch.dtype | None = None) -> None:
        """A gradient for `name`, in the dtype `kind`: added to what arrived before."""
        first = name not in self.available
        if kind is not None:
            cast = name if first else f"{name}_more"
            self.add(Line("cast", (value(gradient), literal(kind)), cast))
            gradient = cast
        if not first:
            self.add(Line("add", (value(name), value(gradient)), name))
        elif gradient != name:
            self.add(Line("bind", (value(gradient),), name))

    def cross(self, ops: Sequence[int]) -> None:
        """Pass ops that are no steps: each input gets the gradient in its dtype."""
        program = self.program
        for i in reversed(ops):
            if not passes(program.kinds[i]) or not program.flows[i + 1]:
                continue
            kind = program.specs[i + 1].dtype
            for name in passes(program.kinds[i]):
                if (gradient := program.gradient(i, name)) is not None:
                    other = program.spec(program.extra(i, name)).dtype
                    self.arrive(gradient, "dx", other if other != kind else None)
            if program.flows[i] and program.specs[i].dtype != kind:
                self.add(Line("cast", (value("dx"), literal(program.specs[i].dtype)), "dx"))

    def step(self, claim: Claim) -> None:
        """Run a backward claim."""
        lines, sums = list[Line](), dict[str, str]()
        dx = "dx" if self.program.flows[claim.start] else "_"
        weighed, dy = claim.weighed, f"d{self.program.x[claim.stop]}"
        if weighed:
            lines.append(Line("bind", (value("dx"),), dy))
        for call in claim.calls:
            names = [name or "_" for name in call.results]
            sums |= {name: f"{name}_more" for name in names if name in self.sums & self.available}
            others = sums | {name: variable for name, (variable, _) in weighed.items()}
            bound = [others.get(name, name) for name in names]
            if {dx, *bound} == {"_"}:
                continue
            gradients = zip(claim.fuser.declaration.gradients, names, strict=True)
            want = ["x"] * (dx == "dx") + [g.text for g, name in gradients if name != "_"]
            want += self.definitions.gradient(claim.start)
            lines.append(self.call(claim, call, want, dx, bound))
        for gradient, (_, product) in weighed.items():
            (call,) = (call for call in product.calls if call.function == "wgrad")
            arguments = (a._replace(text=dy) if a.text == "dx" else a for a in call.arguments)
            call = call._replace(arguments=tuple(arguments))
            lines.append(self.call(product, call, (), "_", [gradient]))
        self.add(*self.after(claim, lines))
        makes = {name for line in lines for name in line.makes}
        for name, gradient in sums.items():
            if gradient in makes:
                self.arrive(name, gradient)

    def results(self) -> tuple[Argument, ...]:
        """Gradients in the order of the forward's inputs, in the dtype of each."""
        compute, waits = self.program.request.compute, self.program.request.late
        inputs = [(argument.gradient, argument.spec) for argument in self.definitions.inputs]
        for gradient, spec in inputs if compute else ():
            if gradient and spec and spec.dtype != compute and gradient not in waits:
                cast = value(gradient), literal(spec.dtype)
                self.add(Line("cast unless None", cast, gradient, note="autocast"))
        return tuple(value(gradient) if gradient else literal(None) for gradient, _ in inputs)
