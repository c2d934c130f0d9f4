"""What other people write: ops, fusers and their registration, as docs/writing-*.md show it."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.fuser import Handle, registered
from opsgraph.kernels.reference.activations import activation_forward
from opsgraph.ops import (
    GEGLU,
    GELU,
    Add,
    BasicLinear,
    Bias,
    ClampedSwiGLU,
    LayerNorm,
    Linear,
    MakeExtraOutput,
    ReLU,
    RMSNorm,
    SiLU,
    SwiGLU,
    Tee,
)
from opsgraph.ops.activations import GatedActivation

pytestmark = pytest.mark.usefixtures("without_cpu_backend")


class SquaredReLU(og.Op):
    """y = relu(x)**2"""

    def fwd(self, x: Tensor) -> Any:
        return torch.relu(x).square(), ()

    def bwd(self, dy: Tensor, x: Tensor) -> Any:
        return 2 * torch.relu(x) * dy, ()


class LinearSquaredReLU(og.Fuser):
    """GEMM with relu**2 in its epilogue; also writes the pre-activation."""

    backend, pattern = "aten", dict(fc=BasicLinear, act=SquaredReLU)
    saves = ("act_x",)

    def reject(self, fc: Any, act: Any, x: og.Spec) -> str | None:
        if x.width % 16:
            return f"in_features {x.width} is not a multiple of 16"
        return None

    def fwd(self, fc: Any, act: Any, x: Tensor, fc_weight: Tensor) -> Any:
        pre = x @ fc_weight.t()
        return torch.relu(pre).square(), (pre,)


class LinearReLU(og.Fuser):
    """Keeps the pre-activation to itself."""

    backend, pattern = "aten", dict(fc=BasicLinear, bias=Bias | None, act=ReLU | SquaredReLU)

    def fwd(self, act: Any, x: Tensor, fc_weight: Tensor, bias_bias: Tensor | None) -> Any:
        y = torch.relu(nn.functional.linear(x, fc_weight, bias_bias))
        return (y.square() if isinstance(act, SquaredReLU) else y), ()


class SiLUReLU(og.Fuser):
    """A pair: its forward saves what only its backward understands."""

    backend, pattern, saves = "aten", dict(a=SiLU, b=ReLU), ("slope",)

    def saved(self, ops: Any, x: og.Spec) -> dict[str, og.Spec]:
        return {"slope": x}

    def fwd(self, x: Tensor) -> Any:
        s = torch.sigmoid(x)
        return torch.relu(x * s), (s * (1 + x * (1 - s)) * (x > 0),)

    def bwd(self, dy: Tensor, slope: Tensor) -> Any:
        return dy * slope, ()


def names(plan: og.Plan, direction: str = "forward") -> list[str]:
    return [step.name for step in getattr(plan, direction)]


def refusals(plan: og.Plan, name: str) -> set[tuple[str, str]]:
    return {(r.direction, r.reason) for r in plan.rejected if r.name == name}


def results(module: Any, x: Tensor) -> list[Tensor]:
    """Output, dx and every parameter's gradient."""
    x = x.detach().requires_grad_()
    y = module(x)
    torch.manual_seed(3)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], torch.randn_like(y))]


def assert_same_results(module: og.Sequential, x: Tensor) -> None:
    """The module computes what the reference ops compute."""
    expected = results(og.Sequential(*module, backends=("reference",)), x)
    for one, other in zip(results(module, x), expected, strict=True):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected[0].detach())


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """A test leaves the registry as it found it."""
    before = registered()
    yield
    for fuser in registered():
        if fuser not in before:
            Handle(fuser).unregister()


# -- registering --


def test_the_three_ways_to_register() -> None:
    mlp = og.Sequential(Linear(16, 8, bias=False), SquaredReLU())

    def planned() -> list[str]:
        return names(mlp.plan())

    assert planned() == ["BasicLinear", "SquaredReLU"]
    with og.register(LinearSquaredReLU) as handle:
        assert planned() == ["LinearSquaredReLU"]
        assert handle.fuser.name == "LinearSquaredReLU"
    assert planned() == ["BasicLinear", "SquaredReLU"]
    handle = og.register(LinearSquaredReLU())
    assert planned() == ["LinearSquaredReLU"]
    handle.unregister()
    handle.unregister()
    assert planned() == ["BasicLinear", "SquaredReLU"]

    @og.register
    class Decorated(LinearSquaredReLU):
        pass

    assert planned() == ["Decorated"]


