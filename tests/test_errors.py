"""The error family: what a message says, and that errors travel between processes."""

import pickle

import pytest

import opsgraph as og


@pytest.mark.parametrize("kind", [og.OpError, og.PlanError, og.RegisterError, og.OpsgraphError])
def test_errors_can_be_pickled(kind: type[og.OpsgraphError]) -> None:
    parts = ("1:Linear", "width 64", "128") if kind is og.OpError else ("what was wrong",)
    error = pickle.loads(pickle.dumps(kind(*parts)))
    assert type(error) is kind
    assert isinstance(error, og.OpsgraphError | ValueError)
    assert str(error) == str(kind(*parts))


def test_an_op_error_says_where_what_came_and_what_was_expected() -> None:
    error = og.OpError("1:Linear", "width 64", "128")
    assert str(error) == "1:Linear: got width 64, expected 128"
