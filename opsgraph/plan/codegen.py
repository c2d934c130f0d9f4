"""Two straight-line Python functions for a cover, as text that tracebacks and pdb show.

The contract:

    forward(ops, x0, extra inputs, weights, parts of quantized weights) -> (outputs, saved)
    backward(ops, dx, gradients of extra outputs, saved) -> a gradient for each input, or None

Amaxes that a recipe wants follow the outputs, and stand where their scales have no gradient. A
weight gradient that waits for `backward_dw` is the call that gives it (`weigh`).

The layers, each a file that knows those before it:

    planner      a Cover: which calls, in which order, what is kept and what is made again
    lines        a Line is one call as data; a Writer collects those of a function, prints them
    definitions  what variables mean that no step makes: casts, quantized values and their parts
    check        under OPSGRAPH_CHECK, the lines that compare a step with the reference ops
    codegen      the steps of both passes, what flows between them, what comes back
    verify       each variable that is read was made, and not let go before

There is one way to have a variable. `Writer.need` has it defined when the first line reads it: by
the call that makes it again, a cast, a load. What nothing defines is free, and the free variables
of the backward are what the forward saves. So the backward is written first.

Rules, each of them broken once:

- A variable is made once, but for gradients: `dx` flows from step to step, and what several steps
  read collects a sum (`d3`). The first gradient that arrives binds it.
- What the caller has, or gets twice, is returned as a view: autograd refuses to have it changed in
  place.
- `saved` is emptied, for a list would hold every value until the end; each variable is let go after
  its last use. Inputs and weights are not: the caller holds them, so nothing may overwrite them.
- What a step is handed to consume it takes from a list of one. Only if the variable dies there is
  the list the only one to have it.
- Chains of values that are made again may be thousands long: no recursion.
- An op that passes its gradient on is no step of the backward: each of its inputs gets the gradient
  in its own dtype.
- Users name ops, values and parameters. `names` keeps them apart from all that the source adds.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..op import BACKWARD, FORWARD, differentiable
from ..op.functions import passes
from . import verify as verifying
from .check import Checks
from .claims import Call, Claim, Space
from .definitions import Definitions, dtype
from .lines import Function, Line, Results, Writer
from .planner import Cover
from .program import Argument


class Functions(NamedTuple):
    """Both functions of a plan, the variables that are saved, and what else is defined."""

    forward: Function
    backward: Function
    saved: tuple[str, ...]
    definitions: Definitions


def write(space: Space, cover: Cover, check: bool) -> Functions:
    """The functions of a cover. check: with lines that compare every step with the reference."""
    definitions = Definitions(space, cover)
    backward = _Backward(definitions, check)
    backward_function = backward.written()
    saved = tuple(backward.free)
    forward = _Forward(definitions, saved, check)
    functions = Functions(forward.written(), backward_function, saved, definitions)
    if check or verifying.every:
        verifying.verify(functions.forward, functions.backward)
    return functions


def _values(names: Iterable[str], category: str = "value") -> tuple[Argument, ...]:
    return tuple(Argument(category, name) for name in names)


class _Pass(Writer):
    """What both functions have in common."""

    def __init__(
        self, definitions: Definitions, direction: str, parameters: Sequence[str], check: bool
    ) -> None:
        super().__init__(definitions.space, parameters)
        self.definitions, self.cover = definitions, definitions.cover
        self.direction = direction
        checks = Checks(self) if check else None
        self.after: Callable[..., Sequence[Line]] = checks.after if checks else _unchecked

    def define(self, name: str) -> Sequence[Line]:
        return self.definitions.define(name, self.direction, self)

    def forward_step(
        self, claim: Claim, call: Call, used: Iterable[str], again: bool = False
    ) -> Sequence[Line]:
        """The lines of a forward claim; of what it can hand out only `used` is bound."""
        y = self.program.x(claim.stop)
        first = "_" if again and y not in used else y
        note = f"{claim.where} {claim.fuser.backend}{', again' * again}"
        if call.function == "again":
            return self.after(claim, [self.call(claim, call, (), first, note)], again)
        names = [n if n and n in used else "_" for n in call.results]
        want = [s for s, n in zip(claim.fuser.saves, names, strict=True) if n != "_"]
        if self.program.specs[claim.stop].storage is not None:
            want += self.definitions.made(y, self.direction)
        results: Results = first, _unless_empty(names)
        return self.after(claim, [self.call(claim, call, want, results, note)], again)


def _unchecked(claim: Claim, lines: Sequence[Line], again: bool = False) -> Sequence[Line]:
    return lines


def _unless_empty(names: Sequence[str]) -> Results:
    return tuple(names) if set(names) - {"_"} else "_"


class _Forward(_Pass):
    def __init__(self, definitions: Definitions, saved: Sequence[str], check: bool) -> None:
        arguments = [argument.name for argument in definitions.inputs]
        super().__init__(definitions, FORWARD, ["ops", *arguments], check)
        self.saved = saved

    def written(self) -> Function:
        program, run = self.program, self.program.run
        used = {*self.saved, *self.space.teed()}
        for claim in self.cover.forward:
            self.add(*self.forward_step(claim, claim.calls[0], used))
        outputs = [program.x(program.count), *(program.x(i) for i in run.outputs)]
        shared = {n for n in outputs if outputs.count(n) > 1 or n in program.activations}
        if not (self.cover.forward or self.cover.backward or run.outputs):
            shared = set()  # a sequence that does nothing returns its input itself
        returned = [Argument("view" if name in shared else "value", name) for name in outputs]
        returned += _values(program.reports)
        return self.finish("forward", tuple(returned), _values(self.saved))


class _Backward(_Pass):
    def __init__(self, definitions: Definitions, check: bool) -> None:
        program = definitions.program
        outs = [program.tee(i) for i in program.run.outputs if i in program.tapped]
        super().__init__(definitions, BACKWARD, ["ops", "dx", *outs, "saved"], check)
        self.sums = {program.tee(i) for i in program.tapped}
        """Gradients of what several steps read."""
        self.together: dict[int, set[str]] = {}
        """What each call makes again."""
        for name, remake in self.cover.keeper.again.items():
            self.together.setdefault(id(remake.call), set()).add(name)

    def define(self, name: str) -> Sequence[Line]:
        if (remake := self.cover.keeper.again.get(name)) is None:
            return super().define(name)
        together = self.together[id(remake.call)]
        return self.forward_step(remake.claim, remake.call, together, again=True)

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
            unpack = Line("bind", _values(["saved"]), tuple(self.free))
            self.lines[:0] = unpack, Line("clear", _values(["saved"]))
        names = (argument.name for argument in self.definitions.inputs)
        held = [name for name in names if name not in self.definitions.parts]
        return self.finish("backward", results, held=held)

    def arrive(self, name: str, value: str, kind: Argument | None = None) -> None:
        """A gradient `value` for `name`, in the dtype `kind`: added to what arrived before."""
        first = name not in self.available
        if kind is not None:
            cast = name if first else f"{name}_more"
            self.add(Line("cast", (*_values([value]), kind), cast))
            value = cast
        if not first:
            self.add(Line("add", _values([name, value]), name))
        elif value != name:
            self.add(Line("bind", _values([value]), name))

    def cross(self, ops: Sequence[int]) -> None:
        """Pass ops that are no steps: each input gets the gradient in its dtype."""
        program = self.program
        for i in reversed(ops):
            if not passes(program.kinds[i]) or not program.flows[i + 1]:
                continue
            names = zip(differentiable(program.kinds[i]), program.gradient_names(i), strict=True)
            kind = program.specs[i + 1].dtype
            for name, gradient in names:
                if name in passes(program.kinds[i]) and gradient is not None:
                    other = program.spec(program.extra(i, name)).dtype
                    self.arrive(gradient, "dx", dtype(other) if other != kind else None)
            if program.flows[i] and program.specs[i].dtype != kind:
                self.add(Line("cast", (*_values(["dx"]), dtype(program.specs[i].dtype)), "dx"))

    def step(self, claim: Claim) -> None:
        """Run a backward claim."""
        lines: list[Line] = []
        sums = []
        dx = "dx" if self.program.flows[claim.start] else "_"
        gradients = claim.fuser.declaration.gradients
        weighed, dy = claim.weighed, f"d{self.program.x(claim.stop)}"
        if weighed:
            lines.append(Line("bind", _values(["dx"]), dy))
        for call in claim.calls:
            names = [name or "_" for name in call.results]
            bound = [
                f"{name}_more" if name in self.sums & self.available else name for name in names
            ]
            bound = [weighed[name][0] if name in weighed else name for name in bound]
            want = ["x"] * (dx == "dx")
            want += [g.text for g, n in zip(gradients, names, strict=True) if n != "_"]
            want += self.definitions.gradient(claim.start)
            results: Results = dx, _unless_empty(bound)
            if call.function in ("dgrad", "wgrad"):
                results = "dx" if call.function == "dgrad" else bound[0]
            elif results == ("_", "_"):
                continue
            note = f"{claim.where} {claim.fuser.backend}"
            lines.append(self.call(claim, call, want, results, note))
            sums += [(n, b) for n, b in zip(names, bound, strict=True) if b == f"{n}_more"]
        for gradient, (_, product) in weighed.items():
            (call,) = (call for call in product.calls if call.function == "wgrad")
            given = (a._replace(text=dy) if a.text == "dx" else a for a in call.arguments)
            call, note = call._replace(arguments=tuple(given)), f"{product.where} reference"
            lines.append(self.call(product, call, (), gradient, note))
        self.add(*self.after(claim, lines))
        for name, value in sums:
            self.arrive(name, value)

    def results(self) -> tuple[Argument, ...]:
        """Gradients in the order of the forward's inputs, in the dtype of each."""
        compute, waits = self.program.request.compute, self.program.elsewhere.waits
        results = []
        for argument in self.definitions.inputs:
            if (gradient := argument.gradient) is None:
                results.append(Argument("literal", "None"))
                continue
            assert argument.spec is not None
            if compute not in (None, argument.spec.dtype) and gradient not in waits:
                given = (*_values([gradient]), dtype(argument.spec.dtype))
                self.add(Line("cast unless None", given, gradient, note="autocast"))
            results.append(Argument("value", gradient))
        return tuple(results)
