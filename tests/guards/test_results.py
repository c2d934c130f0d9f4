"""Functions of ops and fusers that return something else than they should are named."""

from typing import Any

import pytest
import torch
from torch import Tensor

import opsgraph as og
from opsgraph.ops import AdaptiveRMSNorm, BasicLinear, Bias, Linear, SiLU

X = torch.randn(2, 4)  # two rows: a bare tensor can be taken apart into two


class Double(og.Op):
    saves: Any = ()

    def out(self, x: og.Spec) -> og.Spec:
        return x

    def saved(self, x: og.Spec) -> dict[str, og.Spec]:
        return dict.fromkeys(self.saves, x)

    def fwd(self, x: Tensor) -> Any:
        return 2 * x, ()

    def bwd(self, dy: Tensor) -> Any:
        return 2 * dy, ()


def op(**functions: Any) -> og.Op:
    return type("Custom", (Double,), functions)()


FORWARDS = {
    "bare": (lambda self, x: 2 * x, ()),
    "one": (lambda self, x: (2 * x,), ()),
    "y alone": (lambda self, x: (2 * x, x), ()),
    "too much": (lambda self, x: (2 * x, (x,)), ()),
    "too little": (lambda self, x: (2 * x, ()), ("x2",)),
    "not a tensor": (lambda self, x: (2.0, ()), ()),
    "saved number": (lambda self, x: (2 * x, (2.0,)), ("x2",)),
    "flat": (lambda self, x: (2 * x.flatten(), ()), ()),
    "none": (lambda self, x: None, ()),
}


