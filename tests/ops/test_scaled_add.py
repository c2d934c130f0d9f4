"""Scaled residuals: which steps they are, dtypes, and what is refused."""

from typing import Any

import pytest
import torch
from torch import nn

import opsgraph as og
from opsgraph.ops import (
    Add,
    ConstantScale,
    Linear,
    Residual,
    RMSNorm,
    ScaledAdd,
    SiLU,
    SwiGLU,
    Tee,
    WeightedAdd,
)
from opsgraph.tune.eager import Eager

F32, BF16 = torch.float32, torch.bfloat16


def _steps(module: og.Sequential, x: torch.Tensor) -> list[str]:
    plan = module.plan(x=x)
    return [step.name for step in (*plan.forward, *plan.backward)]


@pytest.mark.parametrize("backends", [None, ("aten", "reference")], ids=["all", "aten"])
def test_a_scaled_residual(backends: object, device: str) -> None:
    layers = Linear(8, 16, bias=False), SwiGLU(), Linear(8, 8, bias=False)
    options = {} if backends is None else {"backends": backends}
    residual = Residual(RMSNorm(), *layers, scale=0.5, residual_scale=0.75)
    module = og.Sequential(residual, device=device, **options)
    x = torch.randn(3, 8, device=device)
    if backends:  # factors are the product's alpha and beta
        assert "LinearScaledAdd" in _steps(module, x)
    expected = 0.75 * x + 0.5 * og.Sequential(RMSNorm(8, device=device), *layers)(x)
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(Eager(*module)(x), expected)
    assert repr(module[0]).startswith("Residual(\n  scale=0.5, residual_scale=0.75")
    module[0].residual_scale = 1.0
    if backends or device == "cpu":
        assert ("LinearScaleAdd" if backends else "ScaleAdd") in _steps(module, x)
    torch.testing.assert_close(module(x), expected + 0.25 * x)
    module[0].scale = 1.0
    torch.testing.assert_close(module(x), x + 2 * (expected - 0.75 * x))


def test_a_weighted_residual_keeps_no_more_than_a_plain_one(device: str) -> None:
    kept = []
    for add in (Add("r"), WeightedAdd("r", 8)):
        ops = Tee("r"), RMSNorm(8), Linear(8, 8), SiLU(), Linear(8, 8), add
        module, x = og.Sequential(*ops, device=device), torch.ones(3, 8, device=device)
        kept.append(module.plan(x=x).saved_bytes_per_row)
        if not isinstance(add, Add) and device == "cpu":
            assert {"WeightedAddKernel", "WeightedAddBackward"} <= {*_steps(module, x)}
    assert kept[0] == kept[1]


