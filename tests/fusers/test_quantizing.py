"""Which kernel quantizes a weight, and that the bits are the quantizer's whichever does."""

import gc
from collections.abc import Collection
from dataclasses import dataclass

import pytest
import torch
from recipe_cases import FP8, mlp
from torch import Tensor

import opsgraph as og
from opsgraph.base.backend import backends
from opsgraph.fusers import quantizing
from opsgraph.fusers.quantizing import KERNELS, quantize
from opsgraph.kernels.formats import E4M3, E5M2
from opsgraph.precision.microscaled import MXQuantizer, NVFP4Quantizer
from opsgraph.precision.quantizers import (
    BlockQuantizer,
    Copy,
    DelayedQuantizer,
    Quantizer,
    RowQuantizer,
    TensorQuantizer,
)
from opsgraph.testing import assert_same

CPU = torch.device("cpu")
absent = backends()["cpu"].why_not()
compiled = pytest.mark.skipif(absent is not None, reason=str(absent))
QUANTIZERS = [
    TensorQuantizer(E4M3),
    TensorQuantizer(E5M2, 1e-3, True),
    DelayedQuantizer(E4M3),
    RowQuantizer(E4M3),
    BlockQuantizer(E4M3),
    BlockQuantizer(E4M3, 128),
    BlockQuantizer(E4M3, 128, 1e-3, False),
    MXQuantizer(),
]


@dataclass(frozen=True)
class Halved(TensorQuantizer):
    """Of the kernels' class, and yet not what they compute."""

    def copy(self, x: Tensor, scale: Tensor | None = None, col: bool = False) -> Copy:
        made = super().copy(x / 2, scale, col)
        return self.made(made.data, made.scale / 2)


Call = tuple[Quantizer, tuple[int, ...]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """The quantizers for which the CPU's kernel has run, and the shapes of what it read."""
    gc.collect()  # modules of other tests, whose plans have chosen their kernels already
    found: list[Call] = []
    real = KERNELS["cpu"]

    def noted(
        quantizer: Quantizer, x: Tensor, scale: Tensor | None, names: Collection[str]
    ) -> quantizing.Made:
        found.append((quantizer, tuple(x.shape)))
        return real.quantize(quantizer, x, scale, names)

    monkeypatch.setitem(KERNELS, "cpu", real._replace(quantize=noted))
    return found


@compiled
@pytest.mark.sampled(16)
@pytest.mark.parametrize("names", [("row",), ("col",), ("row", "col")], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_bits_of_the_quantizer(
    calls: list[Call], quantizer: Quantizer, dtype: torch.dtype, names: tuple[str, ...]
) -> None:
    torch.manual_seed(0)
    weight = (torch.randn(272, 400) * torch.exp2(torch.randint(-9, 9, (272, 1)).float())).to(dtype)
    scale = torch.tensor(3.7) if quantizer.delayed else None
    per_tensor = type(quantizer) in (TensorQuantizer, DelayedQuantizer)
    asked = (*names, "amax") if per_tensor else names
    found, amax = quantize(("reference", "cpu"), quantizer, weight, scale, asked)
    expected = quantizer(weight, names, scale)
    assert calls == [(quantizer, tuple(weight.shape))]
    assert found.dtype == dtype
    for name in names:
        ours, theirs = (quantizer.parts(value, name) for value in (found, expected))
        for part, other in zip(ours, theirs, strict=True):
            assert part.dtype == other.dtype
            assert torch.equal(*(t.flatten().contiguous().view(torch.uint8) for t in (part, other)))
    assert amax == quantizer.amax(weight) if per_tensor else amax is None


@compiled
@pytest.mark.parametrize("name", FP8)
def test_a_layer_quantizes_its_weights_by_kernels(calls: list[Call], name: str) -> None:
    recipe = FP8[name]
    with og.autocast(recipe=recipe):
        mlp()(torch.randn(40, 64, dtype=torch.bfloat16))
    weights = [quantizer for quantizer, shape in calls if shape[0] != 40]
    assert weights == 2 * [recipe.quantizer("weight")]


@compiled
def test_kernels_of_a_backend_that_is_not_in_use_stay_out(calls: list[Call]) -> None:
    with og.autocast(recipe=FP8["current"]):
        mlp(backends=("aten", "reference"))(torch.randn(40, 64, dtype=torch.bfloat16))
    assert not calls


def test_what_no_kernel_writes_is_the_quantizers(calls: list[Call]) -> None:
    order, weight = tuple(backends()), torch.randn(32, 32)
    for quantizer, x in (
        (NVFP4Quantizer(16), weight),
        (Halved(E4M3), weight),
        (TensorQuantizer(E4M3), weight.half()),
        (TensorQuantizer(E4M3), weight.double()),
    ):
        found, expected = quantize(order, quantizer, x, None, ("row",))[0].row, quantizer(x).row
        assert found is not None
        assert expected is not None
        assert torch.equal(found.dequantize(), expected.dequantize())
        assert torch.equal(found.scale, expected.scale)
    assert not calls


def test_a_subclass_of_a_quantizer_computes_what_it_says() -> None:
    torch.manual_seed(0)
    x, halved = (
        torch.randn(40, 64, dtype=torch.bfloat16),
        og.recipe.CustomRecipe(lambda _: Halved(E4M3)),
    )
    results = []
    for backend in ((), ("reference",)):
        module = mlp(backends=backend or None)
        with og.autocast(recipe=halved):
            results.append(module(x).detach())
    assert_same(*results, "y")


@compiled
def test_a_block_size_of_what_has_no_gate_stops_no_fuser() -> None:
    """An attribute that means nothing to an activation changes no plan."""
    ops = og.ops.Linear(64, 128), og.ops.SiLU(), og.ops.Linear(128, 64)
    module = og.Sequential(*ops, dtype=torch.bfloat16)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    with og.autocast(recipe=og.recipe.MXFP8BlockScaling()):
        before = str(module.plan(x=x))
        ops[1].glu_interleave_size = 32
        assert "ActivationQuantizeCPU" in before
        assert str(module.plan(x=x)) == before
