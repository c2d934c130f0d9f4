"""GroupedLinear with one parameter for all groups does what it does with one for each."""

import contextlib
import copy
import pickle
from typing import Any

import pytest
import torch
from recipe_cases import RECIPES
from torch import Tensor, nn
from torch.nn.utils import parametrize

import opsgraph as og
from opsgraph.ops import GroupedLinear, RMSNorm, SwiGLU

SINGLE = {"single_grouped_weight": True, "single_grouped_bias": True}
SIZES = torch.tensor([2, 0, 3])
KEYS = [f"weight{g}" for g in range(3)] + [f"bias{g}" for g in range(3)]


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    return GroupedLinear(3, 4, 6, device="cpu", **options)


def mlp(backends: Any = None, width: int = 8, **options: Any) -> og.Sequential:
    torch.manual_seed(0)
    ops = (
        GroupedLinear(3, width, 2 * width, **options),
        SwiGLU(),
        GroupedLinear(3, width, width, **options),
    )
    return og.Sequential(*ops, device="cpu", backends=backends)


def step(module: Any, width: int = 8, sizes: Any = SIZES, recipe: Any = None) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn(int(sum(sizes)), width, requires_grad=True)
    with og.autocast(recipe=recipe) if recipe else contextlib.nullcontext():
        y = module(x, sizes, sizes)
    y.square().sum().backward()
    assert x.grad is not None
    return x.grad


def whole(module: Any, which: str) -> list[Tensor]:
    """What an attribute of the parameters holds, `[groups, ...]`, of each layer."""
    found = []
    for op in (module[0], module[2]):
        for name in ("weight", "bias"):
            parts = [op.get_parameter(part) for part in op.names_of(name)]
            values = [getattr(part, which) for part in parts]
            found.append(values[0] if op.is_single(name) else torch.stack(values))
    return found


# -- parameters and keys --


def test_parameters_and_keys() -> None:
    op = layer(**SINGLE)
    assert [(n, tuple(p.shape)) for n, p in op.named_parameters()] == [
        ("weight", (3, 6, 4)), ("bias", (3, 6)),
    ]  # fmt: skip
    assert list(op.state_dict()) == ["weight", "bias"]
    assert op.weight is op.get_parameter("weight")
    assert layer(bias=False, **SINGLE).bias is None
    assert list(layer(single_grouped_weight=True).state_dict()) == ["weight", *KEYS[3:]]
    assert list(layer(single_grouped_bias=True).state_dict()) == [*KEYS[:3], "bias"]
    for name in SINGLE:
        with pytest.raises(og.OpError, match=f"{name} after construction, expected another"):
            setattr(op, name, False)