def test_a_module_that_has_run_plans_again() -> None:
    mlp, x = og.Sequential(Linear(16, 8, bias=False), SquaredReLU()), torch.randn(3, 16)
    called: list[int] = []

    class Counted(LinearSquaredReLU):
        def fwd(self, fc: Any, act: Any, x: Tensor, fc_weight: Tensor) -> Any:
            called.append(len(x))
            return super().fwd(fc, act, x, fc_weight)

    before = results(mlp, x)
    with og.register(Counted):
        during = results(mlp, x)
        mlp(x)
    assert called == [3, 3]
    after = results(mlp, x)
    assert called == [3, 3]
    for values in zip(before, during, after, strict=True):
        torch.testing.assert_close(values[1], values[0])
        assert torch.equal(values[2], values[0])


def test_a_called_op_and_a_layernorm_mlp_plan_again() -> None:
    class Doubled(og.Fuser):
        backend, pattern = "aten", dict(act=GELU)

        def fwd(self, x: Tensor) -> Any:
            return x * 2, ()

    op, mlp, x = GELU(), og.LayerNormMLP(8, 16, device="cpu"), torch.randn(2, 8)
    first, whole = op(x), mlp(x)
    with og.register(Doubled):
        assert torch.equal(op(x), 2 * x)
        assert not torch.equal(mlp(x), whole)
        assert "Doubled" in names(mlp.plan())
    assert torch.equal(op(x), first)
    assert torch.equal(mlp(x), whole)


# -- fusers --


def test_the_fuser_of_the_design_hands_out_its_pre_activation() -> None:
    mlp = og.Sequential(Linear(16, 8, bias=False), SquaredReLU(), Linear(8, 4))
    with og.register(LinearSquaredReLU):
        plan = mlp.plan()
        (first, *_) = plan.forward
        assert (first.name, first.ops, first.saves) == ("LinearSquaredReLU", (0, 1), ("x1",))
        assert plan.saved == {"x0": 64, "x1": 32}
        assert mlp.plan(training=False).forward[0].saves == ()
        assert_same_results(mlp, torch.randn(5, 16))


def test_reject_gives_its_reason() -> None:
    mlp = og.Sequential(Linear(12, 8, bias=False), SquaredReLU())
    with og.register(LinearSquaredReLU):
        plan = mlp.plan()
        assert names(plan) == ["BasicLinear", "SquaredReLU"]
        reason = "in_features 12 is not a multiple of 16"
        assert refusals(plan, "LinearSquaredReLU") == {("forward", reason)}
        assert reason in str(plan)
        assert plan.rejected[-1].ops == (0, 1)


def test_dtypes_give_their_reason() -> None:
    class Single(LinearSquaredReLU):
        dtypes = (torch.float32, torch.bfloat16)

    og.register(Single)
    layers = Linear(16, 8, bias=False, dtype=torch.float64), SquaredReLU()
    plan = og.Sequential(*layers).plan()
    reason = "Single takes float32 and bfloat16, not float64"
    assert refusals(plan, "Single") == {("forward", reason)}
    assert names(og.Sequential(Linear(16, 8, bias=False), SquaredReLU()).plan()) == ["Single"]


def test_refused_where_the_backward_needs_an_inner_value() -> None:
    mlp = og.Sequential(Linear(16, 16), Linear(16, 8), ReLU(), fusers=("LinearReLU",))
    with og.register(LinearReLU):
        plan = mlp.plan()
        assert refusals(plan, "LinearReLU") == {("forward", "backward needs x4")}
        assert "LinearReLU" in names(mlp.plan(training=False))
        assert_same_results(mlp, torch.randn(5, 16))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("act", [ReLU, SquaredReLU])