@pytest.mark.parametrize("name", FORWARDS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("traced", [True, False])
def test_a_wrong_result_of_fwd_is_named(name: str, training: bool, traced: bool) -> None:
    function, saves = FORWARDS[name]
    functions: dict[str, Any] = dict(fwd=function, saves=saves)
    functions |= dict(out=og.Op.out, saved=og.Op.saved) if traced else {}
    functions["bwd"] = lambda self, dy: (2 * dy, ())
    with pytest.raises(og.OpError, match=r"Custom: got .*expected (\(y, saved\)|\[(rows|\*), wi)"):
        og.Sequential(SiLU(), op(**functions))(X.clone().requires_grad_(training))


BACKWARDS = {
    "bare": lambda self, dy: 2 * dy,
    "dx alone": lambda self, dy: (2 * dy,),
    "a gradient too much": lambda self, dy: (2 * dy, (dy,)),
    "not in a tuple": lambda self, dy: (2 * dy, dy),
    "none": lambda self, dy: None,
}


@pytest.mark.parametrize("name", BACKWARDS)
def test_a_wrong_result_of_bwd_is_named(name: str) -> None:
    module = og.Sequential(SiLU(), op(bwd=BACKWARDS[name]))
    y = module(X.clone().requires_grad_())
    with pytest.raises(og.OpError, match=r"1:Custom: got .* from bwd, expected \(dx, gradients\)"):
        y.sum().backward()


@pytest.mark.parametrize("function", ["dgrad", "wgrad"])
def test_a_wrong_gradient_of_a_linear_layer_is_named(function: str) -> None:
    def pair(self: Any, dy: Tensor, x: Tensor, weight: Tensor) -> Any:
        return dy, ()

    kind = type("Custom", (BasicLinear,), {function: pair})
    layer = kind(4, 4)
    torch.nn.init.ones_(layer.weight)
    y = og.Sequential(SiLU(), layer)(X.clone().requires_grad_())
    with pytest.raises(og.OpError, match=rf"1:Custom: got \(a tensor .* from {function}, expected"):
        y.sum().backward()


class Fused(og.Fuser):
    backend, pattern = "aten", dict(fc=BasicLinear, bias=Bias | None, act=SiLU)

    def fwd(self, x: Tensor, fc_weight: Tensor) -> Any:
        return x @ fc_weight.t()


class FusedBackward(og.Fuser):
    backend, pattern = "aten", dict(fc=BasicLinear, bias=Bias | None, act=SiLU)

    def bwd(self, dy: Tensor, fc_weight: Tensor) -> Any:
        return dy @ fc_weight, ()


@pytest.mark.usefixtures("without_cpu_backend")
@pytest.mark.parametrize("bias", [True, False])
def test_a_wrong_result_of_a_fuser_is_named(bias: bool) -> None:
    ops = Linear(4, 4, bias=bias), SiLU()
    with og.register(Fused), torch.no_grad():
        module = og.Sequential(*ops, fusers=("Fused",))
        with pytest.raises(og.OpError, match=r"Fused \(aten\): got a tensor of .* from fwd"):
            module(X)
    with og.register(FusedBackward):
        y = og.Sequential(*ops, fusers=("FusedBackward",))(X.clone().requires_grad_())
        # A gradient for every entry of the pattern, also for a bias that is left out.
        with pytest.raises(og.OpError, match=r"FusedBackward \(aten\): got .* tuple of 2$"):
            y.sum().backward()


def test_right_results_are_looked_at_once() -> None:
    module = og.Sequential(op(), SiLU(), op())
    x = X.clone().requires_grad_()
    for _ in range(2):
        module(x).sum().backward()
    (plan,) = module._stages[0].plans.values()
    for function, name in ((plan.functions.forward, "fwd"), (plan.functions.backward, "bwd")):
        stands = [v for k, v in function.call.__globals__.items() if k.startswith("Custom")]
        assert stands
        assert all(getattr(v, name).__qualname__ == f"Double.{name}" for v in stands)


class Choosy(Double):
    def fwd(self, x: Tensor) -> Any:
        raise og.OpError("Choosy", "this", "that")


@pytest.mark.parametrize("training", [True, False])
def test_errors_that_ops_raise_while_they_run_have_the_position(training: bool) -> None:
    x = X.clone().requires_grad_(training)
    with pytest.raises(og.OpError, match=r"^2:Choosy: got this, expected that$"):
        og.Sequential(SiLU(), op(), Choosy())(x)
    for shape in ((3, 4), (2, 5), (1, 3)):
        scale = torch.randn(shape)
        module = og.Sequential(SiLU(), AdaptiveRMSNorm(4), SiLU())
        with pytest.raises(og.OpError, match=r"^1:AdaptiveRMSNorm: got .*, expected"):
            module(x, scale, scale)


class _Summed(og.Op):
    def fwd(self, x: Tensor) -> Any:
        return 2 * x, ()

    def bwd(self, dy: Tensor) -> Any:
        return 2 * dy.sum(), ()


class _SummedRows(_Summed):
    def bwd(self, dy: Tensor) -> Any:
        return 2 * dy.sum(0), ()


class _Narrow(_Summed):
    def fwd(self, x: Tensor) -> Any:
        return torch.cat([x, x], 1), ()

    def bwd(self, dy: Tensor) -> Any:
        return dy, ()


@pytest.mark.parametrize("kind", [_Summed, _SummedRows, _Narrow])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_of_other_dimensions_is_named(kind: type[og.Op], first: bool) -> None:
    run = (kind(), og.ops.SiLU()) if first else (og.ops.SiLU(), kind())
    y = og.Sequential(*run)(torch.randn(3, 4, requires_grad=True))
    with pytest.raises(og.OpError, match=rf":{kind.__name__}: got .* for dx from bwd, expected"):
        y.sum().backward()


class _Holds(og.Op):
    """Computes by a module in it, whose parameters fwd does not name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(4, 4)

    def fwd(self, x: Tensor) -> Any:
        return self.inner(x), ()


def test_an_error_of_fwd_on_meta_tensors_is_named() -> None:
    with pytest.raises(og.OpError, match="1:_Holds: got RuntimeError from fwd on meta tensors: "):
        og.Sequential(SiLU(), _Holds())(X)
