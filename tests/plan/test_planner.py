"""Planning: both planners, what is kept and what made again, and keys that tell plans apart."""

import random
from collections.abc import Sequence
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.op import Op, Spec, lower_plainly, row
from opsgraph.ops import (
    GELU,
    Add,
    BasicLinear,
    Bias,
    ConstantScale,
    Dropout,
    Identity,
    LayerNorm,
    Linear,
    ReLU,
    RMSNorm,
    SiLU,
    SwiGLU,
    Tee,
)
from opsgraph.plan.basic_ops import BasicOps
from opsgraph.plan.claims import Space
from opsgraph.plan.program import Program, Request
from opsgraph.plan.recompute import Keeper

pytestmark = pytest.mark.usefixtures("without_cpu_backend")

CPU = torch.device("cpu")


def reference(*modules: nn.Module, **options: Any) -> og.Sequential:
    return og.Sequential(*modules, backends=("reference",), **options)


def steps(plan: og.Plan, direction: str = "forward") -> list[tuple[str, tuple[int, ...]]]:
    return [(step.name, step.ops) for step in getattr(plan, direction)]


def names(plan: og.Plan, direction: str = "forward") -> list[str]:
    return [name for name, _ in steps(plan, direction)]


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs and gradients of everything that wants one, in fp64."""
    x = x.detach().double().requires_grad_()
    torch.manual_seed(5)
    result = module(x)
    outputs = result if isinstance(result, tuple) else (result,)
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    total = torch.zeros((), dtype=x.dtype)
    for k, y in enumerate(outputs, 1):
        total = total + k * y.square().sum()
    return [*outputs, *torch.autograd.grad(total, wanted)]


def assert_equal_results(one: nn.Module, other: nn.Module, x: Tensor) -> None:
    """Two modules of the same ops agree."""
    for a, b in zip(gradients(one.double(), x), gradients(other, x), strict=True):
        torch.testing.assert_close(a, b)


def run_once(module: nn.Module, x: Tensor) -> og.Plan:
    """Run forward and backward; returns the only plan."""
    result = module(x)
    (result[0] if isinstance(result, tuple) else result).sum().backward()
    (plan,) = module._stages[0].plans.values()
    return plan


# -- greedy and optimal --


def randomly(seed: int, count: int) -> list[nn.Module]:
    """Ops of width 8 with residuals, fit for fusion here and there."""
    draw = random.Random(seed)
    found: list[nn.Module] = []
    opened = 0
    for k in range(count):
        kind = draw.choice(["linear", "relu", "gelu", "scale", "norm", "swiglu", "tee", "add"])
        if kind == "linear":
            found.append(Linear(8, 8, bias=draw.random() < 0.7))
        elif kind == "swiglu":
            found += [Linear(8, 16, bias=False), SwiGLU()]
        elif kind == "tee":
            found.append(Tee(f"r{k}"))
            opened = k
        elif kind == "add":
            found.append(Add(f"r{opened}") if opened else Identity())
            opened = 0
        else:
            choice = {"relu": ReLU, "gelu": lambda: GELU("none"), "scale": lambda: ConstantScale(2)}
            found.append(choice.get(kind, lambda: RMSNorm(8))())
    return found


@pytest.mark.parametrize("seed", range(20))
def test_optimal_is_never_costlier_and_computes_the_same(seed: int) -> None:
    ops = randomly(seed, 12)
    best, first = og.Sequential(*ops, planner="optimal"), og.Sequential(*ops)
    x = torch.randn(3, 8)
    for training in (True, False):
        costs = best.plan(training, x=x).costs
        assert costs["optimal"] <= costs["greedy"]
    assert_equal_results(best, first, x)
    assert_equal_results(first, reference(*ops), x)


class Exp(og.Op):
    """Its own backward needs the output alone."""

    def fwd(self, x: Tensor) -> Any:
        return x.exp(), ()

    def bwd(self, dy: Tensor, y: Tensor) -> Any:
        return dy * y, ()


class ExpBackward(og.Fuser):
    """First in line, but it needs the pre-activation."""

    backend, pattern = "aten", dict(act=Exp)

    def bwd(self, dy: Tensor, act_x: Tensor) -> Any:
        return dy * act_x.exp(), ()


class LinearExp(og.Fuser):
    """A GEMM with exp in its epilogue, which cannot hand out the pre-activation."""

    backend, pattern = "aten", dict(fc=BasicLinear, act=Exp)

    def fwd(self, x: Tensor, fc_weight: Tensor) -> Any:
        return (x @ fc_weight.t()).exp(), ()


def test_a_case_where_optimal_is_cheaper() -> None:
    ops = Linear(8, 8, bias=False), Exp()
    with og.register(ExpBackward), og.register(LinearExp):
        first, best = og.Sequential(*ops), og.Sequential(*ops, planner="optimal")
        plan = first.plan()
        assert names(plan, "backward") == ["ExpBackward", "BasicLinear"]
        assert names(plan) == ["BasicLinear", "Exp"]
        (refused,) = [r for r in plan.rejected if r.name == "LinearExp"]
        assert refused.reason == "backward needs x1"
        plan = best.plan()
        assert names(plan, "backward") == ["Exp", "BasicLinear"]
        assert names(plan) == ["LinearExp"]
        # Reading and writing 32 bytes each in Exp's place, and nothing else, is what it saves.
        assert plan.costs["greedy"] - plan.costs["optimal"] == 64
        assert f"optimal {plan.costs['optimal']:.0f}" in str(plan)
        assert_equal_results(first, best, torch.randn(3, 8))


class BiasReLU(og.Fuser):
    """Leaves the linear layer before it without its bias."""

    backend, pattern = "reference", dict(bias=Bias, act=ReLU)
    saves = ("act_x",)

    def fwd(self, x: Tensor, bias_bias: Tensor) -> Any:
        pre = x + bias_bias
        return pre.relu(), (pre,)


class BiasReLUBackward(og.Fuser):
    backend, pattern, priority = "reference", dict(bias=Bias, act=ReLU), 2

    def bwd(self, dy: Tensor, act_x: Tensor) -> Any:
        dx = dy * (act_x > 0)
        return dx, (dx.sum(0),)


PLANNERS = pytest.mark.parametrize("planner", ["greedy", "optimal"])


@PLANNERS
def test_a_higher_priority_goes_before_backends_lengths_and_what_overlaps(planner: str) -> None:
    ops = Linear(8, 8), ReLU(), Linear(8, 8)
    module = og.Sequential(*ops, planner=planner)
    before = steps(module.plan())
    assert ("LinearBias", (0, 1)) in before
    with og.register(BiasReLU), og.register(BiasReLUBackward):
        assert steps(module.plan())[:2] == [("BasicLinear", (0,)), ("BiasReLU", (1, 2))]
        assert ("BiasReLUBackward", (1, 2)) in steps(module.plan(), "backward")
        assert_equal_results(module, reference(*ops), torch.randn(3, 8))
    assert steps(module.plan()) == before


class Private(og.Fuser):
    """Hands a value to its own backward."""

    backend, pattern, saves, priority = "aten", dict(fc=BasicLinear, bias=Bias), ("input",), 0

    def saved(self, ops: Any, x: og.Spec) -> dict[str, og.Spec]:
        return {"input": x}

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor) -> Any:
        return x @ fc_weight.t() + bias_bias, (x.clone(),)

    def bwd(self, dy: Tensor, input: Tensor, fc_weight: Tensor) -> Any:
        return dy @ fc_weight, (dy.t() @ input, dy.sum(0))


@PLANNERS
def test_a_forward_that_alone_gives_a_private_value_stays(planner: str) -> None:
    ops = Linear(8, 8), ReLU(), Linear(8, 8)
    with og.register(Private), og.register(BiasReLU):
        module = og.Sequential(*ops, planner=planner)
        plan = module.plan()
        assert {"Private", "BiasReLU"} & set(names(plan))
        taken = ("Private", (0, 1)) in steps(plan, "backward")
        assert (("Private", (0, 1)) in steps(plan)) == taken
        assert_equal_results(module, reference(*ops), torch.randn(3, 8))


@PLANNERS
def test_a_negative_priority_goes_before_plain_ops_alone(planner: str) -> None:
    class Last(BiasReLU):
        backend, priority = "aten", -1

    module = og.Sequential(Bias(8), ReLU(), planner=planner)
    with og.register(Last):
        assert names(module.plan()) == ["Last"]
        with og.register(BiasReLU):
            assert names(module.plan()) == ["BiasReLU"]


def test_an_unknown_planner() -> None:
    with pytest.raises(og.PlanError, match="got planner 'best', expected one of greedy, optimal"):
        og.Sequential(Linear(8, 8), planner="best").plan()


def test_a_thousand_ops() -> None:
    ops: list[nn.Module] = []
    for _ in range(125):
        ops += [Tee("r"), RMSNorm(8), Linear(8, 16), SwiGLU(), ConstantScale(0.1), Add("r")]
        ops[-6].channels["d"] = ops[-1].channels["other"] = f"r{len(ops)}"
    module = og.Sequential(*ops)
    plan = module.plan()
    assert len(module._stages[0].ops) == 875
    covered = [i for step in plan.forward for i in step.ops]
    assert covered == [i for i in range(875) if i % 7]
    back = [i for step in plan.backward for i in reversed(step.ops)]
    assert back == [i for i in reversed(range(875)) if i % 7 != 6]
    torch.manual_seed(0)
    assert_equal_results(module, reference(*ops), torch.randn(2, 8))


# -- what is kept and what is made again --


def keeper_of(ops: Sequence[og.Op], needs: Sequence[str], width: int) -> Keeper:
    run = BasicOps(lower_plainly(ops, [type(op).__name__ for op in ops]))
    weights = {
        run.name(name, i): og.Spec(tuple(getattr(run.ops[i], name).shape), torch.float32, CPU)
        for i, name in run.slots
    }
    x = row(width, torch.float32, CPU)
    request = Request(x, (), weights, frozenset({"x0"}), (False,) * len(run.kinds))
    space = Space(Program(run, request), ("reference",))
    return Keeper(space).settle(needs)


def test_a_value_is_made_again_where_that_moves_less_than_four_times_its_size() -> None:
    """fp32, width 8: keeping costs 4 * 32, reading x0 and writing x1 costs 64."""
    keeper = keeper_of([SiLU()], ["x0", "x1"], 8)
    assert keeper.kept == {"x0"}
    assert set(keeper.again) == {"x1"}
    assert keeper.cost == 4 * 32 + 64


def test_a_value_whose_source_is_not_kept_is_kept_itself() -> None:
    """Keeping x1: 128. Making it again would keep x0, 128, and move 64."""
    keeper = keeper_of([SiLU()], ["x1"], 8)
    assert keeper.kept == {"x1"}
    assert keeper.cost == 128


def test_a_narrow_value_is_kept_beside_its_wide_source() -> None:
    """SwiGLU: width 32 to 16. Keeping: 4 * 64 = 256; making again: 128 read, 64 written."""
    assert keeper_of([SwiGLU()], ["x0", "x1"], 32).again.keys() == {"x1"}
    # SwiGLU of SwiGLU: 32 to 8. Keeping x2 costs 4 * 32 = 128, the chain (128 + 64) + (64 + 32).
    keeper = keeper_of([SwiGLU(), SwiGLU()], ["x0", "x2"], 32)
    assert keeper.kept == {"x0", "x2"}
    # With x1 there anyway the last link alone costs 64 + 32.
    keeper = keeper_of([SwiGLU(), SwiGLU()], ["x0", "x1", "x2"], 32)
    assert keeper.kept == {"x0"}
    assert keeper.again.keys() == {"x1", "x2"}


def test_chains_are_made_again_while_they_are_cheap() -> None:
    """Each link of width 8 moves 64 bytes, keeping a value costs 128: two links cost as much."""
    assert keeper_of([SiLU()] * 2, ["x0", "x2"], 8).kept == {"x0", "x2"}
    keeper = keeper_of([SiLU()] * 5, [f"x{i}" for i in range(6)], 8)
    assert keeper.kept == {"x0"}
    assert keeper.cost == 128 + 5 * 64


def test_a_matrix_product_is_never_made_again() -> None:
    module = reference(Linear(64, 8, bias=False), SiLU(), Linear(8, 4))
    plan = module.plan()
    assert plan.saved == {"x0": 256, "x1": 32}
    assert [s.again for s in plan.backward if s.again] == [{"x2": (1,)}]
    keeper = keeper_of([Linear(64, 2, bias=False)], ["x0", "x1"], 64)
    assert keeper.kept == {"x0", "x1"}


def test_a_norm_is_made_again_from_its_statistics() -> None:
    """rstd is 4 bytes; reading it and x0 and writing x1 is 4 + 32 + 32, keeping x1 is 128."""
    plan = reference(RMSNorm(8), Linear(8, 8)).plan()
    assert plan.saved == {"x0": 32, "rstd0": 4}
    assert "RMSNorm.again(" in plan.backward_source
    assert reference(LayerNorm(8), Linear(8, 8)).plan().saved == {"x0": 32, "mean0": 4, "rstd0": 4}


def test_random_values_are_made_again_from_their_seed_only() -> None:
    module = reference(Exp(), Dropout(0.5), Linear(8, 8))
    x = torch.randn(4, 8, requires_grad=True)
    plan = run_once(module, x)
    assert plan.saved == {"x1": 32, "seed1": 0}
    assert plan.backward_source.count("Dropout.again(") == 1
    assert "Dropout.fwd(" not in plan.backward_source


def test_the_weight_of_saved_bytes_reaches_the_issues_goal() -> None:
    """RMSNorm, Linear, SwiGLU, Linear in bf16: x, rstd and the pre-activation, 2H + 4F + 4."""
    hidden, ffn = 64, 96
    ops = RMSNorm(hidden), Linear(hidden, 2 * ffn, bias=False), SwiGLU(), Linear(ffn, hidden, False)
    for options in ({}, {"backends": ("reference",)}, {"planner": "optimal"}):
        plan = og.Sequential(*ops, dtype=torch.bfloat16, **options).plan()
        assert plan.saved_bytes_per_row == 2 * hidden + 4 * ffn + 4


# -- what is not wanted is not computed --


def test_frozen_weights_cost_no_line_and_keep_no_value() -> None:
    module = reference(Linear(8, 8), SiLU(), Linear(8, 4))
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    plan = module.plan()
    assert plan.saved == {"x2": 32}
    assert "wgrad" not in plan.backward_source
    assert "return (dx, None, None, None, None,)" in plan.backward_source
    module[0].bias.requires_grad_(True)
    assert module.plan().backward_source.count("wgrad") == 1
    assert "x0" not in module.plan().saved


def test_a_first_dx_that_nobody_wants_is_not_computed() -> None:
    module = reference(Linear(8, 8, bias=False), SiLU(), Linear(8, 4, bias=False))
    plan = run_once(module, torch.randn(3, 8))
    assert plan.backward_source.count("dgrad") == 1
    assert "return (None, dweight0, dweight2,)" in plan.backward_source
    norm = run_once(reference(RMSNorm(8), Linear(8, 4)), torch.randn(3, 8))
    assert "want=('weight',)" in norm.backward_source


def test_the_backward_stops_where_no_gradient_is_needed() -> None:
    module = reference(SiLU(), RMSNorm(8), Linear(8, 8), SiLU(), Linear(8, 4))
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith("4."))
    plan = run_once(module, torch.randn(3, 8))
    assert names(plan, "backward") == ["Bias", "BasicLinear"]
    assert plan.saved == {"x5": 32}


def test_inference_keeps_nothing_and_takes_bolder_fusions() -> None:
    for act in (ReLU(), GELU("none")):
        module = og.Sequential(Linear(8, 16), act, Linear(16, 8))
        training, inference = module.plan(), module.plan(training=False)
        assert steps(inference) == [("LinearBiasActivation", (0, 1, 2)), ("LinearBias", (3, 4))]
        assert inference.saved == {}
        assert inference.backward == ()
        assert names(training) == ["LinearBias", type(act).__name__, "LinearBias"]
        (refused,) = [r for r in training.rejected if r.name == "LinearBiasActivation"]
        assert refused == ((0, 1, 2), "LinearBiasActivation", "forward", "backward needs x2")
    tanh = og.Sequential(Linear(8, 16), GELU()).plan(training=False)
    assert names(tanh) == ["LinearBias", "GELU"]
    assert "epilogue is gelu_erf, not gelu" in str(tanh)


# -- residuals --


def test_a_tee_collects_gradients_from_everywhere() -> None:
    """Two Adds read it, the caller too, and the main path goes on."""
    fc, norm = Linear(8, 8), RMSNorm(8)
    module = reference(fc, Tee("r", to_caller=True), SiLU(), Add("r"), norm, Add("r"))
    x = torch.randn(3, 8, requires_grad=True)

    def plain() -> tuple[Tensor, Tensor]:
        r = nn.functional.linear(x, fc.weight, fc.bias)
        h = nn.functional.silu(r) + r
        return nn.functional.rms_norm(h, (8,), norm.weight, 1e-5) + r, r

    def found(outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
        total = outputs[0].square().sum() + outputs[1].pow(3).sum()
        leaves = [x, fc.weight, fc.bias, norm.weight]
        return [*outputs, *torch.autograd.grad(total, leaves)]

    torch.testing.assert_close(found(module(x)), found(plain()))
    (plan,) = module._stages[0].plans.values()
    assert "d2 = d2 + dx" in plan.backward_source


# -- keys --


def test_whatever_changes_what_is_right_plans_again() -> None:
    module = og.Sequential(Linear(8, 16), ReLU(), Dropout(0.5), Linear(16, 8))
    plans = module._stages[0].plans
    x = torch.randn(3, 8)

    def made() -> og.Plan:
        known = set(map(id, plans.values()))
        result = module(x)
        if result.requires_grad:
            result.sum().backward()
        new = [plan for plan in plans.values() if id(plan) not in known]
        assert len(new) == 1, "it reused a plan"
        module(x)
        assert len(plans) == len(known) + 1, "it planned the same twice"
        return new[0]

    made()
    x.requires_grad_()
    assert "return (dx," in made().backward_source
    module[0].weight.requires_grad_(False)
    assert "dweight0" not in made().backward_source
    module.eval()
    assert "Dropout" not in made().forward_source
    with torch.no_grad():
        assert made().backward == ()
    with torch.autocast("cpu", torch.bfloat16):
        assert "weight0_stored.to(torch.bfloat16)" in made().forward_source
    with torch.autocast("cpu", torch.float16):
        assert "weight0_stored.to(torch.float16)" in made().forward_source
    module.double()
    x = x.detach().double()
    assert made().forward[0].edges[0].dtype == torch.float64
    with pytest.raises(og.OpError, match=r"0:Linear: got input width 6, expected 8"):
        module(torch.randn(3, 6).double())


def test_equal_modules_share_plans_and_different_ones_do_not() -> None:
    one, same = og.Sequential(Linear(8, 8), SiLU()), og.Sequential(Linear(8, 8), SiLU())
    assert one.plan() is same.plan()
    others = [
        og.Sequential(Linear(8, 8, bias=False), SiLU()),
        og.Sequential(Linear(8, 8), ReLU()),
        og.Sequential(Linear(8, 8), SiLU(), planner="optimal"),
        og.Sequential(Linear(8, 8), SiLU(), backends=("reference",)),
        og.Sequential(Linear(8, 16), SiLU()),
        og.Sequential(BasicLinear(8, 8), Bias(8), SiLU()),
    ]
    plans = [one.plan(), *(module.plan() for module in others)]
    assert len(set(map(id, plans))) == len(plans)
    x = torch.randn(3, 8)
    assert not torch.equal(one(x), same(x))


class Counted(Op):
    """`x * factor`, whose plan reads the constant in both passes; it counts the questions."""

    constants = ("factor",)
    factor = 2.0
    asked: ClassVar[list[str]] = []

    def constant(self, name: str, x: Spec) -> Any:
        self.asked.append(name)
        return super().constant(name, x)

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(self, x: Tensor, factor: float) -> Any:
        return x * factor, ()

    def bwd(self, dy: Tensor, factor: float) -> Any:
        return dy * factor, ()


def test_a_plan_asks_for_a_constant_once() -> None:
    Counted.asked.clear()
    plan = og.Sequential(Linear(8, 8), Counted(), checkpoint=True).plan()
    assert "2.0" in plan.forward_source
    assert "2.0" in plan.backward_source
    assert Counted.asked == ["factor"]