def test_unions_and_optional_entries(act: type[og.Op], bias: bool) -> None:
    mlp = og.Sequential(Linear(16, 8, bias=bias), act(), fusers=("LinearReLU",))
    with og.register(LinearReLU):
        (step,) = mlp.plan(training=False).forward
        assert (step.name, step.ops) == ("LinearReLU", tuple(range(2 + bias)))
        assert_same_results(mlp, torch.randn(5, 16))
        assert names(og.Sequential(Linear(16, 8), SiLU()).plan(training=False))[-1] == "SiLU"


class AnyNorm(og.Fuser):
    """A norm, after a sum if there is one; hands out the sum."""

    backend, pattern = "aten", dict(add=Add | None, norm=RMSNorm | LayerNorm)
    saves = ("norm_x", "norm_mean", "norm_rstd")

    def fwd(
        self, x: Tensor, add_other: Tensor | None, norm: Any, norm_weight: Tensor,
        norm_bias: Tensor | None, norm_eps: float,
    ) -> Any:  # fmt: skip
        total = x if add_other is None else x + add_other
        mean = total.mean(1, keepdim=True) * isinstance(norm, LayerNorm)
        rstd = (total - mean).square().mean(1, keepdim=True).add(norm_eps).rsqrt()
        y = (total - mean) * rstd * norm_weight
        return y if norm_bias is None else y + norm_bias, (total, mean, rstd)


class AnyNormBackward(og.Fuser):
    """Of norm, linear and perhaps bias, by autograd: a gradient for each of them."""

    backend, pattern = "aten", dict(norm=RMSNorm | LayerNorm, fc=BasicLinear, bias=Bias | None)

    def bwd(
        self, dy: Tensor, norm_x: Tensor, norm_weight: Tensor, norm_bias: Tensor | None,
        norm_eps: float, fc_weight: Tensor, bias_bias: Tensor | None,
    ) -> Any:  # fmt: skip
        values = {"x": norm_x, "norm": norm_weight, "shift": norm_bias, "fc": fc_weight}
        wide = {k: None if v is None else v.detach().requires_grad_() for k, v in values.items()}
        with torch.enable_grad():
            x = wide["x"] if norm_bias is None else wide["x"] - wide["x"].mean(1, keepdim=True)
            y = x * x.square().mean(1, keepdim=True).add(norm_eps).rsqrt() * wide["norm"]
            y = (y if norm_bias is None else y + wide["shift"]) @ wide["fc"].t()
        there = [v for v in wide.values() if v is not None]
        gradients = iter(torch.autograd.grad(y, there, dy))
        dx, *rest = (None if v is None else next(gradients) for v in wide.values())
        return dx, (*rest, dy.sum(0))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("add", [False, True], ids=["", "add"])
@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_one_class_serves_ops_that_differ(norm: type[og.Op], add: bool, bias: bool) -> None:
    """What the op there lacks is None in arguments and ignored in results."""
    og.register(AnyNorm)
    og.register(AnyNormBackward)
    branch = (Tee("r"), SiLU(), Add("r")) if add else ()
    layers = *branch, norm(8), Linear(8, 8, bias=bias)
    module = og.Sequential(*layers, fusers=("AnyNorm", "AnyNormBackward"))
    plan = module.plan(x=torch.randn(5, 8))
    assert "AnyNorm" in names(plan)
    assert names(plan, "backward")[0] == "AnyNormBackward"
    left_out = plan.backward_source.split("= AnyNormBackward")[0].count("_,")
    assert left_out == (norm is RMSNorm) + (not bias)
    assert_same_results(module, torch.randn(5, 8))


class GatedByFormula(og.Fuser):
    """Of all gated activations; `act_function` tells it which."""

    backend, pattern = "aten", dict(act=GatedActivation)

    def fwd(self, x: Tensor, act_function: Any) -> Any:
        return activation_forward(x, *act_function), ()


class SwiGLUAlone(og.Fuser):
    backend, pattern = "aten", dict(act=SwiGLU)

    def fwd(self, x: Tensor) -> Any:
        a, b = x.chunk(2, -1)
        return nn.functional.silu(a) * b, ()


