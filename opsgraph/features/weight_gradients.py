"""Weight gradients that do not come back from the backward: delayed ones, and those in main_grad.

With `delay_wgrad_compute` the backward returns a call in a gradient's place, or a tensor where a
step has no other way, and `backward_dw` makes use of it. With `accumulate_into_main_grad` the
product adds to a buffer that an optimizer owns. Both count for weights that are factors of a
product and want a gradient; the op asks for them, or its Sequential for all.

The hooks are `Request.late`, `Request.accumulated` and `Definitions.after`.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..fuser import Fuser
from ..op import STORED
from ..plan.basic_ops import BasicOps
from ..plan.claims import Claim
from ..plan.lines import Line
from ..plan.program import Argument, Program
from ..plan.writer import Writer


def weight_gradients(
    flag: str, run: BasicOps, wanted: Collection[str], options: Mapping[str, Any]
) -> frozenset[str]:
    """The names of gradients that go the way which a flag asks for.

    wanted: what needs gradients, weights among it.
    """
    asked = [
        run.name(name, i)
        for i, name in run.slots
        if (options.get(flag) or getattr(run.ops[i], flag, False))
        and run.kinds[i].gemm
        and (run.kinds[i].wgrad or name == "weight")
    ]
    return frozenset(f"d{name}" for name in asked if name in wanted)


def send_elsewhere(
    writer: Writer, claim: Claim, lines: Sequence[Line], again: bool = False
) -> Sequence[Line]:
    """The lines of a step; products of weight gradients that go elsewhere are called by the op."""
    request = writer.program.request
    if not (request.late or request.accumulated):
        return lines
    return [_by_the_op(writer.program, claim, line) for line in lines]


def _by_the_op(program: Program, claim: Claim, line: Line) -> Line:
    gradient, request, fuser = line.results, program.request, isinstance(line.target, Fuser)
    into_main_grad = fuser and gradient in request.accumulated
    if not line.function.endswith("wgrad") or not (into_main_grad or gradient in request.late):
        return line
    (i,) = (i for i in claim.ops if gradient in program.gradient_names(i))
    function = line.target.wgrad if "." in line.function else line.target
    product = Argument("object", line.function, value=function)
    op, stored = program.resolve(i, ""), program.resolve(i, "weight" + STORED)
    assert op is not None
    arguments = (op, product, *line.arguments)
    if into_main_grad and stored:
        return line._replace(function="wgrad_by", arguments=(*arguments, stored))
    if gradient in request.late:
        return line._replace(function="weigh", arguments=arguments)
    return line
