"""What the passes of a plan expect of their operands: the plan's specs, by the ops that read them.

What a user's op alone reads is left to it: it may save another thing than it says.
"""

from collections.abc import Iterator, Sequence
from functools import partial

from ..guards.names import of_opsgraph
from ..guards.operands import Operand, Operands
from ..op import Spec
from ..plan import Plan
from ..plan.lines import Function, Line


def _specs(
    plan: Plan, which: str, parameters: Sequence[str]
) -> Iterator[tuple[str, str, Spec | None]]:
    """The operands that a pass has specs of: their variables, what errors call them, the specs.

    An extra input that its op checks itself has none. parameters: of the function, after `ops`.
    """
    specs = plan.specs
    inputs = [
        (name, None if dims is None and k < specs.first_weight else spec)
        for k, (name, spec, dims, _, _) in enumerate(specs.inputs)
    ]
    if which == "backward":
        yield parameters[0], "the gradient of the output", specs.outputs[0]
        for variable, k in zip(parameters[1:], specs.taps, strict=False):
            yield variable, f"the gradient of output {k}", specs.outputs[k]
        for name, spec, place in specs.saved:
            yield name, name, spec if place is None else inputs[place][1]
    elif which == "forward":
        yield from ((name, name, spec) for name, spec in inputs)
    else:
        for variable, (weight, _, _) in zip(parameters, specs.prepared, strict=False):
            yield variable, *inputs[specs.first_weight + weight]


def operands(plan: Plan, which: str, function: Function, names: Sequence[str]) -> Operands:
    """Those of a pass. names: by which its lines read them."""
    readers, places = _readers(plan, function), {name: k for k, name in enumerate(names)}
    expected: list[Operand | None] = [None] * len(names)
    parameters = function.parameters[function.parameters[:1] == ("ops",) :]
    for variable, shown, spec in _specs(plan, which, parameters):
        where, k = readers.get(variable), places.get(variable)
        if spec is not None and where is not None and k is not None:
            device, factor = spec.device, spec.factor
            expected[k] = Operand(where, shown, spec.shape, spec.dtype, device, factor)
    return Operands(which, expected, partial(_label, plan.numbers, plan.labels))


def _readers(plan: Plan, function: Function) -> dict[str, str]:
    """The ops, as lines note them, that first read each variable of the pass's beginning."""
    readers: dict[str, str] = {}
    where = plan.numbers[-1] if plan.numbers else "input"
    for line in reversed(function.lines):
        if line.function == "bind" and not isinstance(line.results, str):
            continue  # what was saved, out of its list
        own = where = line.note if _first(line.note) in plan.numbers else where
        if line.function == "bind":
            own = readers.get(line.results, "")
        for name in line.makes:
            readers.pop(name, None)
        if own and line.function not in ("clear", "pass", "return") and not _users(line):
            readers |= dict.fromkeys(line.reads, own)
    return readers


def _users(line: Line) -> bool:
    """Whether a line calls a function of a user's."""
    return line.target is not None and not of_opsgraph(line.target)


def _first(note: str) -> str:
    """The first op of a line."""
    return note.partition(" ")[0].partition("-")[0]


def _label(numbers: Sequence[str], labels: Sequence[str], note: str) -> str:
    """What errors call the ops of a line."""
    if (first := _first(note)) not in numbers:
        return note
    start, last = numbers.index(first), note.partition(" ")[0].partition("-")[2]
    stop = numbers.index(last) if last in numbers else start
    return "+".join(dict.fromkeys(labels[start : stop + 1]))