class Preset(SwiGLU):
    """Other constants, and a method of its own."""

    def __init__(self) -> None:
        super().__init__(glu_interleave_size=2)

    def gate(self) -> str:
        return "silu"


class Tanh(GatedActivation):
    """With its own functions."""

    kernel = "tanh"

    def fwd(self, x: Tensor, kernel: str) -> Any:
        a, b = x.chunk(2, -1)
        return getattr(torch, kernel)(a) * b, ()


class Even(SwiGLU):
    """Refuses what its base takes."""

    def reject(self, x: og.Spec) -> str | None:
        return "got an odd width, expected an even one" if x.width % 4 else super().reject(x)


@pytest.mark.parametrize("act", [SwiGLU, GEGLU, ClampedSwiGLU, Preset, Tanh, Even])
def test_a_kind_stands_for_all_that_differ_in_constants_and_a_name_for_itself(act: Any) -> None:
    both = ("SwiGLUAlone", "GatedByFormula")
    module, x = og.Sequential(act(), Linear(4, 4), fusers=both), torch.randn(3, 8)
    alone = {"SwiGLUAlone"} if act is SwiGLU else set()
    kind = {"GatedByFormula"} if act not in (Tanh, Even) else set()
    with og.register(SwiGLUAlone), og.register(GatedByFormula):
        (first, *_) = names(module.plan())
        assert first in (alone or kind or {act.__name__})
        assert_same_results(module, x)
        for name, taken in (("SwiGLUAlone", alone), ("GatedByFormula", kind)):
            plan = og.Sequential(*module, fusers=(name,)).plan()
            assert names(plan)[0] == (name if taken else act.__name__)
        assert plan.kinds[0] == act.__name__
        assert plan.labels[0] == f"0:{act.__name__}"
    with pytest.raises(og.OpError, match=f"^0:{act.__name__}: got"):
        og.Sequential(act()).plan(x=torch.randn(3, 7))


def test_only_the_fusers_one_asks_for() -> None:
    def planned(fusers: tuple[str, ...]) -> list[str]:
        return names(og.Sequential(Linear(16, 8), ReLU(), fusers=fusers).plan(training=False))

    with og.register(LinearReLU):
        assert planned(("LinearReLU",)) == ["LinearReLU"]
        assert planned(("LinearBias",)) == ["LinearBias", "ReLU"]
        assert planned(()) == ["BasicLinear", "Bias", "ReLU"]


# -- pairs --


def test_a_pair_is_taken_together() -> None:
    mlp, x = og.Sequential(SiLU(), ReLU(), fusers=("SiLUReLU",)), torch.randn(5, 8)
    with og.register(SiLUReLU):
        plan = mlp.plan(x=x)
        assert names(plan) == names(plan, "backward") == ["SiLUReLU"]
        assert plan.forward[0].saves == ("slope0",)
        assert "SiLUReLU" in plan.backward_source
        assert plan.saved == {"slope0": 32}
        assert mlp.plan(training=False, x=x).saved == {}
        assert_same_results(mlp, x)
        assert_same_results(og.Sequential(Linear(8, 8), *mlp, Linear(8, 8), *mlp), x)


def test_a_pair_without_saved_says_so() -> None:
    class Silent(SiLUReLU):
        saved = og.Fuser.saved

    with og.register(Silent), pytest.raises(NotImplementedError, match="Silent saves private"):
        og.Sequential(SiLU(), ReLU()).plan(x=torch.randn(2, 8))


@pytest.mark.parametrize("planner", ["greedy", "optimal"])
def test_a_competing_forward_cannot_split_a_pair(planner: str) -> None:
    class LinearSiLU(og.Fuser):
        """Longer or equal, and first in line; it would cover the pair's first op."""

        backend, pattern = "aten", dict(fc=BasicLinear, bias=Bias, act=SiLU)

        def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor) -> Any:
            return nn.functional.silu(nn.functional.linear(x, fc_weight, bias_bias)), ()

    only = ("LinearSiLU", "SiLUReLU")
    mlp = og.Sequential(Linear(8, 8), SiLU(), ReLU(), planner=planner, fusers=only)
    with og.register(LinearSiLU), og.register(SiLUReLU):
        plan = mlp.plan()
        assert ("SiLUReLU" in names(plan)) == ("SiLUReLU" in names(plan, "backward"))
        if planner == "greedy":
            assert names(plan) == ["BasicLinear", "Bias", "SiLUReLU"]
            assert refusals(plan, "LinearSiLU") == {("forward", "backward needs slope2")}
        assert names(mlp.plan(training=False)) == ["LinearSiLU", "ReLU"]
        assert_same_results(mlp, torch.randn(5, 8))


