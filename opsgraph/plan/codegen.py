"""Source text for a cover: two straight-line Python functions that tracebacks and pdb can show."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..guards.results import First
from ..op import BACKWARD, FORWARD, differentiable
from ..op.functions import backward_functions, passes
from .check import Checker
from .claims import Call, Claim, Space
from .compiled import Function, base_namespace, compiled
from .names import free
from .planner import Cover
from .preamble import write_parts, write_preamble
from .program import Argument
from .quantized import Packing


@dataclass
class Line:
    """One statement, with the variables that it reads and those that it makes."""

    text: str
    reads: set[str] = field(default_factory=set)
    makes: set[str] = field(default_factory=set)
    note: str = ""
    moves: set[str] = field(default_factory=set)
    """Variables that stand in the text as lists of one."""


class Writer:
    """Collects the lines of one function."""

    def __init__(self, space: Space, cover: Cover, check: bool) -> None:
        self.space, self.cover, self.program = space, cover, space.program
        self.check = check
        self.namespace = base_namespace()
        self._bound: dict[str, Any] = {}
        self.lines: list[Line] = []

    def add(
        self, text: str, reads: Iterable[str] = (), makes: Iterable[str] = (), note: str = "",
        moves: Iterable[str] = (),
    ) -> None:  # fmt: skip
        """Append a statement."""
        self.lines.append(Line(text, set(reads), set(makes) - {"_"}, note, set(moves)))

    def bind(self, name: str, target: Any) -> str:
        """What an object is called in the source; a number is added where two share a name."""
        for text in free(name, self.space.roots):
            if self._bound.setdefault(text, target) is target:
                self.namespace.setdefault(text, target)
                return text
        raise AssertionError

    def name_of(self, claim: Claim) -> str:
        """The fuser's name in the source."""
        target = claim.fuser.kind if claim.is_reference else claim.fuser  # type: ignore[attr-defined]
        name = self.bind(claim.fuser.name, target)
        module = target.__module__ if claim.is_reference else type(target).__module__
        if self.namespace[name] is target and not module.startswith("opsgraph."):
            where = self.program.labels[claim.start] if claim.is_reference else _label(claim)
            self.namespace[name] = First(target, where)
        return name

    def text(self, argument: Argument) -> str:
        """An argument as it stands in the source."""
        if argument.category != "object":
            return argument.text
        return self.bind(argument.text.strip("<>"), argument.value)

    def quantizer(self, made: Any) -> str:
        """A quantizer's name in the source."""
        same = (known for known in self._bound.values() if type(known) is type(made))
        same = (known for known in same if known == made)
        return self.bind(made.storage.name.upper(), next(same, made))

    def call(self, claim: Claim, call: Call, want: Sequence[str]) -> tuple[str, set[str]]:
        """The text of a call, and the variables that it reads."""
        given = [f"[{a.text}]" if a.moved else self.text(a) for a in call.arguments]
        if call.wants:
            words = claim.fuser.wants
            given.append(f"want={tuple(words.get(name, name) for name in want)!r}")
        reads = {a.text for a in call.arguments if a.category in ("value", "weight", "gradient")}
        function = f"{self.name_of(claim)}.{call.function}"
        target = self.namespace[self.name_of(claim)]
        if isinstance(target, First):
            target.counts[call.function].add(len(call.results))
        if claim.is_reference and claim.direction == BACKWARD:
            kind = claim.fuser.kind  # type: ignore[attr-defined]
            found = backward_functions(kind)[call.function]
            if found is not getattr(kind, call.function):  # derived from fwd
                suffix = "" if call.function == "bwd" else f"_{call.function}"
                function = self.bind(f"{kind.__name__}_vjp{suffix}", found)
            if call.function == "wgrad" and call.results[0] in self.program.waits:
                given.insert(0, function)
                function = f"{given[1]}.weigh"
        return f"{function}({', '.join(given)})", reads

    def compare_ranks(self, claim: Claim, x: str) -> None:
        """Under OPSGRAPH_CHECK, compare ranks before a step that exchanges tensors."""
        program = self.program
        still = program.still(claim.direction)
        talks = [i for i in claim.ops if program.kinds[i].collective and not still[i]]
        if not self.check or not talks:
            return
        op, step = program.ops[talks[0]], f"{_label(claim)} {program.specs[claim.stop]}"
        text = f"check_ranks({step!r}, {x}, {op.group!r}, {op.group_size})"
        self.add(text, [x], [], "check")

    def finish(self, name: str, parameters: Sequence[str]) -> Function:
        """The function, with variables deleted after their last use."""
        last: dict[str, int] = {}
        for number, line in enumerate(self.lines):
            last |= dict.fromkeys(line.reads | line.makes, number)
        made = set().union(*(line.makes for line in self.lines))
        text = [f"def {name}({', '.join(parameters)}):"]
        for number, line in enumerate(self.lines):
            dying = [v for v in line.moves if v in made and last[v] == number]
            for v in sorted(dying):  # so that the list alone has it
                text.append(f"    {v} = [{v}]")
                line.text = line.text.replace(f"[{v}]", v)
            body = f"    {line.text}"
            text.append(f"{body:<70}  # {line.note}" if line.note else body)
            if line.text.startswith("return"):
                break
            dead = sorted(v for v in line.reads | line.makes if v in made and last[v] == number)
            if dead:
                text.append(f"    del {', '.join(dead)}")
        source = "\n".join(text) + "\n"
        return compiled(name, source, self.namespace)


