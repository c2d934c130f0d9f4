"""Lines run one by one, without the source of their function, keep to its rules."""

import traceback
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from opsgraph.plan.lines import Function, Line, literal, value
from opsgraph.plan.program import Argument
from opsgraph.replay.interpreter import run_line, run_lines


def test_results_are_bound_and_the_dead_let_go() -> None:
    x, y = torch.ones(2), torch.full((2,), 2.0)
    variables: dict[str, Any] = {"x": x, "y": y}
    line = Line("add", (value("x"), value("y")), "z", dead=("x",))
    torch.testing.assert_close(run_line(line, (), variables), x + y)
    assert set(variables) == {"y", "z"}


def test_nested_results() -> None:
    variables: dict[str, Any] = {}
    line = Line("F.bwd", (), ("dx", ("db", "")), target=Returns(1, (2, 3)))
    run_line(line, (), variables)
    assert variables == {"dx": 1, "db": 2}


class Returns:
    def __init__(self, *results: Any) -> None:
        self.results = results

    def bwd(self) -> Any:
        return self.results


class Takes:
    """Keeps what it is given, and whether the caller still has it."""

    def fwd(self, held: list[Tensor], variables: dict[str, Any]) -> None:
        self.held, self.still = held, "x" in variables


def test_a_moved_argument_is_the_callees_alone_where_it_dies() -> None:
    for dead in ((), ("x",)):
        takes, variables = Takes(), {"x": torch.ones(1)}
        moved = value("x")._replace(moved=True)
        line = Line(
            "T.fwd", (moved, Argument("object", "", value=variables)), "", dead=dead, target=takes
        )
        run_line(line, (), variables)
        assert len(takes.held) == 1
        assert takes.still == (not dead)


def test_ops_literals_and_views() -> None:
    variables: dict[str, Any] = {"x": torch.ones(2)}
    cast = Line("cast", (value("x"), literal(torch.bfloat16)), "y")
    assert run_line(cast, (), variables).dtype is torch.bfloat16
    missing = Line("cast unless None", (literal(None), literal(torch.bfloat16)), "z")
    assert run_line(missing, (), variables) is None
    assert variables["z"] is None
    result = run_line(Line("return", ((Argument("view", "x"),), ())), (), variables)
    assert result[1] == ()
    assert result[0][0]._is_view()
    assert result[0][0].data_ptr() == variables["x"].data_ptr()
    assert run_line(Line("return", (value("x"),)), (), variables) is variables["x"]


def test_a_result_dies_with_its_variable() -> None:
    alive: list[bool] = []

    class Watches:
        made: Any = None

        def fwd(self, x: Tensor) -> Tensor:
            if self.made is not None:
                alive.append(self.made() is not None)
            y = x + 1
            self.made = weakref.ref(y)
            return y

    target = Watches()
    lines = [
        Line("W.fwd", (value("x0"),), "x1", target),
        Line("add", (value("x0"), value("x1")), "x2", dead=("x1",)),
        Line("W.fwd", (value("x2"),), "x3", target),
        Line("return", (value("x3"),)),
    ]
    function = Function("forward", ("x0",), lines, {"W": target})
    x = torch.ones(2)
    torch.testing.assert_close(run_lines(function, x), 2 * x + 2)
    assert function.source.count("\n") == 6
    torch.testing.assert_close(function(x), 2 * x + 2)
    assert alive == [False, False, False]


class Raises:
    def fwd(self, x: list[Tensor], *more: Tensor) -> Tensor:
        raise ZeroDivisionError("in fwd")


def test_an_error_shows_the_line_that_raised_it() -> None:
    moved = value("x1")._replace(moved=True)
    target = Raises()
    lines = [
        Line("add", (value("x0"), value("x0")), "x1"),
        Line("add", (value("x0"), value("x1")), "x2", dead=("x0",)),
        Line("R.fwd", (moved, value("x2")), "x3", target, dead=("x1",)),
        Line("return", (value("x3"),)),
    ]
    function = Function("forward", ("x0",), lines, {"R": target})
    with pytest.raises(ZeroDivisionError) as caught:
        run_lines(function, torch.ones(2))
    shown = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert "x3 = R.fwd(x1, x2)" in shown
    assert 'raise ZeroDivisionError("in fwd")' in shown[-1]
