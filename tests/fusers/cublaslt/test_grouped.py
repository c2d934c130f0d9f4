"""GroupedLinear by grouped scaled GEMMs, beside the emulated op; without a GPU by an fp64 stand-in
for the library's call."""

from typing import Any

import pytest
import torch
from torch import Tensor

import opsgraph as og
from opsgraph.base import backend
from opsgraph.fusers.cublaslt import grouped as cublaslt_grouped
from opsgraph.fusers.cublaslt import products as cublaslt
from opsgraph.ops import GroupedLinear
from opsgraph.recipe import Float8BlockScaling, Float8CurrentScaling, Format

ROWS_E4M3 = Float8CurrentScaling(Format.E4M3, row_wise=True)
CALL = torch._scaled_grouped_mm
SIZES = [[5, 0, 40, 3], [16, 16, 16, 0], [0, 0, 0, 48]]


def manual(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, offs: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """What the call computes, and what it asks for."""
    groups, depth, width = b.shape
    assert a.is_contiguous()
    assert b.transpose(1, 2).is_contiguous()
    assert depth % 16 == width % 16 == 0
    assert offs.dtype == torch.int32
    assert scale_a.shape == (a.size(0),)
    assert scale_b.shape == (groups, width)
    given = (t.to("meta") for t in (a, b, scale_a, scale_b, offs))
    assert CALL(*given, out_dtype=out_dtype).shape == (a.size(0), width)
    y = torch.full((a.size(0), width), torch.nan, dtype=torch.float64)
    start = 0
    for g, end in enumerate(offs.tolist()):
        product = a[start:end].double() @ b[g].double()
        y[start:end] = product * scale_a[start:end, None] * scale_b[g]
        start = end
    return y.to(out_dtype)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's call in fp64, on any device."""
    everywhere = backend.Backend("cublaslt", "the same calls")
    monkeypatch.setitem(backend._BACKENDS, "cublaslt", everywhere)
    monkeypatch.setattr(cublaslt_grouped, "GROUPED", cublaslt_grouped.GROUPED._replace(chip=0))
    monkeypatch.setattr(torch, "_scaled_grouped_mm", manual)


def check(sizes: list[int], bias: bool, device: str) -> None:
    """Results and gradients of the fuser and of the reference."""
    torch.manual_seed(0)
    place: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    layer = GroupedLinear(4, 64, 48, bias=bias, **place)
    modules = [
        og.Sequential(layer, backends=b) for b in (("cublaslt", "reference"), ("reference",))
    ]
    split = torch.tensor(sizes, device=device)
    x, dy = torch.randn(48, 64, **place), torch.randn(48, 48, **place)
    with og.autocast(recipe=ROWS_E4M3):
        assert "ScaledGroupedLinear" in str(modules[0].plan())
    found = []
    for module in modules:
        leaf = x.clone().requires_grad_()
        with og.autocast(recipe=ROWS_E4M3):
            y = module(leaf, split)
        found.append([y, *torch.autograd.grad(y, [leaf, *layer.parameters()], dy)])
    for one, other in zip(*found, strict=True):
        size = float(other.detach().abs().max())
        torch.testing.assert_close(one, other, rtol=2**-6, atol=2**-8 * size)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.usefixtures("library")
def test_all_groups(sizes: list[int], bias: bool) -> None:
    check(sizes, bias, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_all_groups_by_the_library(sizes: list[int], bias: bool) -> None:
    reason = backend.backends()["cublaslt"].why_not() or cublaslt_grouped.GROUPED.why_not()
    if reason is not None:
        pytest.skip(reason)
    check(sizes, bias, "cuda")


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (ROWS_E4M3, "groups are emulated: units for it are those of sm_90"),
        (Float8CurrentScaling(row_wise=True), "groups of e4m3r by e5m2r are emulated"),
        (Float8BlockScaling(), "groups of e4m3b are emulated"),
        (
            Float8CurrentScaling(Format.E4M3, row_wise=True, backward_override="dequantized"),
            "the recipe leaves the gradient in high precision",
        ),
    ],
)
def test_refusals_say_why(
    recipe: og.recipe.Recipe, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cublaslt, "chip", lambda: 0)
    everywhere = backend.Backend("cublaslt", "the same calls")
    monkeypatch.setitem(backend._BACKENDS, "cublaslt", everywhere)
    module = og.Sequential(GroupedLinear(2, 64, 48, dtype=torch.bfloat16))
    with og.autocast(recipe=recipe):
        assert reason in str(module.plan())