@pytest.mark.parametrize("backends", [None, ("reference",)], ids=["fused", "reference"])
@pytest.mark.parametrize("weight_dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16), (BF16, BF16)], ids=str)
def test_each_gradient_has_its_own_inputs_dtype(
    dtypes: tuple[torch.dtype, torch.dtype],
    weight_dtype: torch.dtype,
    backends: object,
    device: str,
) -> None:
    torch.manual_seed(0)
    op = WeightedAdd(width=24, init_value=0.3, device=device, dtype=weight_dtype)
    options = {} if backends is None else {"backends": backends}
    module = og.Sequential(op, **options)
    given = [torch.randn(40, 24).to(device, dtype) for dtype in dtypes]
    x, other = (tensor.clone().requires_grad_() for tensor in given)
    y = module(x, other)
    eager = given[0] + given[1] * op.weight.detach()
    assert y.dtype == eager.dtype
    torch.testing.assert_close(y, eager, rtol=1e-2, atol=1e-2)
    dy = torch.randn(y.shape).to(y)
    found = torch.autograd.grad(y, [x, other, op.weight], dy)
    assert [g.dtype for g in found] == [*dtypes, weight_dtype]
    exact = dy.double(), dy.double() * 0.3, (dy.double() * given[1].double()).sum(0)
    for got, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(got.double(), wanted, rtol=1e-2, atol=2e-2)


def test_under_autocast_a_stream_in_fp32_stays_so(device: str) -> None:
    module = og.Sequential(Tee("r"), Linear(8, 8), WeightedAdd("r", 8), device=device)
    x = torch.randn(4, 8, device=device, requires_grad=True)
    with torch.autocast(device, BF16):
        y = module(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == module[2].weight.grad.dtype == F32


def test_under_autocast_a_weight_in_fp32_makes_a_stream_that_products_cast(device: str) -> None:
    for first in (SiLU(), Linear(8, 8)):
        ops = first, Tee("r"), WeightedAdd("r", 8, 0.3), Linear(8, 8)
        module = og.Sequential(*ops, device=device)
        x = torch.randn(4, 8, device=device, requires_grad=True)
        with torch.autocast(device, BF16):
            h = first(x).to(BF16)
            y, eager = module(x), nn.functional.linear(h + h * ops[2].weight, *ops[3].parameters())
        assert y.dtype == eager.dtype == BF16
        torch.testing.assert_close(y, eager, rtol=2e-2, atol=2e-2)
        operands, dy = [x, *module.parameters()], torch.randn_like(y)
        for got, wanted in zip(
            *(torch.autograd.grad(each, operands, dy) for each in (y, eager)), strict=True
        ):
            assert got.dtype == F32
            torch.testing.assert_close(got, wanted, rtol=3e-2, atol=4e-2)


@pytest.mark.parametrize("bias", [False, True], ids=["product", "bias"])
def test_a_scaled_residual_in_fp32_stays_so_under_autocast(bias: bool, device: str) -> None:
    residual = Residual(Linear(8, 8, bias), scale=0.5, residual_scale=-0.75)
    module = og.Sequential(residual, device=device)
    linear, x = residual.ops[0], torch.randn(4, 8, device=device, requires_grad=True)
    for _ in range(3):
        with torch.autocast(device, BF16):
            y, eager = module(x), -0.75 * x + 0.5 * nn.functional.linear(x, *linear.parameters())
            assert torch.equal(module(x.detach()), y)
        dy = torch.randn_like(y)
        assert y.dtype == eager.dtype == F32
        torch.testing.assert_close(y, eager, rtol=1e-2, atol=1e-2)
        operands = [x, *linear.parameters()]
        for got, wanted in zip(
            *(torch.autograd.grad(each, operands, dy) for each in (y, eager)), strict=True
        ):
            assert got.dtype == F32
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16)], ids=str)
def test_a_scaled_sum_of_two_dtypes_is_promoted(
    dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    x, other = (torch.randn(4, 8).to(device, dtype).requires_grad_() for dtype in dtypes)
    y, eager = og.Sequential(ScaledAdd(scale=0.3))(x, other), x + 0.3 * other.float()
    torch.testing.assert_close(y, eager, rtol=1e-2, atol=1e-2)
    for got, wanted in zip(
        *(torch.autograd.grad(each.sum(), [x, other]) for each in (y, eager)), strict=True
    ):
        torch.testing.assert_close(got, wanted)


def test_a_narrower_value_behind_a_product_gets_its_gradient(device: str) -> None:
    ops = Linear(8, 8), Tee("a"), Add(), ScaledAdd("a", scale=0.5)
    module = og.Sequential(*ops, device=device)
    x, wide = (torch.randn(4, 8, device=device, requires_grad=True) for _ in range(2))
    with torch.autocast(device, BF16):
        y = module(x, wide)
        hidden = torch.nn.functional.linear(x, module[0].weight, module[0].bias)
        eager = hidden + wide + 0.5 * hidden.float()
    assert y.dtype == F32
    for got, wanted in zip(
        *(torch.autograd.grad(each.sum(), [x, wide]) for each in (y, eager)), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("check", ["0", "1"])
@pytest.mark.parametrize("backends", [None, ("aten", "reference"), ("reference",)], ids=str)
def test_a_narrower_value_before_a_product_gets_its_gradient(
    backends: tuple[str, ...] | None, check: str, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setenv("OPSGRAPH_CHECK", check)
    options: dict[str, Any] = {"device": device}
    options |= {} if backends is None else {"backends": backends}
    for last in (ScaledAdd("a", scale=0.5), WeightedAdd("a", 8, 0.5, dtype=BF16)):
        module = og.Sequential(Tee("a"), Linear(8, 8, dtype=BF16), Add(), last, **options)
        wide = torch.randn(4, 8, device=device)
        x = torch.randn(4, 8).to(device, BF16).requires_grad_()
        y, eager = module(x, wide), torch.nn.functional.linear(x, module[1].weight, module[1].bias)
        eager = eager + wide + 0.5 * x.float()
        assert y.dtype == F32
        got, wanted = (torch.autograd.grad(each.sum(), x)[0] for each in (y, eager))
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=3e-2)


@pytest.mark.parametrize("backends", [None, ("aten", "reference"), ("reference",)], ids=str)
@pytest.mark.parametrize("dtype, factor", [(torch.float16, 1e5), (BF16, 3.4e38), (F32, -1e39)])
def test_factors_beyond_the_dtype_multiply_as_pytorchs(
    dtype: torch.dtype, factor: float, backends: tuple[str, ...] | None
) -> None:
    """torch.add and addmm take none of them for their alpha."""
    options: dict[str, Any] = {} if backends is None else {"backends": backends}
    linear = Linear(8, 8, bias=False, dtype=dtype)
    x, other = ((torch.randn(4, 8) * 1e-3).to(dtype).requires_grad_() for _ in range(2))
    product = nn.functional.linear(x, linear.weight)
    cases = (
        ([ScaledAdd(scale=factor)], x + other * factor),
        ([ConstantScale(factor), Add()], x * factor + other),
        ([linear, ConstantScale(factor), Add()], product * factor + other),
        ([linear, ScaledAdd(scale=factor)], product + other * factor),
        ([linear, ConstantScale(factor)], product * factor),
    )
    for ops, eager in cases:
        given = (x,) if len(ops[-1].channels) == 0 else (x, other)
        y = og.Sequential(*ops, **options)(*given)
        dy = torch.full_like(y, 1e-3)
        found = [
            [each, *torch.autograd.grad(each, given, dy, retain_graph=True)] for each in (y, eager)
        ]
        for got, wanted in zip(*found, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-2, atol=1e-2, equal_nan=True)


def test_what_is_refused() -> None:
    with pytest.raises(og.OpError, match="scale=nan, expected a finite number"):
        ScaledAdd("r", float("nan"))
    with pytest.raises(og.OpError, match="residual_scale"):
        Residual(SiLU(), residual_scale=float("inf"))
    with pytest.raises(og.PlanError, match="it has extra inputs"):
        og.Sequential(ScaledAdd("r")).to_torch()
