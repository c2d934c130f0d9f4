"""Layers under recipes, against fp64 formulas, and what their plans say."""

from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from recipe_cases import FFN, FP4, FP8, HIDDEN, RECIPES, ROWS, by_hand, example, mlp, results
from saved_bytes import saved_bytes
from torch import Tensor

import opsgraph as og
from opsgraph.base import config
from opsgraph.ops import GroupedLinear, Linear, Quantize, RMSNorm, SiLU
from opsgraph.precision import recipe as r
from opsgraph.quantizers import Copy, Quantizer, Storage

E4M3, E5M2 = (0.125, 0.0675), (0.25, 0.125)
"""(rtol, atol) against fp64."""


def in_fp64(module: Any, x: Tensor) -> list[Tensor]:
    """RMSNorm, Linear, SwiGLU, Linear by their formulas, and autograd's gradients."""
    gamma, w1, b1, w2, b2 = (p.detach().double().requires_grad_() for p in module.parameters())
    x = x.detach().double().requires_grad_()
    h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * gamma
    gate, value = (h @ w1.t() + b1).chunk(2, -1)
    y = (gate * torch.sigmoid(gate) * value) @ w2.t() + b2
    torch.manual_seed(2)
    dy = torch.randn_like(y, dtype=torch.bfloat16).double()
    return [y.detach(), *torch.autograd.grad(y, [x, gamma, w1, b1, w2, b2], dy)]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", FP8)
def test_fp8_is_within_its_formats_tolerance_of_fp64(name: str) -> None:
    module, x = mlp(), example()
    found, expected = results(module, FP8[name], x), in_fp64(module, x)
    rtol, atol = E4M3
    torch.testing.assert_close(found[0].double(), expected[0], rtol=rtol, atol=atol)
    rtol, atol = E5M2
    for one, other in zip(found[1:], expected[1:], strict=True):
        size = float(other.abs().max())
        torch.testing.assert_close(one.double() / size, other / size, rtol=rtol, atol=atol)
        assert distance(one, other) < 0.15


@pytest.mark.parametrize("name", FP4)
def test_nvfp4_is_as_near_to_fp64_as_four_bits_come(name: str) -> None:
    module, x = mlp(), example()
    for one, other in zip(results(module, FP4[name], x), in_fp64(module, x), strict=True):
        assert distance(one, other) < 0.4


@dataclass(frozen=True)
class RowsOfInt8(Quantizer):
    """int8 with a scale for each row of a copy, from its own amax."""

    storage = Storage("int8r", 8)

    def copy(self, x: Tensor, scale: Tensor | None = None, col: bool = False) -> Copy:
        scale = 127 / x.float().abs().amax(1, keepdim=True).clamp_min(1e-12)
        return self.made((x * scale).round().to(torch.int8), scale)

    def dequantize(self, copy: Copy, dtype: torch.dtype) -> Tensor:
        return (copy.data / copy.scale).to(dtype)

    def specs(self, rows: int, cols: int, device: torch.device) -> tuple[og.Spec, ...]:
        return og.Spec((rows, cols), torch.int8, device), og.Spec((rows, 1), torch.float32, device)


@dataclass(frozen=True)
class Int8Scaling(r.Recipe):
    """Integers of 8 bits; gradients are E5M2 unless they are integers, too."""

    integer_gradients: bool = False

    def quantizer(self, role: str) -> Quantizer:
        if role == "gradient" and not self.integer_gradients:
            return og.quantizers.RowQuantizer(torch.float8_e5m2)
        return RowsOfInt8()


@pytest.mark.parametrize("integers", [False, True])
def test_a_recipe_of_ones_own_with_a_format_of_its_own(integers: bool) -> None:
    recipe, x = Int8Scaling(integers), example()
    module = mlp(recompute=False)
    eager, expected = results(module, recipe, x), in_fp64(module, x)
    for one, other in zip(eager, expected, strict=True):
        assert distance(one, other) < (0.03 if integers else 0.15)
    with og.autocast(recipe=recipe):
        assert "int8r[*,64]" in str(module.plan())
    compiled = results(module, recipe, x, torch.compile(module, backend="aot_eager"))
    for one, other in zip(compiled, eager, strict=True):
        assert torch.equal(one, other)
    with og.quantized_model_init(recipe=recipe):
        held = mlp()
    assert "int8r" in repr(held[1].weight)
    assert distance(results(held, recipe, x)[0], expected[0]) < 0.03