@pytest.mark.parametrize("planner", ["greedy", "optimal"])
def test_two_pairs_may_use_the_same_private_name(planner: str) -> None:
    class SiLUReLUSiLU(og.Fuser):
        """One op longer, and its `slope` is something else."""

        backend, pattern = "aten", dict(a=SiLU, b=ReLU, c=SiLU)
        saves = "slope", "c_x"

        def saved(self, ops: Any, x: og.Spec) -> dict[str, og.Spec]:
            return {"slope": x}

        def fwd(self, x: Tensor) -> Any:
            def both(x: Tensor) -> tuple[Tensor, Tensor]:
                s = torch.sigmoid(x)
                return x * s, s * (1 + x * (1 - s))

            first, slope = both(x)
            inner = torch.relu(first)
            y, second = both(inner)
            return y, (slope * second * (x > 0), inner)

        def bwd(self, dy: Tensor, slope: Tensor) -> Any:
            return dy * slope, ()

    class SiLULinearBackward(og.Fuser):
        """Takes the last two ops, so that the longer pair's backward has no place."""

        backend, pattern = "aten", dict(act=SiLU, fc=BasicLinear)

        def bwd(self, dy: Tensor, act_x: Tensor, fc_weight: Tensor) -> Any:
            with torch.enable_grad():
                x, weight = act_x.detach().requires_grad_(), fc_weight.detach().requires_grad_()
                y = nn.functional.silu(x) @ weight.t()
            dx, dweight = torch.autograd.grad(y, [x, weight], dy)
            return dx, (dweight,)

    ops = SiLU(), ReLU(), SiLU(), Linear(8, 4, bias=False)
    mlp = og.Sequential(*ops, planner=planner)
    with og.register(SiLUReLUSiLU), og.register(SiLUReLU), og.register(SiLULinearBackward):
        assert_same_results(mlp, torch.randn(5, 8))


# -- values that leave --


def test_a_value_that_leaves_is_not_swallowed() -> None:
    module = og.Sequential(SiLU(), Tee("out"), ReLU(), Add())
    with og.register(SiLUReLU):
        plan = module.plan(x=torch.randn(2, 8))
        assert names(plan) == ["SiLU", "ReLU", "Add"]
        assert refusals(plan, "SiLUReLU") == {("forward", "backward needs x1")}


def test_a_value_that_leaves_is_handed_out() -> None:
    class SiLUHandingOut(og.Fuser):
        backend, pattern, saves = "aten", dict(a=SiLU, b=ReLU), ("b_x",)

        def fwd(self, x: Tensor) -> Any:
            inner = nn.functional.silu(x)
            return torch.relu(inner), (inner,)

    x = torch.randn(3, 8)
    module = og.Sequential(SiLU(), Tee("out"), ReLU())
    with og.register(SiLUHandingOut), torch.no_grad():
        assert names(module.plan(training=False, x=x)) == ["SiLUHandingOut"]
        y, out = module(x)
    assert torch.equal(out, nn.functional.silu(x))
    assert torch.equal(y, torch.relu(out))


