"""OPSGRAPH_CHECK=1: right steps pass, whatever cancels or overflows; wrong ones are named."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.features.expected import MOVES, Expected, compare, run_reference
from opsgraph.kernels.reference import norms
from opsgraph.ops import BasicLinear, Bias, ConstantScale, LayerNorm, Linear, RMSNorm, SiLU, SwiGLU
from opsgraph.ops.quantize import Quantize, QuantizeGrad

BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSGRAPH_CHECK", "1")
    monkeypatch.setenv("OPSGRAPH_BACKENDS", "aten,reference")


def run(fuser: type[og.Fuser], x: Tensor, *ops: og.Op, dy: Tensor | None = None) -> og.Plan:
    """One step of training with a fuser in it."""
    x = x.detach().requires_grad_()
    with og.register(fuser):
        module = og.Sequential(*ops, dtype=x.dtype, fusers=(fuser.__name__,))
        y = module(x)
        y.backward(torch.randn_like(y) if dy is None else dy)
        (plan,) = module._stages[0].plans.values()
    steps = (*plan.forward, *plan.backward)
    assert fuser.__name__ in [step.name for step in steps]
    return plan


class Norm(og.Fuser):
    """RMSNorm by other sums, in reverse order, of which the last is `more` of itself too much."""

    backend, pattern, more, eps = "aten", dict(norm=RMSNorm), 0.0, 0.0

    def fwd(self, x: Tensor, norm_weight: Tensor, norm_eps: float) -> Any:
        h = x.float()
        y = h * torch.rsqrt(h.flip(-1).square().mean(-1, keepdim=True) + norm_eps + self.eps)
        return (y * norm_weight.float() * (1 + self.more)).to(x.dtype), ()

    def bwd(self, dy: Tensor, norm_x: Tensor, norm_weight: Tensor, norm_eps: float) -> Any:
        h, g = norm_x.float().flip(0), dy.float().flip(0)
        rstd = torch.rsqrt(h.square().mean(-1, keepdim=True) + norm_eps + self.eps)
        dx, dweight, _ = norms.rmsnorm_backward(g, h, rstd, norm_weight, False, True, True)
        assert dweight is not None
        return dx.flip(0).to(dy.dtype), ((dweight * (1 + self.more)).to(norm_weight.dtype),)


class TooMuch(Norm):
    more = 0.01


class WrongEps(Norm):
    eps = 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [20, 200])
def test_right_steps_pass_and_one_hundredth_does_not(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 64, dtype=dtype)
    run(Norm, x, RMSNorm(64))
    with pytest.raises(og.OpsgraphError, match=r"forward 0 TooMuch \(aten\): x1 differs"):
        run(TooMuch, x, RMSNorm(64))
    small = x if dtype == torch.float32 else x / 64
    with pytest.raises(og.OpsgraphError, match=r"forward 0 WrongEps \(aten\): x1 differs"):
        run(WrongEps, small, RMSNorm(64))


class OnlyBackward(Norm):
    fwd = None


class TooMuchBackward(OnlyBackward):
    more = 0.01


@pytest.mark.parametrize("seed", range(8))
def test_gradients_that_cancel_raise_no_alarm(seed: int) -> None:
    torch.manual_seed(seed)
    half = torch.randn(8, 16)
    x, dy = torch.cat([half, half]), torch.randn(8, 16)
    dy = torch.cat([dy, -dy])  # the weight's gradient is 0 but for rounding
    run(OnlyBackward, x, RMSNorm(16), dy=dy)
    run(OnlyBackward, x, RMSNorm(16, elementwise_affine=True), dy=x * 3)  # dx is 0
    with pytest.raises(og.OpsgraphError, match=r"TooMuchBackward \(aten\): dweight0 differs"):
        run(TooMuchBackward, x, RMSNorm(16), dy=torch.randn(16, 16))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_infinities_and_nans_that_both_have_pass(value: float) -> None:
    x = torch.randn(4, 16)
    x[1, 2] = value
    run(Norm, x, RMSNorm(16))
    dy = torch.randn(4, 16)
    dy[2, 3] = value
    run(OnlyBackward, torch.randn(4, 16), RMSNorm(16), dy=dy)


class Overflowing(og.Fuser):
    """Twice the scale, or an infinity where the result is none."""

    backend, pattern = "aten", dict(scale=ConstantScale)

    def fwd(self, x: Tensor) -> Any:
        return torch.where(x > 0.5, torch.inf, 2 * x), ()


def test_an_infinity_that_the_reference_has_not_is_an_error() -> None:
    run(Overflowing, torch.zeros(2, 4), ConstantScale(2.0))
    with pytest.raises(og.OpsgraphError, match="x1 differs from the reference ops by inf"):
        run(Overflowing, torch.ones(2, 4), ConstantScale(2.0))


class Gradients(og.Fuser):
    """SiLU and bias, backward; what it returns is changed by `change`."""

    backend, pattern = "aten", dict(bias=Bias, act=SiLU)

    def bwd(self, dy: Tensor, act_x: Tensor) -> Any:
        dx = torch.ops.aten.silu_backward(dy, act_x)
        return self.change(dx, dx.sum(0))

    def change(self, dx: Tensor, dbias: Tensor) -> Any:
        return dx, (dbias,)


CHANGES = {
    "missing": (lambda dx, dbias: (dx, (None,)), r"dbias\d is None"),
    "no dx": (lambda dx, dbias: (None, (dbias,)), "dx is None"),
    "shape": (lambda dx, dbias: (dx, (dbias[:1],)), r"dbias\d is a tensor \(1,\)"),
    "rows": (lambda dx, dbias: (dx, (dbias[None],)), r"dbias\d is a tensor \(1, 8\)"),
    "dtype": (lambda dx, dbias: (dx, (dbias.double(),)), r"dbias\d is .* torch.float64"),
    "a row": (lambda dx, dbias: (dx, (dbias - 0.01 * dx[0],)), r"dbias\d differs"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_wrong_gradients_are_named(change: str) -> None:
    edit, message = CHANGES[change]

    class Wrong(Gradients):
        def change(self, dx: Tensor, dbias: Tensor) -> Any:
            return edit(dx, dbias)

    ops = Linear(8, 8, bias=False), Bias(8), SiLU()
    run(Gradients, torch.randn(6, 8), *ops)
    with pytest.raises(og.OpsgraphError, match=f"OPSGRAPH_CHECK: backward 1-2 Wrong .*: {message}"):
        run(Wrong, torch.randn(6, 8), *ops)


class Twice(og.Fuser):
    """Two norms that save values of the same names, all handed out."""

    backend, pattern = "aten", dict(a=LayerNorm, b=LayerNorm)
    saves = ("a_mean", "a_rstd", "b_x", "b_mean", "b_rstd")

    def fwd(self, a: Any, b: Any, x: Tensor, a_weight: Tensor, a_bias: Tensor,
            b_weight: Tensor, b_bias: Tensor) -> Any:  # fmt: skip
        y, first = LayerNorm.fwd(a, x, a_weight, a_bias, 1e-5, False)
        z, second = LayerNorm.fwd(b, y, b_weight, b_bias, 1e-5, False)
        return z, (*first, y, *second)


def test_two_ops_of_a_step_may_save_under_one_name() -> None:
    run(Twice, 3 * torch.randn(4, 8), LayerNorm(8), LayerNorm(8), dy=torch.randn(4, 8))


def test_the_check_adds_nothing_to_main_grad(monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(check: str) -> list[Tensor]:
        monkeypatch.setenv("OPSGRAPH_CHECK", check)
        torch.manual_seed(0)
        module = og.Sequential(
            RMSNorm(16), Linear(16, 48, accumulate_into_main_grad=True), SwiGLU(),
            Linear(24, 16, accumulate_into_main_grad=True),
        )  # fmt: skip
        weights = [module[1].weight, module[3].weight]
        for weight in weights:
            weight.main_grad = torch.zeros_like(weight)
        module(torch.randn(6, 16)).sum().backward()
        return [weight.main_grad for weight in weights]

    for found, expected in zip(trained("1"), trained("0"), strict=True):
        assert torch.equal(found, expected)


def test_the_check_draws_no_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    run(Norm, torch.randn(4, 16), RMSNorm(16), dy=torch.ones(4, 16))
    state = torch.get_rng_state()
    torch.manual_seed(0)
    RMSNorm(16)(torch.randn(4, 16))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", [Quantize, QuantizeGrad])
def test_an_amax_may_be_off_by_as_much_as_the_value_whose_it_is(kind: Any) -> None:
    """One that two kernels round to bf16 may be the next number; what comes as it is may not."""
    y = torch.randn(8, 64, dtype=BF16)
    op = kind(quantizer=og.recipe.DelayedScaling().quantizer("activation"), role="activation")
    function, wanted = (kind.fwd, "amax") if kind is Quantize else (kind.bwd, "scale")
    scale, want = torch.ones(()), ("row", wanted)
    rounded = Expected(y, y.double(), (y.double(),) * MOVES)
    _, (amax,) = run_reference(function, op, rounded, scale, want=want)
    found = y.abs().max().float()
    compare("step", "amax", found * (1 + 2.0**-7), amax)
    with pytest.raises(og.OpsgraphError, match="step: amax differs"):
        compare("step", "amax", found * 1.05, amax)
    _, (amax,) = run_reference(function, op, y, scale, want=want)
    compare("step", "amax", found, amax)
    with pytest.raises(og.OpsgraphError, match="step: amax differs"):
        compare("step", "amax", found * (1 + 2.0**-7), amax)


def test_a_value_may_be_quantized_the_other_way() -> None:
    """17 is halfway from 16 to 18 in E4M3: it is either, and so is what a product makes of it.

    What comes from outside the step is quantized as it is.
    """
    y = torch.full((8, 64), 17.0, dtype=BF16)
    op = Quantize(quantizer=og.recipe.DelayedScaling().quantizer("activation"), role="activation")
    given = run_reference(lambda y: y, y), y
    for rounded, other_way in zip(given, (True, False), strict=True):
        copies, _ = run_reference(Quantize.fwd, op, rounded, torch.ones(()), want=("row", "amax"))
        product = run_reference(lambda copies: copies.row.dequantize().to(BF16) * 2, copies)
        compare("step", "y", torch.full_like(y, 32.0), product)
        for found, right in ((36.0, other_way), (52.0, False)):
            if right:
                compare("step", "y", torch.full_like(y, found), product)
            else:
                with pytest.raises(og.OpsgraphError, match="step: y differs"):
                    compare("step", "y", torch.full_like(y, found), product)


class Product(og.Fuser):
    backend, pattern = "aten", dict(fc=BasicLinear, bias=Bias)

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor) -> Any:
        return nn.functional.linear(x, fc_weight, bias_bias), ()


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_long_product_that_cancels_raises_no_alarm(dtype: torch.dtype) -> None:
    half = torch.randn(4, 512, dtype=dtype)
    fc = Linear(1024, 8)
    with torch.no_grad():
        fc.weight[:, 512:] = -fc.weight[:, :512]
        fc.bias.zero_()
    run(Product, torch.cat([half, half], 1), fc)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("width", [1, 3, 16])
@pytest.mark.parametrize("norm", [LayerNorm, RMSNorm])
def test_the_check_lets_rows_with_infinities_pass(
    monkeypatch: pytest.MonkeyPatch, norm: Callable[[int], og.Op], width: int, value: float
) -> None:
    monkeypatch.delenv("OPSGRAPH_BACKENDS")
    x = torch.zeros(3, width)
    x[0, 0] = value
    x.requires_grad_()
    og.Sequential(norm(width))(x).sum().backward()
    assert x.grad is not None
    assert x.grad[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, BF16], ids=str)
def test_inputs_are_moved_up_and_down(dtype: torch.dtype) -> None:
    """By half a unit, or one of fp64. A step that was computed in fp32 lost those up."""
    expected = run_reference(lambda x: x, torch.ones(64, dtype=dtype))
    unit = torch.finfo(dtype).eps / (1 if dtype == torch.float64 else 2)
    for moved in expected.moved:
        assert set((moved - 1).tolist()) == {unit, -unit}
