"""What a subclass overrides ends what its base says of its own `fwd`; wrong classes are told so."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph import ops
from opsgraph.op import arguments
from opsgraph.op.functions import family
from opsgraph.ops.activations import Activation, GatedActivation
from opsgraph.ops.scaled import ScaledGatedActivation

F64 = torch.float64


class HalfSiLU(ops.SiLU):
    def fwd(self, x: Tensor, kernel: str) -> Any:
        y, saved = super().fwd(x, kernel)
        return 0.5 * y, saved


class Squared(ops.RMSNorm):
    """Overrides a `fwd` that saves a value from which the base makes y again."""

    def fwd(self, x: Tensor, weight: Any, eps: float, zero_centered_gamma: bool) -> Any:
        y, saved = super().fwd(x, weight, eps, zero_centered_gamma)
        return y.square(), saved


class Doubled(ops.Linear):
    def fwd(self, x: Tensor, weight: Tensor) -> Any:
        return 2 * (x @ weight.t()), ()


class DoubledByHalves(Doubled):
    """Gives one of the two gradients; the other is derived."""

    def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
        return 2 * (dy @ weight)


class DoubledBasic(ops.BasicLinear):
    fwd = Doubled.fwd

    def __init__(self) -> None:
        super().__init__(8, 8)
        self.reset_parameters()

    def wgrad(self, dy: Tensor, x: Tensor) -> Tensor:
        return 2 * (dy.t() @ x)


class Shifted(ops.ConstantScale):
    """Its base does nothing where the scale is 1."""

    def __init__(self) -> None:
        super().__init__(1.0)

    def fwd(self, x: Tensor, scale: float) -> Any:
        return scale * x * x + 1, ()


class Gated(ops.Add):
    """Its base passes gradients on."""

    def fwd(self, x: Tensor, other: Tensor) -> Any:
        return x * other, ()


class GatedExtra(ops.AddExtraInput):
    """Its base stands for another op."""

    fwd = Gated.fwd


class Narrow(ops.SiLU):
    """Its base keeps the width."""

    def fwd(self, x: Tensor, kernel: str) -> Any:
        return x[:, ::2] * x[:, 1::2], ()


class Mixin:
    def fwd(self, x: Tensor, kernel: str) -> Any:
        return x.sin(), ()


class Mixed(Mixin, ops.SiLU):
    pass


class Renamed(HalfSiLU):
    """Changes nothing."""


@pytest.mark.parametrize(
    "build",
    [
        HalfSiLU, Renamed, Mixed, Narrow, lambda: Squared(8), Shifted, Gated, GatedExtra,
        lambda: Doubled(8, 8), lambda: Doubled(8, 8, bias=False), lambda: DoubledByHalves(8, 8),
        DoubledBasic, lambda: ops.Residual(HalfSiLU()),
    ],
)  # fmt: skip
@pytest.mark.parametrize("options", [{}, {"checkpoint": True}], ids=str)
def test_results_are_those_of_the_fwd_that_is_there(build: Any, options: Any) -> None:
    torch.manual_seed(0)
    op = build()
    before, after = ops.Linear(8, 8), ops.Linear(4 if isinstance(op, Narrow) else 8, 3)
    module = og.Sequential(before, op, after, dtype=F64, **options)
    x, other = (torch.randn(3, 8, dtype=F64, requires_grad=True) for _ in range(2))
    values = {"other": other, "kernel": "silu", "eps": 1e-5, "zero_centered_gamma": False}
    values |= {"scale": 1.0, **dict(op.named_parameters())}

    def call(op: og.Op, x: Tensor) -> Tensor:
        if isinstance(op, ops.Residual):
            return x + call(op.ops[0], x)
        y = type(op).fwd(op, x, *(values[name] for name in arguments(type(op).fwd)[1:]))[0]
        separate = isinstance(op, ops.Linear) and op.bias is not None
        return y + op.bias if separate else y

    def linear(op: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, op.weight, op.bias)

    extras = [other] if op.extra_inputs else []
    leaves = [x, *extras, *module.parameters()]
    expected = linear(after, call(op, linear(before, x)))
    found = module(x, *extras)
    torch.testing.assert_close(found, expected)
    dy = torch.randn_like(found)
    torch.testing.assert_close(
        torch.autograd.grad(found, leaves, dy), torch.autograd.grad(expected, leaves, dy)
    )


def test_a_bwd_that_a_subclass_adds_is_called() -> None:
    class Straight(ops.Linear):
        """A gradient of its own making."""

        def bwd(self, dy: Tensor, x: Tensor, weight: Tensor) -> Any:
            return dy @ weight + 1, (dy.t() @ x + 2,)

    module, x = og.Sequential(Straight(4, 4, bias=False)), torch.randn(3, 4, requires_grad=True)
    dx, dweight = torch.autograd.grad(module(x).sum(), [x, module[0].weight])
    torch.testing.assert_close(dx, torch.ones(3, 4) @ module[0].weight + 1)
    torch.testing.assert_close(dweight, torch.ones(4, 3) @ x + 2)


def test_a_subclass_with_its_own_fwd_is_not_quantized() -> None:
    module, x = og.Sequential(Doubled(32, 32)), torch.randn(32, 32)
    with og.autocast(recipe=og.recipe.MXFP8BlockScaling()):
        found = module(x)
    torch.testing.assert_close(found, 2 * x @ module[0].weight.t() + module[0].bias)


@pytest.mark.usefixtures("without_cpu_backend")
def test_a_subclass_of_linear_without_functions_of_its_own_is_fused() -> None:
    class Named(ops.Linear):
        def __init__(self, width: int) -> None:
            super().__init__(width, width)

    assert [s.name for s in og.Sequential(Named(8)).plan().forward] == ["LinearBias"]


def test_evaluation_switches_a_subclass_of_dropout_off() -> None:
    class Noise(ops.Dropout):
        saves = ()

        def fwd(self, x: Tensor, p: float) -> Any:
            return x + p, ()

        def bwd(self, dy: Tensor) -> Any:
            return dy, ()

    module, x = og.Sequential(Noise(0.5)), torch.randn(3, 4)
    torch.testing.assert_close(module(x), x + 0.5)
    assert torch.equal(module.eval()(x), x)


def test_a_random_fwd_without_its_bwd_is_refused() -> None:
    class Noise(ops.Dropout):
        def fwd(self, x: Tensor, p: float) -> Any:
            y, saved = super().fwd(x, p)
            return 2 * y, saved

    module = og.Sequential(Noise(0.5))
    module(torch.randn(3, 4))
    with pytest.raises(og.PlanError, match="0:Noise: got a random fwd and no bwd for it"):
        module(torch.randn(3, 4, requires_grad=True))


def test_a_function_half_of_which_would_be_ignored_is_refused() -> None:
    class Half(ops.RMSNorm):
        def dgrad(self, dy: Tensor) -> Tensor:
            return dy

    with pytest.raises(og.PlanError, match="0:Half: got dgrad beside an inherited bwd"):
        og.Sequential(Half(4))


class NoFwd(og.Op):
    pass


class Flat(og.Op):
    def fwd(self, x: Tensor) -> Any:
        return x.sum(-1), ()


class FlatByHand(Flat):
    def out(self, x: og.Spec) -> og.Spec:
        return og.Spec((-1,), x.dtype, x.device)


class OneRow(og.Op):
    def fwd(self, x: Tensor) -> Any:
        return x.sum(0, keepdim=True), ()


class Deeper(og.Op):
    def fwd(self, x: Tensor) -> Any:
        return x[..., None], ()


@pytest.mark.parametrize("kind", [Flat, FlatByHand, OneRow, Deeper])
@pytest.mark.parametrize("training", [True, False])
def test_an_op_that_drops_a_dimension_is_refused(kind: type[og.Op], training: bool) -> None:
    module = og.Sequential(ops.SiLU(), kind())
    message = rf"1:{kind.__name__}: got an output of shape \[.*\], expected \[\*, width\]"
    with pytest.raises(og.OpError, match=message):
        module(torch.randn(3, 4, requires_grad=training))


def test_an_op_without_fwd_is_refused() -> None:
    for call in (lambda: og.Sequential(NoFwd()), lambda: NoFwd()(torch.randn(2, 4))):
        with pytest.raises(og.PlanError, match="0:NoFwd: got no fwd, expected one that returns"):
            call()


class Unmade(og.Op):
    def __init__(self) -> None:
        self.width = 3

    def fwd(self, x: Tensor) -> Any:
        return x, ()


@pytest.mark.parametrize(
    "call",
    [
        lambda: og.Sequential(Unmade()),
        lambda: og.Sequential(ops.SiLU()).append(Unmade()),
        lambda: og.Sequential(ops.SiLU()).insert(0, Unmade()),
        lambda: ops.Residual(Unmade()),
        lambda: og.Sequential(OrderedDict(a=Unmade())),
    ],
)
def test_an_op_whose_base_was_not_initialized_is_refused(call: Any) -> None:
    with pytest.raises(og.PlanError, match=r"Unmade: its __init__ did not call super\(\).__init__"):
        call()


class PresetNorm(ops.RMSNorm):
    """Another constructor, and another default of a constant."""

    zero_centered_gamma = True

    def __init__(self) -> None:
        super().__init__(8)


class ZeroNorm(PresetNorm):
    """Begins elsewhere."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)


