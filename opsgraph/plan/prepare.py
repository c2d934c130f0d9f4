"""The third function of a plan: it quantizes the weights that products read.

    prepare(weights, scales that are delayed) -> (parts, amaxes)

The forward takes the parts behind its other arguments; there is an amax for each scale. Each line
calls one bound function, of a format and the copies that some pass reads. It is chosen when the
plan is made, once for all calls. It is handed a weight and, where that is delayed, a scale, and
returns the parts of the copies in order, and then the amax, or None where there is nothing to note.
"""

from collections.abc import Callable
from typing import Any

from ..op import Spec
from .definitions import Definitions
from .lines import Function, Line, values
from .writer import Writer

Bind = Callable[[Any, Spec, tuple[str, ...]], tuple[str, Callable[..., Any]]]
"""Chooses for a quantizer, a weight and its copies: the function, and the backend that it is of."""
NOTHING = Function("", lambda: ((), ()), (), ())
"""The function of a plan without quantized weights."""


def write_prepare(definitions: Definitions, bind: Bind) -> Function:
    """The function that quantizes the weights of a plan."""
    if not definitions.prepared:
        return NOTHING
    program, quantizers = definitions.program, definitions.program.run.quantizers
    slots = [*program.weight_names.items()]
    prepared = [(*slots[place], copies) for place, copies, _ in definitions.prepared]
    names = [name for _, name, _ in prepared]
    delayed = [name for slot, name, _ in prepared if quantizers[slot].delayed]
    writer = Writer(definitions.space, [*names, *(f"{name}_scale" for name in delayed)])
    functions: dict[Any, Callable[..., Any]] = {}
    for slot, name, copies in prepared:
        quantizer, spec = quantizers[slot], program.request.weights[name]
        assert spec is not None
        backend, function = bind(quantizer, spec, copies)
        function = functions.setdefault((quantizer, copies, backend), function)
        called = writer.bind("_".join((quantizer.storage.name.upper(), *copies)), function)
        parts = definitions.operands[f"q{name}"].copies
        arguments, results = [name], [part for copy in copies for part in parts[copy]]
        if quantizer.delayed:
            arguments.append(f"{name}_scale")
            results.append(f"{name}_amax")
        note = f"{program.numbers[slot[0]]} {backend}"
        writer.add(Line(called, values(arguments), tuple(results), function, note=note))
    amaxes = [f"{name}_amax" for name in delayed]
    return writer.finish("prepare", values(definitions.parts), values(amaxes))
