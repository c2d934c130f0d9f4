"""One product with the weights of several layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import opsgraph as og
from opsgraph.ops import Linear, SwiGLU


def _layers(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(8, 6, bias=bias).double(), nn.Linear(8, 10, bias=bias).double()


@pytest.mark.parametrize("bias", [True, False])
def test_results_and_gradients_are_the_layers(bias: bool) -> None:
    one, two = _layers(bias)
    parameters = [*one.parameters(), *two.parameters()]
    op = og.Sequential(Linear.of(one, two))
    x = torch.randn(5, 8, dtype=torch.double, requires_grad=True)
    dy = torch.randn(5, 16, dtype=torch.double)
    for _ in range(3):  # the third is replayed
        found = torch.autograd.grad(op(x), [x, *parameters], dy)
        expected = torch.autograd.grad(torch.cat([one(x), two(x)], 1), [x, *parameters], dy)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted)
    assert [id(p) for p in (*one.parameters(), *two.parameters())] == [id(p) for p in parameters]
    assert not list(op.state_dict())


def test_nothing_is_copied_and_updates_of_each_part_count() -> None:
    one, two = _layers(False)
    op = Linear.of(one, two)
    home, name = op.home("weight")
    assert getattr(home, name).data_ptr() == one.weight.data_ptr()
    x = torch.randn(5, 8, dtype=torch.double)
    for layer in (two, one):
        with torch.no_grad():
            layer.weight.mul_(2)
        torch.testing.assert_close(op(x), torch.cat([one(x), two(x)], 1))
    two.weight = nn.Parameter(torch.ones(10, 8, dtype=torch.double))  # elsewhere: copied, but right
    torch.testing.assert_close(op(x), torch.cat([one(x), two(x)], 1))


def test_updates_of_each_part_count_under_a_recipe() -> None:
    one, two = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
    op = og.Sequential(Linear.of(one, two), SwiGLU())
    x = torch.randn(32, 32)
    with og.autocast(recipe=og.recipe.MXFP8BlockScaling()):
        before = op(x)
        with torch.no_grad():
            two.weight.mul_(2)
        torch.testing.assert_close(op(x), 2 * before)


def test_a_change_between_the_passes_is_an_error() -> None:
    one, two = _layers(False)
    y = Linear.of(one, two)(torch.randn(5, 8, dtype=torch.double, requires_grad=True))
    with torch.no_grad():
        two.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_copies_read_the_copied_layers_without_a_copy_per_call() -> None:
    layers = _layers()
    both = nn.ModuleList(layers), Linear.of(*layers)
    x = torch.randn(5, 8, dtype=torch.double)
    for (one, two), op in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        with torch.no_grad():
            two.weight.mul_(3)
        torch.testing.assert_close(op(x), torch.cat([one(x), two(x)], 1))
        home, name = op.home("weight")
        assert getattr(home, name).data_ptr() == one.weight.data_ptr()


def test_layers_that_differ_are_refused() -> None:
    with pytest.raises(og.OpError, match=r"differ in in_features: \[8, 4\]"):
        Linear.of(nn.Linear(8, 2), nn.Linear(4, 2))
    with pytest.raises(og.OpError, match="differ in a bias"):
        Linear.of(nn.Linear(8, 2), nn.Linear(8, 2, bias=False))
    with pytest.raises(og.OpError, match="ReLU among several"):
        Linear.of(nn.Linear(8, 2), nn.ReLU())