def test_a_recipe_of_ones_own_is_checked_and_counts_by_its_fields() -> None:
    with pytest.raises(og.OpsgraphError, match=r"integer_gradients=2.*expected True or False"):
        Int8Scaling(2)  # type: ignore[arg-type]
    assert Int8Scaling(True).key == Int8Scaling(True).key != Int8Scaling().key


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_changes_what_is_computed(name: str) -> None:
    module, x = mlp(), example()
    plain, quantized = results(module, None, x), results(module, RECIPES[name], x)
    assert distance(quantized[0], plain[0].double()) > 0.01
    again = results(module, None, x)
    assert all(map(torch.equal, plain, again))


@pytest.mark.sampled(26)
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    "options", [dict(recompute=False), dict(checkpoint=True), dict(planner="optimal")]
)
def test_every_plan_gives_the_same_bits(name: str, options: dict[str, Any]) -> None:
    module, x = mlp(), example()
    other = og.Sequential(*module, **options)
    one = replace(RECIPES[name])
    for _ in range(2):
        # Delayed scales change from call to call, but not within one context.
        with og.autocast(recipe=one):
            found, expected = (results(m, one, x) for m in (other, module))
        assert all(map(torch.equal, found, expected))


def test_the_gemm_multiplies_what_the_quantizers_wrote() -> None:
    layer, x = Linear(HIDDEN, 32, bias=False), example(dtype=torch.float32).requires_grad_()
    recipe = r.Float8CurrentScaling()
    with og.autocast(recipe=recipe):
        y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)

    def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
        scale = torch.finfo(dtype).max / value.abs().max()
        return (value * scale).to(dtype).double() / scale.double()

    qx, qw = rounded(x.detach(), torch.float8_e4m3fn), rounded(layer.weight, torch.float8_e4m3fn)
    qdy = rounded(dy, torch.float8_e5m2)
    close: dict[str, Any] = dict(rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(y.double(), qx @ qw.t(), **close)
    torch.testing.assert_close(x.grad.double(), qdy @ qw, **close)
    torch.testing.assert_close(layer.weight.grad.double(), qdy.t() @ qx, **close)


@pytest.mark.parametrize("override", ["high_precision", "dequantized"])
def test_backward_override(override: str) -> None:
    layer, x = Linear(HIDDEN, 32, bias=False), example(dtype=torch.float32).requires_grad_()
    recipe = r.MXFP8BlockScaling(backward_override=override)
    with og.autocast(recipe=recipe):
        y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    qx, qw = x.detach(), layer.weight.detach()
    if override == "dequantized":
        qx, qw = recipe.quantize(qx).dequantize(), recipe.quantize(qw, "weight").dequantize()
    torch.testing.assert_close(x.grad, dy @ qw)
    torch.testing.assert_close(layer.weight.grad, dy.t() @ qx)


@pytest.mark.parametrize("name", RECIPES)
def test_main_grad_takes_the_quantized_product(name: str) -> None:
    recipe, x = RECIPES[name], example(dtype=torch.float32)
    layer = Linear(HIDDEN, 32, accumulate_into_main_grad=True)
    plain = Linear(HIDDEN, 32)
    plain.load_state_dict(layer.state_dict())
    layer.weight.main_grad = torch.ones(32, HIDDEN)
    for module in (layer, plain):
        torch.manual_seed(3)
        with og.autocast(recipe=recipe):
            y = module(x)
        y.square().sum().backward()
    torch.testing.assert_close(layer.weight.main_grad, plain.weight.grad + 1)


# -- plans --

PLAIN = 2 * HIDDEN + 4 * FFN + 4
KEPT = 3 * HIDDEN + 5 * FFN + 4


def bytes_per_row(module: Any, recipe: r.Recipe) -> float:
    def saved(rows: int) -> int:
        x = example(rows).requires_grad_()
        with og.autocast(recipe=recipe):
            return saved_bytes(lambda: module(x))

    return (saved(512) - saved(256)) / 256


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_keep_what_bf16_keeps(name: str) -> None:
    recipe, module = RECIPES[name], mlp()
    with og.autocast(recipe=recipe):
        assert module.plan().saved_bytes_per_row == PLAIN
    assert bytes_per_row(module, recipe) == PLAIN


@pytest.mark.parametrize("name", ["current", "delayed", "rows", "blocks", "mx", "nvfp4"])
def test_without_recomputation_the_quantized_copies_are_kept(name: str) -> None:
    recipe, module = RECIPES[name], mlp(recompute=False)
    scales = {"blocks": 4 / 128, "mx": 1 / 32}.get(name, 0.0)
    bits = 0.5 + 1 / 16 if name == "nvfp4" else 1 + scales
    expected = PLAIN + bits * (HIDDEN + FFN)
    assert bytes_per_row(module, recipe) == expected
    with og.autocast(recipe=recipe):
        counted = module.plan().saved_bytes_per_row
    # A row of 64 or 192 values has whole scales in the plan's account.
    assert expected <= counted <= expected + 4
    if name in ("current", "delayed", "rows"):
        assert counted == KEPT


@pytest.mark.usefixtures("without_cpu_backend")
def test_the_plan_shows_what_is_quantized() -> None:
    module = mlp()
    with og.autocast(recipe=r.Float8CurrentScaling()):
        plan = module.plan()
    text = str(plan)
    assert "q1  Quantize                 reference  bf16[*,64] -> e4m3[*,64]" in text
    assert "BasicLinear              reference  e4m3[*,64] -> bf16[*,256]" in text
    assert "g4  QuantizeGrad" in text
    assert "it takes plain values, and the recipe quantizes the linear's" in text


def test_names_do_not_depend_on_the_recipe() -> None:
    module = mlp()
    plain = module.plan()
    with og.autocast(recipe=r.MXFP8BlockScaling()):
        quantized = module.plan()
    assert set(plain.saved) == set(quantized.saved)
    added = {number for number in quantized.numbers if number not in plain.numbers}
    assert added == {"q1", "g1", "q4", "g4"}


CHANGED: dict[type[r.Recipe], dict[str, Any]] = {
    r.DelayedScaling: dict(
        margin=1, fp8_format=r.Format.E4M3, amax_history_len=7, amax_compute_algo="most_recent",
        reduce_amax=False,
    ),
    r.Float8CurrentScaling: dict(
        fp8_format=r.Format.E4M3, row_wise=True, use_power_2_scales=True, amax_epsilon=0.5
    ),
    r.Float8BlockScaling: dict(
        fp8_format=r.Format.HYBRID, use_f32_scales=True, amax_epsilon=0.5
    ),
    r.MXFP8BlockScaling: dict(fp8_format=r.Format.HYBRID),
    r.NVFP4BlockScaling: dict(
        disable_rht=True, disable_stochastic_rounding=True, disable_2d_quantization=True
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, n) for k, names in CHANGED.items() for n in (*names, "backward_override")],
)
def test_every_field_makes_another_recipe(kind: type[r.Recipe], name: str) -> None:
    assert {f.name for f in fields(kind)} == {*CHANGED[kind], "backward_override"}
    first = kind()
    changed = (CHANGED[kind] | dict(backward_override="dequantized"))[name]
    second = replace(first, **{name: changed})
    assert first.key != second.key
    assert kind().key == first.key
    module = mlp()
    for recipe in (first, second, first):
        with og.autocast(recipe=recipe):
            module(example())
    assert set(module._recipes) == {first.key, second.key}