class WatchedNorm(ops.RMSNorm):
    """Overrides what its base says of itself."""

    def out(self, x: og.Spec) -> og.Spec:
        return super().out(x)


def test_a_family_is_the_class_and_the_base_from_which_it_differs_in_constants() -> None:
    assert family(ops.SwiGLU) == (ops.SwiGLU, GatedActivation)
    assert family(ops.GELU) == (ops.GELU, Activation)
    assert family(ops.ScaledGEGLU) == (ops.ScaledGEGLU, ScaledGatedActivation)
    assert family(PresetNorm) == (PresetNorm, ops.RMSNorm)
    assert family(ZeroNorm) == (ZeroNorm, ops.RMSNorm)
    assert family(Renamed) == (Renamed, HalfSiLU)
    for kind in (ops.RMSNorm, ops.Linear, GatedActivation, HalfSiLU, Mixed, WatchedNorm, Squared):
        assert family(kind) == (kind,)


def test_borrowing_what_is_not_there_is_refused() -> None:
    plain = nn.Linear(4, 4)
    with pytest.raises(og.OpError, match=r"Linear: got 'wieght' to borrow.*'bias', 'weight'"):
        ops.Linear(4, 4).borrow(plain, weight="wieght")
    with pytest.raises(og.OpError, match=r"Linear: got 'wait' to borrow under, expected.*'weight'"):
        ops.Linear(4, 4).borrow(plain, wait="weight")
    linear = ops.Linear(4, 4).borrow(plain, weight="weight", bias="bias")
    x = torch.randn(2, 4)
    torch.testing.assert_close(og.Sequential(linear)(x), plain(x))


