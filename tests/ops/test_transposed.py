"""TransposedLinear beside a Linear with the transpose of its weight."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import (
    GELU,
    BasicLinear,
    Bias,
    ConstantScale,
    GroupedLinear,
    Linear,
    LoRA,
    LoRALinear,
    RMSNorm,
    SwiGLU,
    TransposedGroupedLinear,
    TransposedLinear,
)

SIZES = 8, 12
"""In the tests of what is not arithmetic."""


def _turned(layer: TransposedLinear) -> Linear:
    """A Linear that computes the same."""
    made = Linear(layer.in_features, layer.out_features, layer.has("bias"), device="meta")
    made.weight = nn.Parameter(layer.weight.detach().t().contiguous())
    if layer.has("bias"):
        made.bias = nn.Parameter(layer.bias.detach().clone())
    return made


def _pair(like: Tensor, width: int, inner: int, act: Any, bias: bool) -> list[og.Sequential]:
    torch.manual_seed(0)
    columns = inner * (2 if isinstance(act, SwiGLU) else 1)
    layers = TransposedLinear(width, columns, bias), TransposedLinear(inner, width, bias)
    turned = map(_turned, (layer.to(like.device, like.dtype) for layer in layers))
    made = [og.Sequential(RMSNorm(width), one, act, other) for one, other in (layers, turned)]
    return [module.to(like.device, like.dtype) for module in made]


def _results(module: og.Sequential, x: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = module(x)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


@pytest.mark.parametrize("rows", [24, 512])
@pytest.mark.parametrize(
    "act, bias", [(GELU(), True), (SwiGLU(), False)], ids=["plain, bias", "gated"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plans_and_results_are_a_linears(
    dtype: torch.dtype, act: Any, bias: bool, rows: int, device: str
) -> None:
    """Of 512 rows products are large enough to be measured, and gradients to be made in parts.

    On CUDA an activation in a product's epilogue reads a weight by rows, and is not taken.
    """
    x = torch.randn(rows, 256, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    found, expected = _pair(x, 256, 512, act, bias)
    plans = [module.plan(x=x) for module in (found, expected)]
    steps = [[(s.name, s.ops) for s in (*plan.forward, *plan.backward)] for plan in plans]
    assert steps[0] == steps[1] or device != "cpu"
    rtol, atol = (1e-4, 1e-5) if dtype == torch.float32 else (2e-2, 1e-2)
    for _ in range(3):  # the third is replayed
        pairs = zip(_results(found, x), _results(expected, x), strict=True)
        for got, wanted in pairs:
            wanted = wanted if got.shape == wanted.shape else wanted.t()
            size = float(wanted.abs().max())
            torch.testing.assert_close(got, wanted, rtol=rtol, atol=atol * size)
    square = _results(found, x)[3]
    assert square.is_contiguous()  # so autograd takes it as it is


class SumsOfBias(og.Fuser):
    backend, pattern = "reference", dict(bias=Bias)

    def wgrad(self, dy: Tensor, bias_bias: Tensor) -> Any:
        return dy.sum(0).to(bias_bias.dtype)

    def dgrad(self, dy: Tensor) -> Any:
        return dy


class ScaledProducts(og.Fuser):
    """What a product's factor is called may have no default."""

    backend, pattern = "reference", dict(fc=BasicLinear, scale=ConstantScale | None)

    def wgrad(self, dy: Tensor, fc_x: Tensor, scale_scale: float | None) -> Any:
        return dy.t() @ fc_x * (1.0 if scale_scale is None else scale_scale)

    def dgrad(self, dy: Tensor, fc_weight: Tensor, scale_scale: float | None) -> Any:
        return dy @ fc_weight * (1.0 if scale_scale is None else scale_scale)


@pytest.mark.parametrize("fuser", [SumsOfBias, ScaledProducts])
def test_its_own_layout_is_for_products_of_weights_alone(fuser: type[og.Fuser]) -> None:
    """A bias's gradient is none, and of another function than of two factors none is known."""
    with og.register(fuser):
        x = torch.randn(6, 8)
        layer = TransposedLinear(8, 16)
        found, expected = og.Sequential(layer), og.Sequential(_turned(layer))
        assert fuser.__name__ in [step.name for step in found.plan(x=x).backward]
        for got, wanted in zip(_results(found, x), _results(expected, x), strict=True):
            torch.testing.assert_close(got, wanted if got.shape == wanted.shape else wanted.t())


def test_it_is_initialized_as_a_linear() -> None:
    torch.manual_seed(0)
    expected = Linear(*SIZES)
    torch.manual_seed(0)
    found = TransposedLinear(*SIZES)
    assert {n: tuple(p.shape) for n, p in found.named_parameters()} == {
        "weight": SIZES, "bias": SIZES[1:]
    }  # fmt: skip
    for got, wanted in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(got.flatten().sort().values, wanted.flatten().sort().values)
    seen = []
    TransposedLinear(*SIZES, init_method=lambda w: seen.append(tuple(w.shape)))
    assert seen == [SIZES[::-1]]


