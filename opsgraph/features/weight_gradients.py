"""Weight gradients that do not come back from the backward: delayed ones, and those in main_grad.

With `delay_wgrad_compute` the backward returns a call in a gradient's place, or a tensor where a
step has no other way, and `backward_dw` makes use of it. With `accumulate_into_main_grad` the
product adds to a buffer that an optimizer owns. Both count for weights that are factors of a
product and want a gradient; the op asks for them, or its Sequential for all.

The hooks are `Request.late`, `Request.accumulated`, `Definitions.after` and `Plan.elsewhere`.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import signature
from typing import Any, NamedTuple

from ..fuser import Fuser
from ..op import BACKWARD, STORED, differentiable
from ..op.functions import identity
from ..plan import Plan
from ..plan.basic_ops import BasicOps
from ..plan.claims import Claim
from ..plan.lines import Line, literal
from ..plan.program import Argument, Program, Request
from ..plan.writer import Writer


class Elsewhere(NamedTuple):
    """Weights of a plan whose gradients go elsewhere, by their places among the weights."""

    late: tuple[int, ...]
    """Those that wait for `backward_dw`."""
    into_main_grad: tuple[tuple[int, int], ...]
    """Those that go into main_grad: places among what is saved, and among the weights."""


NOWHERE = Elsewhere((), ())


def with_elsewhere(run: BasicOps, request: Request) -> Request:
    """The request with the names of gradients that go elsewhere."""

    def names(flag: str) -> frozenset[str]:
        asked = [
            run.name(name, i)
            for i, name in run.slots
            if run.kinds[i].gemm
            and (run.kinds[i].wgrad or name == "weight")
            and (request.options.get(flag) or getattr(run.ops[i], flag, False))
        ]
        return frozenset(f"d{name}" for name in asked if name in request.gradients)

    late, accumulated = names("delay_wgrad_compute"), names("accumulate_into_main_grad")
    if not (late or accumulated):
        return request
    return replace(request, late=late, accumulated=accumulated)


def with_places(plan: Plan, request: Request) -> Plan:
    """The plan, which says what its backward does not return."""
    if not (request.late or request.accumulated):
        return plan
    gradients = dict(enumerate(f"d{name}" for name in request.weights))
    late = tuple(k for k, gradient in gradients.items() if gradient in request.late)
    first, saved = plan.specs.first_weight, enumerate(plan.specs.saved)
    kept = [(place, value.argument - first) for place, value in saved if value.argument is not None]
    into_main_grad = tuple(pair for pair in kept if gradients.get(pair[1]) in request.accumulated)
    return replace(plan, elsewhere=Elsewhere(late, into_main_grad))


def gradient_names(program: Program, i: int) -> list[str | None]:
    """Names of op i's gradients after dx, in `bwd`'s order; None for those not wanted."""
    return [program.gradient(i, name) for name in differentiable(program.kinds[i])]


def send_elsewhere(
    writer: Writer, claim: Claim, lines: Sequence[Line], again: bool = False
) -> Sequence[Line]:
    """The lines of a step; products of weight gradients that go elsewhere are called by the op."""
    program, request = writer.program, writer.program.request
    gemms = [i for i in claim.ops if program.kinds[i].gemm]
    turned = [i for i in gemms if getattr(program.ops[i], "reads_transposed", False)]
    lines = [_as_stored(program, line, turned) for line in lines] if turned else lines
    if not (request.late or request.accumulated):
        return lines
    return [_by_the_op(program, claim, line) for line in lines]


def _as_stored(program: Program, line: Line, turned: Sequence[int]) -> Line:
    """A fuser's product of a weight gradient, which the op makes in the weight's own layout."""
    wanted = [i for i in turned if line.results == program.gradient(i, "weight")]  # and no bias
    given = [a for a in line.arguments if not (isinstance(a, Argument) and a.text == "None")]
    elsewhere = line.results in program.request.late | program.request.accumulated
    if not wanted or not isinstance(line.target, Fuser) or len(given) != 2 or elsewhere:
        return line
    wgrad: Any = line.target.wgrad
    if not line.function.endswith(".wgrad") or not _of_two(wgrad):
        return line
    product = Argument("object", line.function, value=wgrad)
    op = program.resolve(wanted[0], "")
    assert op is not None
    arguments = (op, product, *given, literal(None))
    return line._replace(function="wgrad_by", arguments=arguments)


def _of_two(product: Callable[..., Any]) -> bool:
    """Whether a product can be called with its two factors alone."""
    parameters = signature(product).parameters.values()
    return sum(parameter.default is parameter.empty for parameter in parameters) == 2


def _by_the_op(program: Program, claim: Claim, line: Line) -> Line:
    gradient, request, fuser = line.results, program.request, isinstance(line.target, Fuser)
    into_main_grad = fuser and gradient in request.accumulated
    if not line.function.endswith("wgrad") or not (into_main_grad or gradient in request.late):
        return line
    (i,) = (i for i in claim.ops if gradient in gradient_names(program, i))
    function = line.target.wgrad if "." in line.function else line.target
    product = Argument("object", line.function, value=function)
    op, stored = program.resolve(i, ""), program.resolve(i, "weight" + STORED)
    assert op is not None
    arguments = (op, product, *line.arguments)
    if into_main_grad and stored:
        # An op of the pattern that is not there has no part in the product.
        given = [a for a in arguments if not (isinstance(a, Argument) and a.text == "None")]
        return line._replace(function="wgrad_by", arguments=(*given, stored))
    if gradient in request.late:
        return line._replace(function="weigh", arguments=arguments)
    return line


def of_what_runs(run: BasicOps, request: Request) -> Request:
    """The request without the gradients of parameters whose op does nothing in this mode."""
    ops = [*zip(run.kinds, run.ops, request.training, strict=True)]
    still = [identity(kind, op, BACKWARD, training) for kind, op, training in ops]
    idle = {run.name(name, i) for i, name in run.slots if still[i]}
    return replace(request, gradients=request.gradients - idle) if idle else request