def test_autocast_nests_and_decorates() -> None:
    module, x = mlp(), example()
    current, mx = r.Float8CurrentScaling(), r.MXFP8BlockScaling()
    plain, one, other = (results(module, recipe, x)[0] for recipe in (None, current, mx))
    with og.autocast(recipe=current):
        with og.autocast(recipe=mx):
            assert torch.equal(module(x), other)
            with og.autocast(enabled=False):
                assert torch.equal(module(x), plain)
        assert torch.equal(module(x), one)
    assert torch.equal(og.autocast(recipe=mx)(module)(x), other)
    assert torch.equal(module(x), plain)
    with pytest.raises(KeyError), og.autocast(recipe=mx):
        raise KeyError
    assert torch.equal(module(x), plain)


def test_torch_autocast_and_a_recipe() -> None:
    module, x = mlp(torch.float32), example(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(module, r.Float8CurrentScaling(), x)
    assert found[0].dtype == torch.bfloat16
    assert {g.dtype for g in found[1:]} == {torch.float32}
    for one, other in zip(found, in_fp64(module, x), strict=True):
        assert distance(one, other) < 0.15


# -- other layers --


@pytest.mark.parametrize("name", RECIPES)
def test_layernorm_mlp_is_the_sequence(name: str) -> None:
    sequence = mlp()
    module = og.LayerNormMLP(
        HIDDEN, FFN, normalization="RMSNorm", activation="swiglu", device="cpu",
        params_dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.no_grad():
        for one, other in zip(module.parameters(), sequence.parameters(), strict=True):
            one.copy_(other)
    recipe = replace(RECIPES[name])
    x = example(3 * ROWS).view(3, ROWS, HIDDEN)
    with og.autocast(recipe=recipe):
        found, expected = (results(m, recipe, x) for m in (module, sequence))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", RECIPES)
def test_a_groups_result_is_that_of_a_linear(name: str) -> None:
    torch.manual_seed(0)
    recipe = RECIPES[name]
    if isinstance(recipe, r.DelayedScaling):  # groups have scales of their own
        expected_recipe: r.Recipe = r.Float8CurrentScaling()
    else:
        expected_recipe = recipe
    if isinstance(recipe, r.NVFP4BlockScaling):
        recipe = expected_recipe = replace(recipe, disable_stochastic_rounding=True)
    layer, sizes = GroupedLinear(3, HIDDEN, 32), [7, 0, 33]
    x = example(sum(sizes), torch.float32).requires_grad_()
    dy = torch.randn(sum(sizes), 32)
    with og.autocast(recipe=recipe):
        y = layer(x, torch.tensor(sizes))
    y.backward(dy)
    start = 0
    for g, size in enumerate(sizes):
        single = Linear(HIDDEN, 32)
        single.load_state_dict({"weight": layer.weight[g], "bias": layer.bias[g]})
        rows = slice(start, start + size)
        piece = x.detach()[rows].requires_grad_()
        with og.autocast(recipe=expected_recipe):
            out = single(piece)
        out.backward(dy[rows])
        torch.testing.assert_close(y[rows], out)
        torch.testing.assert_close(x.grad[rows], piece.grad)
        torch.testing.assert_close(layer.weight.grad[g], single.weight.grad)
        torch.testing.assert_close(layer.bias.grad[g], single.bias.grad)
        start += size


def grouped(**options: Any) -> og.Sequential:
    torch.manual_seed(0)
    return og.Sequential(GroupedLinear(3, HIDDEN, 32), dtype=torch.bfloat16, **options)


def grouped_results(module: og.Sequential, recipe: r.Recipe, sizes: Tensor) -> list[Tensor]:
    return results(module, recipe, example(int(sizes.sum())), lambda x: module(x, sizes))


@pytest.mark.parametrize("name", RECIPES)
def test_whoever_quantizes_groups_the_bits_are_the_same(name: str) -> None:
    module, sizes = grouped(), torch.tensor([7, 0, 33])
    reference = og.Sequential(*module, backends=("reference",))
    found, expected = (grouped_results(m, RECIPES[name], sizes) for m in (module, reference))
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", RECIPES)
def test_a_second_call_plans_nothing(name: str) -> None:
    module, dense, sizes = grouped(), mlp(), torch.tensor([7, 0, 33])
    for call in (
        lambda: grouped_results(module, RECIPES[name], sizes),
        lambda: results(dense, RECIPES[name], example()),
    ):
        call()
        before = config.epoch
        call()
        assert config.epoch == before, "every module was made to look for its plans again"


def test_a_users_quantize_rounds_values_and_gradients() -> None:
    recipe = r.Float8CurrentScaling()
    module, x = og.Sequential(SiLU(), Quantize(True, True)), example(dtype=torch.float32)
    x.requires_grad_()
    plain = torch.nn.functional.silu(x)
    torch.testing.assert_close(module(x), plain)
    with og.autocast(recipe=recipe):
        y = module(x)
    torch.testing.assert_close(y, recipe.quantize(plain).dequantize())
    dy = torch.randn_like(y)
    rounded = recipe.quantize(dy, "gradient").dequantize()
    (found,) = torch.autograd.grad(y, x, dy)
    (expected,) = torch.autograd.grad(plain, x, rounded)
    torch.testing.assert_close(found, expected)


def test_a_users_quantize_beside_a_linear_adds_nothing() -> None:
    layer, x = Linear(HIDDEN, HIDDEN, bias=False), example(dtype=torch.float32)
    between = og.Sequential(Quantize(), layer, Quantize(False, True))
    recipe = r.MXFP8BlockScaling()
    found, expected = results(between, recipe, x), results(og.Sequential(layer), recipe, x)
    assert all(map(torch.equal, found, expected))


# -- `recipe.quantize` and errors --


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("role", r.ROLES)
def test_one_quantized_copy(name: str, role: str) -> None:
    x = example().view(4, 10, HIDDEN)
    copy = RECIPES[name].quantize(x, role=role)
    found = copy.dequantize()
    assert found.shape == x.shape
    assert found.dtype == x.dtype
    assert copy.data.dtype.itemsize == 1
    assert distance(found, x.double()) < (0.2 if name in FP4 else 0.1)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 0), (0, 32), (0, 0)], ids=str)
