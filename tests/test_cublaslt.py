"""Scaled GEMMs, by the same PyTorch call on the CPU, which computes them slowly and exactly."""

import pytest
import torch
from recipe_cases import RECIPES, example, mlp, results

import opsgraph as og
from opsgraph import backend
from opsgraph.fuser import registered
from opsgraph.fusers.cublaslt import scaled_mm
from opsgraph.ops import Linear
from opsgraph.quantizers import RowQuantizer, TensorQuantizer
from opsgraph.testing import check_fuser

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    everywhere = backend.Backend("cublaslt", "the same calls")
    monkeypatch.setitem(backend._BACKENDS, "cublaslt", everywhere)


@pytest.mark.parametrize("rows", [0, 1, 32, 37])
@pytest.mark.parametrize("kind", [TensorQuantizer, RowQuantizer])
def test_products(kind: type[TensorQuantizer], rows: int) -> None:
    torch.manual_seed(0)
    x, weight, dy = torch.randn(rows, 64), torch.randn(48, 64), torch.randn(rows, 48)
    qx, qw, qdy = kind(E4M3)(x), kind(E4M3)(weight), kind(E5M2)(dy)
    for a, b in ((qx.row, qw.row), (qdy.row, qw.col), (qdy.col, qx.col)):
        expected = a.dequantize() @ b.dequantize().t()
        torch.testing.assert_close(scaled_mm(a, b, torch.float32), expected)
    bias = torch.randn(48)
    found = scaled_mm(qx.row, qw.row, torch.float32, True, bias)
    torch.testing.assert_close(found, qx.row.dequantize() @ qw.row.dequantize().t() + bias)


@pytest.mark.parametrize("name", ["ScaledLinear", "ScaledLinearBackward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusers(name: str, dtype: torch.dtype) -> None:
    (fuser,) = [f for f in registered() if f.name == name]
    assert check_fuser(fuser, dtype) > 0


def test_a_whole_block_takes_what_was_quantized() -> None:
    native = mlp(backends=("cublaslt", "reference"))
    reference = og.Sequential(*native, backends=("reference",))
    recipe = RECIPES["current"]
    with og.autocast(recipe=recipe):
        plan = native.plan()
    names = [step.name for step in (*plan.forward, *plan.backward)]
    assert names.count("ScaledLinear") == names.count("ScaledLinearBackward") == 2
    assert "BasicLinear" not in names
    for one, other in zip(
        results(native, recipe, example()), results(reference, recipe, example()), strict=True
    ):
        assert float((one - other).norm()) <= 6e-2 * float(other.norm())


def test_main_grad() -> None:
    layers = [Linear(64, 32, accumulate_into_main_grad=True) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = example(dtype=torch.float32)
    for layer, order in zip(layers, (("cublaslt", "reference"), ("reference",)), strict=True):
        layer.weight.main_grad = torch.ones(32, 64)
        with og.autocast(recipe=RECIPES["current"]):
            og.Sequential(layer, backends=order)(x).square().sum().backward()
    torch.testing.assert_close(layers[0].weight.main_grad, layers[1].weight.main_grad)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mx", "mxe4m3 by mxe4m3 is emulated"),
        ("blocks", "e4m3b by e4m3b is emulated"),
        ("nvfp4", "nvfp4 by nvfp4 is emulated"),
        ("high precision", "it takes quantized values, and these are not"),
        ("rows", "with scales by rows it writes bf16, not torch.float32"),
    ],
)
def test_refusals_say_why(name: str, reason: str) -> None:
    module = mlp(torch.float32)
    with og.autocast(recipe=RECIPES[name]):
        assert reason in str(module.plan())


def test_e5m2_by_e5m2_is_refused() -> None:
    recipe = og.recipe.Float8CurrentScaling(fp8_format=og.recipe.Format.E5M2)
    with og.autocast(recipe=recipe):
        assert "no unit multiplies E5M2 by E5M2" in str(mlp().plan())