@pytest.mark.parametrize("init", [None, nn.init.xavier_normal_])
def test_the_same_values_at_first(init: Any) -> None:
    plain, single = layer(init_method=init), layer(init_method=init, **SINGLE)
    assert torch.equal(single.weight, plain.weight)
    assert torch.equal(single.bias, plain.bias)


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_of_one_form_load_into_the_other(assign: bool) -> None:
    plain, single, x = layer(), layer(**SINGLE), torch.randn(5, 4)
    saved = {name: 2 * value for name, value in plain.state_dict().items()}
    single.load_state_dict(saved, assign=assign)
    assert torch.equal(single.weight[1], saved["weight1"])
    again = {name: 2 * value for name, value in single.state_dict().items()}
    plain.load_state_dict(again, assign=assign)
    assert torch.equal(plain.bias2, 4 * saved["bias2"] / 2)
    single.load_state_dict(again, assign=assign)
    assert torch.equal(single(x, SIZES), plain(x, SIZES))
    lazy = GroupedLinear(3, **SINGLE)
    lazy.load_state_dict(saved)
    assert (lazy.out_features, lazy.in_features) == (6, 4)
    del saved["weight1"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight"'):
        single.load_state_dict(saved)
    nested = mlp(**SINGLE)
    nested.load_state_dict(mlp().state_dict())
    mlp().load_state_dict(nested.state_dict())


def test_parameters_are_set_copied_and_moved() -> None:
    op, x = layer(**SINGLE), torch.randn(5, 4)
    y = op(x, SIZES)
    for made in (copy.deepcopy(op), pickle.loads(pickle.dumps(op)), layer(**SINGLE).double()):
        assert [n for n, _ in made.named_parameters()] == ["weight", "bias"]
        torch.testing.assert_close(made(x.to(made.weight.dtype), SIZES).float(), y)
    op.weight, op.bias = nn.Parameter(2 * op.weight.detach()), None
    torch.testing.assert_close(op(x, SIZES), 2 * (y - layer().bias[[0, 0, 2, 2, 2]]))
    op.weight = nn.Parameter(torch.randn(2, 6, 4))
    with pytest.raises(og.OpError, match=r"got weight of shape \(2, 6, 4\)"):
        op(x, SIZES)
    empty = GroupedLinear(3, 4, 6, device="meta", **SINGLE).to_empty(device="cpu")
    torch.manual_seed(0)
    empty.reset_parameters()
    assert torch.equal(empty.weight, layer().weight)


def test_sizes_that_are_left_out() -> None:
    module = og.Sequential(GroupedLinear(3, out_features=6, **SINGLE), RMSNorm(6))
    module(torch.randn(5, 4), SIZES)
    assert module[0].weight.shape == (3, 6, 4)


def test_a_parametrization() -> None:
    op, x = layer(**SINGLE), torch.randn(5, 4)
    y = op(x, SIZES)

    class Twice(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(op, "weight", Twice())
    with torch.no_grad():
        op.parametrizations.weight.original.mul_(0.5)
    torch.testing.assert_close(op(x, SIZES), y)


# -- gradients --


@pytest.mark.parametrize("backends", [None, ("reference",)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_same_results_and_gradients(backends: Any, bias: bool) -> None:
    plain, single = mlp(backends, bias=bias), mlp(backends, bias=bias, **SINGLE)
    for module in (plain, single):
        step(module)
    assert torch.equal(step(plain), step(single))
    if bias:
        for one, other in zip(whole(plain, "grad"), whole(single, "grad"), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(single[0].weight.grad, plain[0].weight.grad)


@pytest.mark.parametrize("backends", [None, ("reference",)])
@pytest.mark.parametrize("recipe", [None, "current", "rows", "mx", "high precision"])
def test_gradients_that_go_elsewhere(backends: Any, recipe: str | None) -> None:
    width, sizes = (32, [32, 0, 64]) if recipe else (8, SIZES)
    how: Any = (width, sizes, RECIPES[recipe] if recipe else None)
    plain = mlp(backends, width, **SINGLE)
    late = mlp(backends, width, delay_wgrad_compute=True, **SINGLE)
    fused = mlp(backends, width, accumulate_into_main_grad=True, **SINGLE)
    both = mlp(backends, width, accumulate_into_main_grad=True, delay_wgrad_compute=True, **SINGLE)
    for module in (fused, both):
        for op in (module[0], module[2]):
            op.weight.main_grad = torch.ones_like(op.weight)
    for module in (plain, late, fused, both):
        step(module, *how)
    for k in (0, 2):
        assert late[k].weight.skip_backward_post_hook
        assert late[k].weight.grad is None
    late.backward_dw()
    both.backward_dw()
    for k in (0, 2):
        expected = plain[k].weight.grad
        assert torch.equal(late[k].weight.grad, expected)
        for module in (fused, both):
            assert module[k].weight.grad is None
            torch.testing.assert_close(module[k].weight.main_grad - 1, expected)
    for op in (fused[0], fused[2]):
        op.weight.overwrite_main_grad = True
    step(fused, *how)
    torch.testing.assert_close(fused[0].weight.main_grad, plain[0].weight.grad)
    each = mlp(backends, width)
    step(each, *how)
    assert torch.equal(each[0].weight.grad, plain[0].weight.grad)


def test_frozen_and_double_backward() -> None:
    op, x = layer(**SINGLE), torch.randn(5, 4)
    op.weight.requires_grad_(False)
    op(x, SIZES).sum().backward()
    assert op.weight.grad is None
    assert op.bias.grad is not None
    double = og.Sequential(layer(**SINGLE), double_backward=True).double()
    weight = double[0].weight.detach().requires_grad_()

    def loss(weight: Tensor) -> Tensor:
        return torch.func.functional_call(double, {"0.weight": weight}, (x.double(), SIZES))

    assert torch.autograd.gradgradcheck(loss, (weight,))


def test_compiled() -> None:
    op, x = og.Sequential(layer(**SINGLE)), torch.randn(5, 4)
    op(x, SIZES).square().sum().backward()
    eager = [p.grad.clone() for p in op.parameters() if p.grad is not None]
    op.zero_grad()
    torch.compile(op, backend="aot_eager", fullgraph=True)(x, SIZES).square().sum().backward()
    for one, parameter in zip(eager, op.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, one)