def test_one_quantized_copy_of_nothing(name: str, shape: tuple[int, ...]) -> None:
    found = RECIPES[name].quantize(torch.empty(shape)).dequantize()
    assert found.shape == shape


def test_first_and_later_microbatches() -> None:
    module = og.LayerNormMLP(HIDDEN, FFN, device="cpu")
    x = example(dtype=torch.float32)
    with og.autocast(recipe=r.Float8CurrentScaling()):
        first = module(x, is_first_microbatch=True)
        with torch.no_grad():
            module.fc1_weight.mul_(2)
        assert torch.equal(module(x, is_first_microbatch=False), first)
        fresh = module(x)
        assert not torch.equal(fresh, first)
        assert torch.equal(module(x, is_first_microbatch=False), first)
        assert torch.equal(module(x, is_first_microbatch=True), fresh)
        assert torch.equal(module(x, is_first_microbatch=False), fresh)


@pytest.mark.parametrize("name", ["current", "blocks", "nvfp4"])
def test_sizes_that_do_not_fit(name: str) -> None:
    x = torch.randn(4, 40)
    with og.autocast(recipe=RECIPES[name]):
        with pytest.raises(og.OpError, match=r"1:Linear: got in_features 40, expected a multiple"):
            og.Sequential(RMSNorm(40), Linear(40, 64))(x)
        with pytest.raises(og.OpError, match=r"got out_features 24, expected a multiple of 16"):
            Linear(64, 24)(torch.randn(4, 64))
        with pytest.raises(og.OpError, match=r"GroupedLinear: got out_features 24, expected"):
            GroupedLinear(2, 64, 24)(torch.randn(4, 64), torch.tensor([2, 2]))


