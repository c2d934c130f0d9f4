"""The error family: what a message says, that errors travel between processes, and raw ones that
users would meet otherwise."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Linear, RMSNorm


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


class Doubled(og.Op):
    """`y = 2 * x`"""

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return 2 * x, ()


METHODS = ("fwd", "bwd", "dgrad", "wgrad", "again", "out", "saved", "reject", "identity", "lower")


@pytest.mark.parametrize("name", METHODS)
def test_an_op_whose_method_is_none_is_named(name: str) -> None:
    kind = type("Mine", (Doubled,), {name: 3})
    with pytest.raises(og.PlanError, match=f"0:Mine: got {name} = 3, expected a method"):
        og.Sequential(kind())


@pytest.mark.parametrize("name", ["constants", "extra_inputs", "saves"])
def test_what_should_be_names_is(name: str) -> None:
    with pytest.raises(og.PlanError, match=f"Mine: got {name} = 3, expected a tuple of names"):
        og.Sequential(type("Mine", (Doubled,), {name: 3})())


def test_a_mistake_in_fwd_is_not_hidden_by_what_its_base_says() -> None:
    class Mistyped(Linear):
        def fwd(self, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, tuple[()]]:  # type: ignore[override]
            return x @ weigth.t() + bias, ()  # type: ignore[name-defined]  # noqa: F821

    with pytest.raises(NameError, match="weigth"):
        og.Sequential(Mistyped(8, 8))(torch.randn(4, 8))


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "torch.complex64": lambda w: w.to(torch.complex64),
    "torch.int32": lambda w: w.int(),
    "torch.sparse_coo": lambda w: w.to_sparse(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_no_op_reads(kind: str) -> None:
    module = og.Sequential(Linear(8, 8))
    weight = KINDS[kind](module[0].weight.detach())
    module[0].weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
    with pytest.raises(og.OpError, match=rf"Linear.* got .*{kind}, expected a (float|dense one)"):
        module(torch.randn(4, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_no_op_reads(kind: str) -> None:
    with pytest.raises(og.OpError, match=f"got .*{kind}, expected a (float|dense one)"):
        og.Sequential(RMSNorm(8), Linear(8, 8))(KINDS[kind](torch.randn(4, 8)))


@pytest.mark.parametrize("keywords", [3, None, "output"])
def test_op_kwargs_that_are_no_keywords(keywords: Any) -> None:
    with pytest.raises(og.OpError, match=f"0:Linear: got op_kwargs {keywords!r}, expected a dict"):
        og.Sequential(Linear(8, 8))(torch.randn(4, 8), op_kwargs={0: keywords})


@pytest.mark.parametrize("first", ["x", 2])
def test_is_first_microbatch_that_is_no_flag(first: Any) -> None:
    with pytest.raises(og.OpError, match=f"got is_first_microbatch={first!r}, expected True or"):
        og.LayerNormMLP(8, 16)(torch.randn(4, 8), is_first_microbatch=first)