def _note(claim: Claim) -> str:
    return f"{claim.where} {claim.fuser.backend}"


def _label(claim: Claim) -> str:
    return f"{claim.direction} {claim.where} {claim.fuser.name} ({claim.fuser.backend})"


def emit_forward(
    writer: Writer, claim: Claim, call: Call, used: set[str], copies: Packing, note: str = ""
) -> None:
    """Run a forward claim; of what it can hand out only `used` is bound."""
    program = writer.program
    y = program.x(claim.stop)
    y = y if note == "" or y in used else "_"
    text_note = _note(claim) + note
    writer.compare_ranks(claim, program.x(claim.start))
    if call.function == "again":
        text, reads = writer.call(claim, call, ())
        writer.add(f"{y} = {text}", reads, [y], text_note)
        return
    saves = claim.fuser.saves
    names = [n if n in used else "_" for n in (r or "_" for r in call.results)]
    if y in names:  # an op that saves its own output
        names = ["_" if n == y else n for n in names]
    want = [s for s, n in zip(saves, names, strict=True) if n != "_"]
    if program.specs[claim.stop].storage is not None:
        want += copies.remade(y) if note else copies.made(y)
    text, reads = writer.call(claim, call, want)
    right = f"({', '.join(names)},)" if set(names) - {"_"} else "_"
    writer.add(f"{y}, {right} = {text}", reads, [y, *names], text_note)


def write_forward(space: Space, cover: Cover, saved: Sequence[str], check: bool) -> Function:
    """`forward(ops, x0, extras, weights, parts)` returns `(outputs, saved)`, both tuples.

    parts: of quantized weights, see `packing`. amaxes that a recipe wants follow the outputs.
    """
    writer, program = Writer(space, cover, check), space.program
    copies = Packing(space, cover)
    parameters = ["ops", *program.arguments, *(name for name, _ in copies.parameters)]
    stored = write_preamble(writer, copies, FORWARD, saved)
    used = set(cover.keeper.kept) | space.teed()
    for claim in cover.forward:
        emit_forward(writer, claim, claim.calls[0], used, copies)
        if check and not claim.is_reference:
            Checker(writer, claim, _label(claim)).forward(used & claim.gives)
    values = [program.x(program.count), *(program.x(i) for i in program.run.outputs)]
    # A value that the caller has already, or gets twice, is a view: autograd then refuses to have
    # it changed in place.
    shared = {n for n in values if values.count(n) > 1 or n in program.activations}
    if not (cover.forward or cover.backward or program.run.outputs):
        shared = set()  # a sequence that does nothing returns its input itself
    outputs = [f"{name}.view_as({name})" if name in shared else name for name in values]
    outputs += program.reports
    write_parts(writer, copies)
    kept = [stored.get(name, name) for name in saved]
    text = f"return ({_commas(outputs)}), ({_commas(kept)})"
    writer.add(text, {o.split(".")[0] for o in outputs} | set(kept))
    return writer.finish("forward", parameters)


def _commas(names: Sequence[str]) -> str:
    return "".join(f"{name}, " for name in names).strip()