def test_mxfp8_wants_multiples_of_32() -> None:
    with (
        og.autocast(recipe=r.MXFP8BlockScaling()),
        pytest.raises(og.OpError, match="in_features 48, expected a multiple of 32 for mxe4m3"),
    ):
        Linear(48, 64)(torch.randn(4, 48))


def test_double_backward_is_refused() -> None:
    module = og.Sequential(Linear(HIDDEN, 32), double_backward=True)
    refused = pytest.raises(og.PlanError, match="double_backward: a recipe's rounding has no")
    with refused, og.autocast(recipe=r.MXFP8BlockScaling()):
        module(example(dtype=torch.float32))


@pytest.mark.parametrize("rows", [0, 1, 3, 129])
@pytest.mark.parametrize("name", RECIPES)
def test_any_number_of_rows(name: str, rows: int) -> None:
    module = mlp()
    found = results(module, RECIPES[name], example(rows))
    for one, other in zip(found, [example(rows), example(rows), *module.parameters()], strict=True):
        assert one.shape == other.shape
        assert bool(one.isfinite().all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: r.DelayedScaling(amax_history_len=0), "amax_history_len 0, expected at least 1"),
        (lambda: r.DelayedScaling(amax_compute_algo="min"), "amax_compute_algo 'min', expected"),
        (lambda: r.MXFP8BlockScaling(backward_override="fp64"), "backward_override 'fp64'"),
        (lambda: r.MXFP8BlockScaling().quantize(torch.ones(2, 32), "bias"), "role 'bias'"),
        (lambda: og.autocast(recipe=r.MXFP8BlockScaling), "expected one of opsgraph.recipe"),
        (lambda: r.CustomRecipe(lambda role: None).quantizer("weight"), "NoneType for weight"),
    ],
)
def test_wrong_recipes(make: Any, message: str) -> None:
    with pytest.raises(og.OpsgraphError, match=message):
        make()