def test_sizes_come_from_neighbours_and_from_state_dicts() -> None:
    module = og.Sequential(TransposedLinear(out_features=12), RMSNorm(), TransposedLinear(None, 8))
    module(torch.ones(2, 8))
    assert [tuple(module[k].weight.shape) for k in (0, 2)] == [(8, 12), (12, 8)]
    other = TransposedLinear()
    other.load_state_dict(module[0].state_dict())
    assert (other.in_features, other.out_features) == SIZES
    assert repr(other) == "TransposedLinear(8, 12, bias=True)"
    with pytest.raises(og.OpError, match=r"got weight of shape \(12, 8\), expected \(8, 12\)"):
        other.weight = nn.Parameter(torch.ones(12, 8))
        other(torch.ones(2, 8))
    with pytest.raises(og.OpError, match=r"got weight of shape \(8,\), expected \(8, 12\)"):
        other.weight = nn.Parameter(torch.ones(8))
        other(torch.ones(2, 8))
    with pytest.raises(og.OpError, match=r"weight=None, expected a parameter of shape \(8, 12\)"):
        other.weight = None
        other(torch.ones(2, 8))


def test_copies_pickles_and_assigned_parameters_count() -> None:
    module = og.Sequential(TransposedLinear(*SIZES))
    x = torch.ones(3, 8)
    expected = x @ module[0].weight + module[0].bias
    for made in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module):
        torch.testing.assert_close(made(x), expected)
        made[0].weight = nn.Parameter(torch.zeros(SIZES))
        torch.testing.assert_close(made(x), made[0].bias.expand(3, 12))
    torch.testing.assert_close(module.to_torch()(x), module(x))


def test_borrowed_parameters_are_read_transposed() -> None:
    home = nn.Module()
    home.w = nn.Parameter(torch.randn(SIZES))
    op = TransposedLinear(*SIZES, bias=False, device="meta").borrow(home, weight="w")
    x = torch.ones(3, 8)
    op(x).sum().backward()
    torch.testing.assert_close(op(x), x @ home.w)
    torch.testing.assert_close(home.w.grad, torch.full(SIZES, 3.0))


def _rising(weight: Tensor) -> None:
    """By a Linear's rows, so that what is turned shows."""
    weight.copy_(torch.arange(weight.numel(), dtype=weight.dtype).view(weight.shape))


@pytest.mark.parametrize("single", [False, True])
def test_init_method_sees_a_linears_weight_whenever_it_is_set(single: bool) -> None:
    """It was kept in a function of the constructor's, which no pickle takes."""
    op = TransposedGroupedLinear(2, 3, 4, init_method=_rising, single_grouped_weight=single)
    later = TransposedGroupedLinear(2, 3, 4, single_grouped_weight=single)
    later.init_method = _rising
    later.reset_parameters()
    again = pickle.loads(pickle.dumps(op))
    assert again.init_method is op.init_method is _rising
    for each in (op, later, again):
        for weight in each.weight:
            assert torch.equal(weight, torch.arange(12.0).view(4, 3).t())


def test_torch_compile_export_and_adapters() -> None:
    module = og.Sequential(TransposedLinear(*SIZES), GELU())
    x = torch.randn(3, 8)
    expected = _results(module, x)
    compiled: Any = torch.compile(module, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected[0])
    exported = torch.export.export(module, (x,))
    torch.testing.assert_close(exported.module()(x), expected[0])
    adapted = LoRALinear(TransposedLinear(*SIZES), LoRA(8, 12, 2))
    with torch.no_grad():
        adapted.branches[0].lora_B.normal_()
    torch.testing.assert_close(adapted.merged()(x), adapted(x))


def test_under_a_recipe_it_is_a_linear() -> None:
    torch.manual_seed(0)
    found = TransposedLinear(32, 64)
    expected = _turned(found)
    x = torch.randn(32, 32)
    for recipe in (og.recipe.DelayedScaling(), og.recipe.MXFP8BlockScaling()):
        for _ in range(2):
            with og.autocast(recipe=recipe):
                pairs = zip(
                    _results(og.Sequential(found), x), _results(og.Sequential(expected), x),
                    strict=True,
                )  # fmt: skip
            for got, wanted in pairs:
                wanted = wanted if got.shape == wanted.shape else wanted.t()
                torch.testing.assert_close(got, wanted)


