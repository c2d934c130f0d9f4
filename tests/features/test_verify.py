"""Generated functions are verified: what is read is there, and has not been let go."""

import ast
from collections.abc import Callable

import pytest

import opsgraph as og
from opsgraph.features.verify import verify
from opsgraph.plan.lines import Function, Line
from opsgraph.plan.program import Argument
from tests.plan.sources import Call


def value(name: str) -> Argument:
    return Argument("value", name)


def forward(*lines: Line) -> Function:
    return Function("forward", ("ops", "x0"), lines)


MAKE = Line("bind", (value("x0"),), "x1")
USE = Line("bind", (value("x1"),), "x2", dead=("x1",))
RETURN = Line("return", ((value("x2"),), (value("x2"),)))
BACKWARD = Function(
    "backward",
    ("ops", "dx", "saved"),
    (
        Line("bind", (value("saved"),), ("x2",)),
        Line("return", ((value("dx"), value("x2")),)),
    ),
)


def test_a_right_pair_passes() -> None:
    verify(forward(MAKE, USE, RETURN), BACKWARD)


@pytest.mark.parametrize(
    "lines, message",
    [
        ((USE, MAKE, RETURN), "line 1 of forward, `x2 = x1`, reads x1, which nothing has made"),
        ((MAKE, USE, USE, RETURN), "line 3 of forward, `x2 = x1`, reads x1, which was let go"),
        ((MAKE, RETURN), r"line 2 of forward, `return \(x2,\), \(x2,\)`, reads x2, which nothing"),
        ((MAKE._replace(dead=("x3",)), USE, RETURN), "reads x3, which nothing has made"),
        ((MAKE, USE._replace(dead=("x2",)), RETURN), "reads x2, which was let go before"),
        ((MAKE, USE, Line("return", ((value("x2"),), ()))), r"takes \['x2'\], expected .*: \[\]"),
    ],
)
def test_a_broken_function_is_refused(lines: tuple[Line, ...], message: str) -> None:
    with pytest.raises(og.PlanError, match=message):
        verify(forward(*lines), BACKWARD)


def test_a_function_returns() -> None:
    with pytest.raises(og.PlanError, match="the last line of backward does not return"):
        short = Function("backward", BACKWARD.parameters, BACKWARD.lines[:1])
        verify(forward(MAKE, USE, RETURN), short)


def broken(change: Callable[[tuple[Line, ...]], tuple[Line, ...]], call: Call) -> Function:
    plan = call.plan()
    lines = change(plan.functions.backward.lines)
    kept, last = plan.functions.forward, plan.functions.backward.parameters
    verify(kept, Function("backward", last, lines))
    return kept


CALLS = [
    Call("llama", "plain", "none"),
    Call("residual", "checkpoint", "delayed", cast=True),
    Call("gpt", "delayed", "current", cast=True),
    Call("linear", "keep", "mxfp8"),
]


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_each_line_that_is_left_out_is_missed(call: Call) -> None:
    broken(lambda lines: lines, call)
    for k, line in enumerate(call.plan().functions.backward.lines):
        if [name for name in line.makes if name != "dx" and not name.startswith("d")]:
            with pytest.raises(og.PlanError, match=r"which nothing has made|the backward takes"):
                broken(lambda lines, k=k: lines[:k] + lines[k + 1 :], call)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_lines_say_what_the_source_reads_and_makes(call: Call) -> None:
    plan = call.plan()
    for lines, source in (
        (plan.functions.forward.lines, plan.forward_source),
        (plan.functions.backward.lines, plan.backward_source),
    ):
        text = [line for line in source.splitlines()[1:] if not line.startswith("    del ")]
        text = [line for line in text if not line.split(" = ")[-1].startswith("[")]
        for line, written in zip(lines, text, strict=True):
            names = [n for n in ast.walk(ast.parse(written.strip()).body[0]) if _is_name(n)]
            reads = {n.id for n in names if isinstance(n.ctx, ast.Load)}
            makes = {n.id for n in names if isinstance(n.ctx, ast.Store)} - {"_"}
            assert makes == set(line.makes), written
            objects = {line.function.partition(".")[0], "ops", "torch"}
            objects |= {a.text.partition(".")[0] for a in line.arguments if _is_object(a)}
            assert reads - objects == set(line.reads), written


def _is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Name)


def _is_object(argument: object) -> bool:
    return isinstance(argument, Argument) and argument.category == "object"
