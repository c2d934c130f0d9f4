"""Inputs that no stage can take: what the error says, and those that are taken apart."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import GELU, Add, Linear, RMSNorm

MODULES: dict[str, Callable[[], nn.Module]] = {
    "sequence": lambda: og.Sequential(RMSNorm(6), Linear(6, 6)),
    "sequence, sizes left out": lambda: og.Sequential(Linear(out_features=6)),
    "plain module between": lambda: og.Sequential(Linear(6, 6), nn.Tanh(), Linear(6, 6)),
    "layernorm_mlp": lambda: og.LayerNormMLP(6, 8, device="cpu"),
    "op": lambda: RMSNorm(6),
}
WRONG: dict[str, tuple[Any, str]] = {
    "None": (None, "got None"),
    "list": ([1.0, 2.0], "got a list"),
    "array": (np.ones((2, 6)), r"got a numpy\.ndarray"),
    "tuple": ((torch.ones(2, 6),), "got a tuple"),
    "number": (1.0, "got a float"),
    "scalar": (torch.tensor(1.0), "got a scalar"),
}


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", MODULES)
def test_what_is_no_tensor_is_named(name: str, wrong: str, grad: bool) -> None:
    module, (given, text) = MODULES[name](), WRONG[wrong]
    for _ in range(2):
        with torch.set_grad_enabled(grad), pytest.raises(og.OpError, match=f"^input: {text}, exp"):
            module(given)
        module(torch.ones(2, 6))


@pytest.mark.parametrize("wrong", WRONG)
def test_an_extra_input_that_is_no_tensor_is_named(wrong: str) -> None:
    given, text = WRONG[wrong]
    x = torch.ones(2, 6)
    for module in (og.Sequential(GELU(), Add()), og.Sequential(GELU(), Add(), nn.Tanh(), GELU())):
        with pytest.raises(og.OpError, match=f"^1:Add other: {text}, expected"):
            module(x, given)
    with pytest.raises(og.OpError, match="1 extra inputs, expected none"):
        og.Sequential(GELU())(x, given)


def test_what_a_plain_module_returns_is_named() -> None:
    module = og.Sequential(Linear(6, 6), nn.LSTM(6, 6), Linear(6, 6))
    with pytest.raises(og.OpError, match=r"^input of 2:Linear: got a tuple, expected"):
        module(torch.ones(2, 6))


def test_errors_of_modules_and_ops_stay_what_they_are() -> None:
    class Fails(nn.Module):
        def forward(self, x: Any) -> Any:
            raise AttributeError("its own")

    for given in (None, torch.ones(2, 6)):
        with pytest.raises(AttributeError, match="its own"):
            og.Sequential(Fails(), GELU())(given)
    with pytest.raises(og.OpError, match="got input width 5, expected 6"):
        og.Sequential(Linear(6, 6))(torch.ones(2, 5))


@pytest.mark.parametrize("name", ["sequence", "plain module between", "op"])
def test_the_input_has_the_name_that_it_has_in_torch_nn(name: str) -> None:
    module, x = MODULES[name](), torch.ones(2, 6)
    assert torch.equal(module(input=x), module(x))
    assert "input" in inspect.signature(nn.Sequential.forward).parameters


@pytest.mark.parametrize("name", ["sequence", "layernorm_mlp", "plain module between"])
def test_jagged_tensors_are_run_row_by_row(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    rows = [torch.randn(n, 6) for n in (2, 0, 3)]
    nested = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    y = module(nested)
    assert y.is_nested
    assert y.shape[:2] == nested.shape[:2]
    for one, other in zip(y.unbind(), rows, strict=True):
        torch.testing.assert_close(one, module(other))
    found = torch.autograd.grad(y.values().square().sum(), [nested, *module.parameters()])
    x = torch.cat(rows).requires_grad_()
    expected = torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.values() if one.is_nested else one, other)


@pytest.mark.parametrize("sizes", [[1, 4], torch.tensor([5, 0])])
def test_sizes_of_groups_beside_jagged_tensors(sizes: Any) -> None:
    module = og.Sequential(og.ops.Add(), og.ops.GroupedLinear(2, 6, 4))
    rows = [torch.randn(2, 6), torch.randn(3, 6)]
    nested: Any = torch.nested.nested_tensor(rows, layout=torch.jagged)
    y, flat = module(nested, nested, sizes), torch.cat(rows)
    assert torch.equal(y.values(), module(flat, flat, sizes))
    with pytest.raises(og.OpError, match=r"1:GroupedLinear: got split_sizes \[1, 5\], .* add to 5"):
        module(nested, nested, [1, 5])


def test_nested_tensors_of_another_layout_are_an_error() -> None:
    nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])
    for name in ("sequence", "layernorm_mlp"):
        with pytest.raises(og.OpError, match=r"layout=torch\.jagged"):
            MODULES[name]()(nested)


@pytest.mark.parametrize("name", ["sequence", "layernorm_mlp"])
def test_symbolic_tracing_says_that_the_module_is_a_leaf(name: str) -> None:
    model = nn.Sequential(MODULES[name](), nn.Tanh())
    with pytest.raises(og.OpError, match=r"torch\.fx Proxy.* leaf"):
        torch.fx.symbolic_trace(model)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, name: str) -> bool:
            own = isinstance(m, og.Sequential | og.LayerNormMLP)
            return own or super().is_leaf_module(m, name)

    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    x: Tensor = torch.randn(2, 6)
    torch.testing.assert_close(traced(x), model(x))
