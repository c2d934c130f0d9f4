"""The third function of a plan: it quantizes the weights that products read.

    prepare(weights, scales that are delayed) -> (parts, amaxes)

The forward takes the parts behind its other arguments; there is an amax for each scale. Each line
calls one bound function, of a format and the copies that some pass reads. It is chosen when the
plan is made, once for all calls. It is handed a weight and, where that is delayed, a scale, and
returns the parts of the copies in order, and then the amax, or None where there is nothing to note.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..op import Spec
from .definitions import Definitions
from .lines import Function, Line, Writer
from .program import Argument


class Prepared(NamedTuple):
    """A weight that is handed in quantized: its place among the weights, its copies."""

    place: int
    copies: tuple[str, ...]
    parts: int
    """How many tensors each copy is made of."""


Bind = Callable[[Any, Spec, tuple[str, ...]], tuple[str, Callable[..., Any]]]
"""Chooses for a quantizer, a weight and its copies: the function, and the backend that it is of."""
NOTHING = Function("", lambda: ((), ()), (), ())
"""The function of a plan without quantized weights."""


def prepared(definitions: Definitions) -> Iterable[Prepared]:
    """The weights that are handed in quantized, in the order of arguments."""
    run, request = definitions.program.run, definitions.program.request
    for i, name, copies in definitions.weights:
        spec = request.weights[definitions.program.weight_names[i, name]]
        count = len(run.quantizers[i, name].part_specs(spec, copies[0]))
        yield Prepared(run.slots.index((i, name)), copies, count)


def write_prepare(definitions: Definitions, bind: Bind) -> Function:
    """The function that quantizes the weights of a plan."""
    program, functions = definitions.program, dict[Any, Any]()
    weights, scales, parts, amaxes = (list[str]() for _ in range(4))
    steps = []
    for place, copies, count in prepared(definitions):
        i, name = program.run.slots[place]
        variable, quantizer = program.weight_names[i, name], program.run.quantizers[i, name]
        spec = program.request.weights[variable]
        assert spec is not None
        backend, function = bind(quantizer, spec, copies)
        function = functions.setdefault((quantizer, copies, backend), function)
        called = "_".join((quantizer.storage.name.upper(), *copies))
        weights.append(variable)
        arguments, results = (
            [variable],
            [f"{variable}_{c}{k}" for c in copies for k in range(count)],
        )
        parts += results
        if quantizer.delayed:
            scales.append(f"{variable}_scale")
            amaxes.append(f"{variable}_amax")
            arguments, results = [variable, scales[-1]], [*results, amaxes[-1]]
        note = f"{program.numbers[i]} {backend}"
        steps.append(Line(called, _values(arguments), tuple(results), function, note=note))
    if not steps:
        return NOTHING
    writer = Writer(definitions.space, weights + scales)
    writer.add(*(step._replace(function=writer.bind(step.function, step.target)) for step in steps))
    return writer.finish("prepare", _values(parts), _values(amaxes))


def _values(names: Iterable[str]) -> tuple[Argument, ...]:
    return tuple(Argument("value", name) for name in names)