@pytest.mark.parametrize("planner", ["greedy", "optimal"])
def test_a_pair_whose_forward_would_swallow_a_value_is_not_taken(planner: str) -> None:
    class SiLULinear(og.Fuser):
        """Fits in the backward where no gradient comes to the Tee between the two."""

        backend, pattern, saves = "aten", dict(act=SiLU, fc=BasicLinear), ("kept",)

        def saved(self, ops: Any, x: og.Spec) -> dict[str, og.Spec]:
            return {"kept": x}

        def fwd(self, x: Tensor, fc_weight: Tensor) -> Any:
            y = nn.functional.silu(x)
            return y @ fc_weight.t(), (y,)

        def bwd(self, dy: Tensor, kept: Tensor) -> Any:
            return None, (dy.t() @ kept,)

    x = torch.randn(3, 8)
    with og.register(SiLULinear):
        module = og.Sequential(SiLU(), Tee("out"), Linear(8, 4, bias=False), planner=planner)
        y, out = module(x)
        torch.testing.assert_close(out, nn.functional.silu(x))
        (dweight,) = torch.autograd.grad(y.sum(), [module[2].weight])
        torch.testing.assert_close(dweight, out.sum(0).expand(4, 8))
        plain = og.Sequential(SiLU(), Linear(8, 4, bias=False), planner=planner)
        plain(x).sum().backward()
        (plan,) = plain._stages[0].plans.values()
        assert names(plan) == names(plan, "backward") == ["SiLULinear"]


def test_want_has_the_words_of_the_kernel() -> None:
    class LinearSiLU(og.Fuser):
        backend, pattern, saves = "aten", dict(fc=BasicLinear, act=SiLU), ("act_x",)
        wants = dict(act_x="pre", fc_weight="weight")

        def fwd(self, x: Tensor, fc_weight: Tensor, want: Any) -> Any:
            pre = x @ fc_weight.t()
            return nn.functional.silu(pre), (pre if want == ("pre",) else None,)

        def bwd(self, dy: Tensor, act_x: Tensor, fc_x: Tensor, fc_weight: Tensor, want: Any) -> Any:
            slope = torch.autograd.functional.vjp(nn.functional.silu, act_x, dy)[1]
            dweight = slope.t() @ fc_x if "weight" in want else None
            return slope @ fc_weight, (dweight,)

    module = og.Sequential(Linear(8, 4, bias=False), SiLU())
    with og.register(LinearSiLU):
        assert "want=('pre',)" in module.plan().forward_source
        assert "want=('x', 'weight')" in module.plan().backward_source
        assert_same_results(module, torch.randn(5, 8))


def test_what_a_fuser_makes_again_of_what_it_saved() -> None:
    called: list[str] = []

    class NormAgain(og.Fuser):
        backend, pattern, saves = "aten", dict(norm=RMSNorm), ("norm_rstd",)

        def fwd(self, x: Tensor, norm_weight: Tensor, norm_eps: float) -> Any:
            called.append("fwd")
            rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps)
            return x * rstd * norm_weight, (rstd,)

        def again(self, norm_x: Tensor, norm_rstd: Tensor, norm_weight: Tensor) -> Any:
            called.append("again")
            return norm_x * norm_rstd * norm_weight

    ops = RMSNorm(8), Linear(8, 64, bias=False), SiLU()
    module = og.Sequential(*ops, fusers=("NormAgain",))
    with og.register(NormAgain):
        source = module.plan().backward_source
        assert "x1 = NormAgain.again(x0, rstd0, weight0)" in source
        assert_same_results(module, torch.randn(5, 8))
    assert set(called) == {"fwd", "again"}


class SiLUBackward(og.Fuser):
    """Notes how many variables its consumed argument has, beside its own."""

    backend, pattern, consumes = "aten", dict(fc=BasicLinear, act=SiLU), ("act_x",)
    others: list[int]

    def bwd(self, dy: Tensor, fc_x: Tensor, fc_weight: Tensor, act_x: list[Tensor]) -> Any:
        pre = act_x.pop()
        assert not act_x
        self.others.append(sys.getrefcount(pre) - sys.getrefcount(torch.empty(0)) - 1)
        slope = torch.autograd.functional.vjp(nn.functional.silu, pre, dy)[1]
        return slope @ fc_weight, (slope.t() @ fc_x,)