def test_layers_share_the_quantizers_that_a_recipe_makes() -> None:
    roles = list[str]()

    def made(role: str) -> Quantizer:
        roles.append(role)
        return by_hand(role)

    recipe, x = r.CustomRecipe(made), torch.ones(4, 32, dtype=torch.bfloat16)
    for count in (3, 2):
        layers = [Linear(32, 32, dtype=torch.bfloat16, device="cpu") for _ in range(count)]
        with og.autocast(recipe=recipe):
            og.Sequential(*layers)(x)
    assert sorted(roles) == ["activation", "gradient", "weight"]
    with og.autocast(recipe=r.CustomRecipe(lambda role: made(role))):
        og.Sequential(*layers)(x)
    assert len(roles) == 6


def test_each_layer_has_its_own_delayed_scales() -> None:
    layers = [Linear(32, 32, dtype=torch.bfloat16, device="cpu") for _ in range(2)]
    with og.autocast(recipe=r.DelayedScaling()):
        og.Sequential(*layers)(torch.ones(4, 32, dtype=torch.bfloat16))
    first, second = (float(layer.scaling.amax_history[:, 0].max()) for layer in layers)
    assert first == 1.0
    assert 0.0 < second != 1.0


@pytest.mark.parametrize("name", ["current", "delayed", "mx", "nvfp4 plain", "dequantized"])
def test_delayed_weight_gradients(name: str) -> None:
    torch.manual_seed(0)
    plain = og.LayerNormMLP(HIDDEN, FFN, activation="swiglu", device="cpu")
    late = og.LayerNormMLP(HIDDEN, FFN, activation="swiglu", device="cpu", delay_wgrad_compute=True)
    late.load_state_dict(plain.state_dict())
    x, recipe = example(dtype=torch.float32), replace(RECIPES[name])
    with og.autocast(recipe=recipe):
        for module in (plain, late):
            with og.autocast(recipe=recipe):
                y = module(x)
            y.square().sum().backward()
    assert late.fc1_weight.grad is None
    late.backward_dw()
    for one, other in zip(late.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("name", ["current", "blocks", "delayed"])
def test_frozen_weights(name: str) -> None:
    recipe, module, x = replace(RECIPES[name]), mlp(), example()
    with og.autocast(recipe=recipe):
        expected = results(module, recipe, x)[2:]
        module[3].weight.requires_grad_(False)
        with og.autocast(recipe=recipe):
            y = module(x)
        torch.manual_seed(2)
        dy = torch.randn_like(y)
        leaves = [p for p in module.parameters() if p.requires_grad]
        found = torch.autograd.grad(y, leaves, dy)
    rest = [g for g, p in zip(expected, module.parameters(), strict=True) if p.requires_grad]
    assert len(rest) == len(expected) - 1
    assert all(map(torch.equal, found, rest))


@pytest.mark.usefixtures("without_cpu_backend")
def test_want_names_the_copies() -> None:
    module = mlp()
    module[3].weight.requires_grad_(False)
    x = example()
    with og.autocast(recipe=r.MXFP8BlockScaling()):
        module(x)
        (plan,) = module._current()[0].plans.values()
    lines = [line for line in plan.backward_source.split("\n") if "QuantizeGrad.bwd" in line]
    assert "want=('x', 'row')" in lines[0]  # the frozen weight's layer
    module[3].weight.requires_grad_(True)
    module[0].weight.requires_grad_(False)
    with og.autocast(recipe=r.MXFP8BlockScaling()):
        module(x)
        plan = list(module._current()[0].plans.values())[-1]
    lines = [line for line in plan.backward_source.split("\n") if "QuantizeGrad.bwd" in line]
    assert "want=('x', 'row', 'col')" in lines[0]
    assert "'col')" in lines[1]
    assert "'row'" not in lines[1]  # nothing before the first layer wants a gradient


def test_an_extra_output_of_the_norm_is_the_plain_value() -> None:
    module = og.LayerNormMLP(
        HIDDEN, FFN, normalization="RMSNorm", device="cpu", return_layernorm_output=True
    )
    x = example(dtype=torch.float32)
    plain = module(x)[1]
    with og.autocast(recipe=r.Float8CurrentScaling()):
        assert torch.equal(module(x)[1], plain)