def test_delayed_scales_are_named_and_loaded_as_a_linears() -> None:
    torch.manual_seed(0)
    recipe, x = og.recipe.DelayedScaling(), torch.randn(32, 32)
    trained, fresh, plain = (
        og.Sequential(layer)
        for layer in (*(TransposedLinear(32, 64) for _ in "12"), Linear(32, 64))
    )
    for module in (trained, plain):
        for size in (1.0, 8.0):
            with og.autocast(recipe=recipe):
                module(size * x).sum().backward()
    saved = trained.state_dict()
    assert saved.keys() == plain.state_dict().keys()
    with torch.no_grad(), og.autocast(recipe=recipe):
        assert fresh.state_dict().keys() == saved.keys()  # before its first call
    fresh.load_state_dict(saved)
    assert torch.equal(fresh.state_dict()["0.scaling.scale"], saved["0.scaling.scale"])
    with torch.no_grad(), og.autocast(recipe=recipe):
        assert torch.equal(fresh(x), trained(x))


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_groups(dtype: torch.dtype, single: bool, device: str) -> None:
    """Gradients are contiguous; the steps are those of GroupedLinear."""
    torch.manual_seed(0)
    found = TransposedGroupedLinear(3, 16, 24, single_grouped_weight=single).to(device, dtype)
    expected = GroupedLinear(3, 16, 24, single_grouped_weight=True).to(device, dtype)
    with torch.no_grad():
        expected.weight.copy_(found.weight.mT)
        for g in range(3):
            getattr(expected, f"bias{g}").copy_(getattr(found, f"bias{g}"))
    sizes = torch.tensor([5, 0, 7], device=device)
    one, other = og.Sequential(found), og.Sequential(expected)
    x = torch.randn(12, 16).to(device, dtype)
    plans = [module.plan(x=x) for module in (one, other)]
    assert [s.name for s in plans[0].backward] == [s.name for s in plans[1].backward]
    for _ in range(3):
        for module in (one, other):
            module.zero_grad()
            module(x, sizes).square().sum().backward()
        torch.testing.assert_close(one(x, sizes), other(x, sizes))
        names = ["weight"] if single else ["weight0", "weight1", "weight2"]
        gradients = [getattr(found, name).grad for name in names]
        assert all(gradient.is_contiguous() for gradient in gradients)
        together = gradients[0] if single else torch.stack(gradients)
        torch.testing.assert_close(together.mT, expected.weight.grad)
    stored = {name: tuple(value.shape) for name, value in found.state_dict().items()}
    assert stored["weight" if single else "weight1"] == ((3, 16, 24) if single else (16, 24))
    lazy = TransposedGroupedLinear(3, single_grouped_weight=not single)
    lazy.load_state_dict(found.state_dict())
    assert (lazy.in_features, lazy.out_features) == (16, 24)
    torch.testing.assert_close(og.Sequential(lazy.to(device, dtype))(x, sizes), one(x, sizes))
    copied = copy.deepcopy(one)
    torch.testing.assert_close(copied(x, sizes), one(x, sizes))


def test_groups_under_a_recipe() -> None:
    torch.manual_seed(0)
    found = TransposedGroupedLinear(2, 32, 64, bias=False, single_grouped_weight=True)
    expected = GroupedLinear(2, 32, 64, bias=False, single_grouped_weight=True)
    with torch.no_grad():
        expected.weight.copy_(found.weight.mT)
    x, sizes = torch.randn(64, 32), torch.tensor([32, 32])
    results = []
    for layer in (found, expected):
        with og.autocast(recipe=og.recipe.MXFP8BlockScaling()):
            y = og.Sequential(layer)(x, sizes)
        y.square().sum().backward()
        results.append(y)
    assert torch.equal(*results)
    torch.testing.assert_close(found.weight.grad.mT, expected.weight.grad)


def test_what_takes_linear_alone_says_so() -> None:
    layer: Any = TransposedLinear(*SIZES)
    with pytest.raises(og.OpError, match="a split among ranks, expected Linear"):
        layer.split("column", None, False)
    with pytest.raises(TypeError, match="tensor_parallel_mode"):
        TransposedLinear(*SIZES, tensor_parallel_mode="row")  # type: ignore[call-arg]
    late = og.Sequential(TransposedLinear(*SIZES), delay_wgrad_compute=True)
    with pytest.raises(
        og.OpError, match=r"got delay_wgrad_compute, expected .* \[out_features, in"
    ):
        late(torch.ones(2, 8))


@pytest.mark.parametrize("option", ["accumulate_into_main_grad", "delay_wgrad_compute"])
@pytest.mark.parametrize("groups", [False, True], ids=["one", "groups"])
def test_its_weight_gradient_is_autograds(option: str, groups: bool) -> None:
    layer: Any = TransposedGroupedLinear(2, *SIZES) if groups else TransposedLinear(*SIZES)
    module, given = og.Sequential(layer), (torch.tensor([1, 2]),) * groups
    module(torch.ones(3, 8), *given).sum().backward()
    setattr(layer, option, True)  # the constructor does not take it
    for weight in layer.parameters():
        weight.main_grad = torch.zeros_like(weight)
    with pytest.raises(og.OpError, match=rf"got {option}, expected .* \[out_features, in_features"):
        module(torch.ones(3, 8), *given)
    setattr(layer, option, False)
    module(torch.ones(3, 8), *given).sum().backward()