def test_a_consumed_argument_has_no_other_variable_unless_it_is_needed() -> None:
    fuser = SiLUBackward()
    fuser.others = []
    x = torch.randn(4, 16, requires_grad=True)
    expected = og.Sequential(Linear(16, 16, bias=False), SiLU())
    with og.register(fuser):
        module = og.Sequential(*expected)
        module(x).sum().backward()
        kept = module(x)
        kept.sum().backward(retain_graph=True)
        kept.sum().backward()
        seen = og.Sequential(module[0], MakeExtraOutput(), module[1])
        y, pre = seen(x)
        before = pre.clone()
        y.sum().backward()
        assert torch.equal(pre, before)
    gradient, x.grad = x.grad, None
    expected(x).sum().backward()
    torch.testing.assert_close(gradient, 4 * x.grad)
    alone, retained, alone_at_last = fuser.others
    assert alone == alone_at_last == 0
    assert retained >= 0


# -- weight gradients as steps of their own --


class InTwo(og.Fuser):
    """The backward of a linear layer in two steps."""

    backend, pattern = "aten", dict(fc=BasicLinear)

    def wgrad(self, dy: Tensor, fc_x: Tensor) -> Any:
        return dy.t() @ fc_x

    def dgrad(self, dy: Tensor, fc_weight: Tensor) -> Any:
        return dy @ fc_weight


class GivesInput(og.Fuser):
    """Makes the linear layer's input again on the way."""

    backend, pattern, gives = "aten", dict(act=ReLU, fc=BasicLinear), ("fc_x",)

    def bwd(self, dy: Tensor, act_x: Tensor, fc_weight: Tensor, want: Any) -> Any:
        return (dy @ fc_weight) * (act_x > 0), (act_x.relu() if "fc_weight" in want else None,)


def backward_of_two(*fusers: str, frozen: bool = False, **options: Any) -> Any:
    """The plan, and the gradients of x and, unless frozen, of two layers' weights."""
    torch.manual_seed(0)
    layers = BasicLinear(8, 8), ReLU(), BasicLinear(8, 8)
    module = og.Sequential(*layers, fusers=fusers, **options).requires_grad_(not frozen)
    x = torch.randn(4, 8, requires_grad=True)
    plan = module.plan(x=x)
    assert bool(fusers) == any(step.name in fusers for step in plan.backward)
    module(x).sum().backward()
    if options.get("delay_wgrad_compute"):
        assert module[0].weight.grad is None
        module.backward_dw()
    return plan, [x.grad, *(p.grad for p in module.parameters() if not frozen)]


@pytest.mark.parametrize("kind", [InTwo, GivesInput])
@pytest.mark.parametrize("planner", ["greedy", "optimal"])
def test_a_weight_gradient_is_a_step_of_its_own(kind: type[og.Fuser], planner: str) -> None:
    expected = backward_of_two(planner=planner)[1]
    with og.register(kind) as handle:
        for late in (False, True):
            options = dict(planner=planner, delay_wgrad_compute=late)
            plan, found = backward_of_two(handle.fuser.name, **options)
            assert all(map(torch.equal, found, expected))
            assert ("weigh(" in plan.backward_source) == late
        plan, found = backward_of_two(handle.fuser.name, planner=planner, frozen=True)
        assert "wgrad" not in plan.backward_source
        assert {"x0", "x2"}.isdisjoint(plan.saved)
        assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("kind", [InTwo, GivesInput])
@pytest.mark.parametrize("check", ["0", "1"])
def test_such_a_weight_gradient_goes_into_main_grad(
    kind: type[og.Fuser], check: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPSGRAPH_CHECK", check)
    layers = BasicLinear(8, 8), ReLU(), BasicLinear(8, 8)
    x = torch.randn(4, 8)
    og.Sequential(*layers)(x).sum().backward()
    for layer in (layers[0], layers[2]):
        layer.accumulate_into_main_grad = True
        layer.weight.main_grad = torch.ones(8, 8)
    with og.register(kind) as handle:
        module = og.Sequential(*layers, fusers=(handle.fuser.name,))
        assert handle.fuser.name in [step.name for step in module.plan().backward]
        module(x).sum().backward()
    for layer in (layers[0], layers[2]):
        torch.testing.assert_close(layer.weight.main_grad, 1 + layer.weight.grad)