class _Backward:
    def __init__(self, space: Space, cover: Cover, saved: Sequence[str], check: bool) -> None:
        self.check = check
        self.program, self.space = space.program, space
        self.writer = Writer(space, cover, check)
        self.cover, self.saved = cover, saved
        self.copies = Packing(space, cover)
        self.have = {
            self.program.tee(i) for i in self.program.run.outputs if i in self.program.tapped
        }
        self.made: set[str] = set()

    def unpack(self) -> None:
        """Take what was saved out of its list: each value the forward made dies after its use."""
        if not self.saved:
            return
        made = set(self.saved).difference(self.program.arguments)
        self.writer.add(f"({_commas(self.saved)}) = saved", [], made)
        self.writer.add("saved.clear()")

    def arrive(self, name: str, value: str) -> None:
        """A gradient `value` for `name`: the first of a channel binds it, later ones are added."""
        total = f"{name} + {value}" if name in self.have else value
        self.writer.add(f"{name} = {total}", [name, value.partition(".")[0]], [name])
        self.have.add(name)

    def cross(self, i: int) -> None:
        """Pass an op that is no step in the backward: each input gets the gradient in its dtype."""
        program = self.program
        if not passes(program.kinds[i]) or not program.flows[i + 1]:
            return
        names = zip(differentiable(program.kinds[i]), program.gradient_names(i), strict=True)
        dtype = program.specs[i + 1].dtype
        for name, gradient in names:
            if name in passes(program.kinds[i]) and gradient is not None:
                other = program.value_spec(program.extra(i, name)).dtype
                self.arrive(gradient, "dx" if other == dtype else f"dx.to({other})")
        if program.flows[i] and program.specs[i].dtype != dtype:
            self.writer.add(f"dx = dx.to({program.specs[i].dtype})", ["dx"], ["dx"])

    def remake(self, name: str) -> None:
        """Make a value again, and first what that needs: on a stack, for chains may be long."""
        again = self.cover.keeper.again
        waiting = [(name, False)]
        while waiting:
            name, ready = waiting.pop()
            if ready:
                remake = again[name]
                also = {n for n, other in again.items() if other.call is remake.call} | {name}
                self.made |= also
                emit_forward(self.writer, remake.claim, remake.call, also, self.copies, ", again")
            elif name in again and name not in self.made:
                self.made.add(name)
                waiting.append((name, True))
                waiting += [(need, False) for need in reversed(again[name].needs)]

    def step(self, claim: Claim) -> None:
        """Run a backward claim."""
        program, writer = self.program, self.writer
        checked = self.check and not claim.is_reference
        writer.compare_ranks(claim, "dx")
        if checked:
            writer.add("ref_dx = dx", ["dx"], ["ref_dx"], "check")
        results: dict[str, str] = {}
        for call in claim.calls:
            for argument in call.arguments:
                if argument.category == "value":
                    self.remake(argument.text)
            names = [n or "_" for n in call.results]
            channels = {n for n in names if n in {program.tee(i) for i in program.tapped}}
            bound = [f"{n}_more" if n in channels and n in self.have else n for n in names]
            dx = "dx" if program.flows[claim.start] else "_"
            gradients = claim.fuser.declaration.gradients
            want = ["x"] * (dx == "dx") + [
                g.text for g, n in zip(gradients, names, strict=True) if n != "_"
            ]
            want += self.copies.gradient(claim.start)
            text, reads = writer.call(claim, call, want)
            note = _note(claim)
            if call.function == "dgrad":
                writer.add(f"dx = {text}", reads, ["dx"], note)
                continue
            if call.function == "wgrad":
                writer.add(f"{bound[0]} = {text}", reads, bound, note)
            else:
                right = f"({', '.join(bound)},)" if set(bound) - {"_"} else "_"
                if (dx, right) == ("_", "_"):
                    continue
                moves = [a.text for a in call.arguments if a.moved]
                writer.add(f"{dx}, {right} = {text}", reads, [dx, *bound], note, moves)
            results |= {"dx": dx} | dict(zip(names, bound, strict=True))
            for name, value in zip(names, bound, strict=True):
                if name != value:
                    self.arrive(name, value)
                elif name in channels:
                    self.have.add(name)
        if checked:
            unknown = {"_", *program.waits}
            found = {n: value for n, value in results.items() if unknown.isdisjoint((n, value))}
            Checker(writer, claim, _label(claim)).backward(found)

    def finish(self) -> Function:
        program = self.program
        outs = [program.tee(i) for i in program.run.outputs if i in program.tapped]
        parameters = ["ops", "dx", *outs, "saved"]
        self.unpack()
        write_preamble(self.writer, self.copies, BACKWARD, self.saved)
        gap = program.count
        for claim in self.cover.backward:
            for i in range(gap - 1, claim.stop - 1, -1):
                self.cross(i)
            for i in reversed(claim.ops):
                self.cross(i)
            self.step(claim)
            gap = claim.start
        for i in range(gap - 1, -1, -1):
            self.cross(i)
        results = self._results()
        self.writer.add(f"return ({_commas(results)})", [r for r in results if r != "None"])
        return self.writer.finish("backward", parameters)

    def _results(self) -> list[str]:
        """Gradients in the order of forward's inputs, in the dtype of each."""
        program, compute = self.program, self.program.request.compute
        wanted = program.request.gradients | program.reported
        results = []
        for name, spec in program.arguments.items():
            gradient = "dx" if name == "x0" else f"d{name}"
            if spec is None or name not in wanted:
                gradient = "None"
            elif compute not in (None, spec.dtype) and gradient not in program.waits:
                text = f"None if {gradient} is None else {gradient}.to({spec.dtype})"
                self.writer.add(f"{gradient} = {text}", [gradient], [gradient], "autocast")
            results.append(gradient)
        return results + ["None"] * len(self.copies.parameters)


def write_backward(space: Space, cover: Cover, saved: Sequence[str], check: bool) -> Function:
    """`backward(ops, dx, d of extra outputs, saved)` returns a gradient for each input, or None.

    saved: a list, which is emptied, so that no caller keeps a value that is used no more. A weight
    gradient that waits for `backward_dw` is the call that gives it.
    """
    return _Backward(space, cover, saved, check).finish()