class _Keyword(og.Op):
    constants = ("factor",)
    factor = 2.0

    def fwd(self, x: Tensor, *, factor: float) -> Any:
        return x * factor, ()


class _KeywordInBwd(og.Op):
    constants = ("factor",)
    factor = 2.0

    def fwd(self, x: Tensor, factor: float) -> Any:
        return x * factor, ()

    def bwd(self, dy: Tensor, *, factor: float) -> Any:
        return dy * factor, ()


class _Static(og.Op):
    @staticmethod
    def fwd(x: Tensor) -> Any:  # type: ignore[override]
        return x, ()


class _OfTheClass(og.Op):
    @classmethod
    def fwd(cls, x: Tensor) -> Any:
        return x, ()


@pytest.mark.parametrize(
    "kind, message",
    [
        (_Keyword, r"got the keyword-only arguments \['factor'\] of fwd"),
        (_KeywordInBwd, r"got the keyword-only arguments \['factor'\] of bwd"),
        (_Static, r"got fwd as a staticmethod, expected a method"),
        (_OfTheClass, r"got fwd as a classmethod, expected a method"),
    ],
)
def test_a_function_that_plans_cannot_call_is_refused(kind: type[og.Op], message: str) -> None:
    with pytest.raises(og.PlanError, match=rf"{kind.__name__}: {message}"):
        og.Sequential(kind(), og.ops.SiLU())(torch.ones(2, 4))
