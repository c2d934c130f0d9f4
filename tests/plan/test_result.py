"""Plans as text, their fields and source; and how many bytes they keep.

`pytest --update-plans` writes the expected plans in `tests/plan/plans` again.
"""

import linecache
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from saved_bytes import saved_bytes
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import (
    GELU,
    BasicLinear,
    Bias,
    Dropout,
    Identity,
    LayerNorm,
    Linear,
    Residual,
    RMSNorm,
    SiLU,
    SwiGLU,
    Tee,
)

PLANS = Path(__file__).parent / "plans"
BF16 = torch.bfloat16


def llama(hidden: int = 64, ffn: int = 128) -> list[nn.Module]:
    return [
        RMSNorm(hidden),
        Linear(hidden, 2 * ffn, bias=False),
        SwiGLU(),
        Linear(ffn, hidden, bias=False),
    ]


def gpt() -> list[nn.Module]:
    return [LayerNorm(64), Linear(64, 256), GELU(), Linear(256, 64)]


def frozen() -> list[nn.Module]:
    modules = llama()
    modules[1].weight.requires_grad_(False)
    modules[3].weight.requires_grad_(False)
    return modules


def mixed() -> list[nn.Module]:
    """What drops out of one pass or both, and what leaves the sequence."""
    return [Identity(), Linear(8, 16), Dropout(0.1), Tee("out"), SiLU(), Linear(16, 8, bias=False)]


CASES: dict[str, tuple[Callable[[], Sequence[nn.Module]], bool]] = {
    "llama_training": (llama, True),
    "llama_inference": (llama, False),
    "gpt_training": (gpt, True),
    "gpt_inference": (gpt, False),
    "residual_training": (lambda: [Residual(*llama())], True),
    "residual_inference": (lambda: [Residual(*llama())], False),
    "frozen_weights": (frozen, True),
    "mixed_training": (mixed, True),
    "mixed_inference": (mixed, False),
}


def reference(*modules: nn.Module, dtype: torch.dtype | None = None) -> og.Sequential:
    return og.Sequential(*modules, dtype=dtype, backends=("reference",))


@pytest.mark.parametrize("name", CASES)
def test_plan_is_the_expected_text(name: str, pytestconfig: pytest.Config) -> None:
    build, training = CASES[name]
    plan = reference(*build(), dtype=BF16).plan(training)
    text = "\n".join((str(plan), "", plan.forward_source, plan.backward_source if training else ""))
    path = PLANS / f"{name}.txt"
    if pytestconfig.getoption("--update-plans"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.rstrip() + "\n")
    assert path.read_text() == text.rstrip() + "\n"


def test_every_expected_plan_belongs_to_a_case() -> None:
    assert {path.stem for path in PLANS.glob("*.txt")} == set(CASES)


@pytest.mark.parametrize("planner", ["greedy", "optimal"])
def test_a_llama_block_keeps_x_rstd_and_the_pre_activation(planner: str) -> None:
    hidden, ffn, rows = 64, 160, 6
    expected = 2 * hidden + 4 * ffn + 4
    for backends in (("reference",), None):
        module = og.Sequential(*llama(hidden, ffn), dtype=BF16, backends=backends, planner=planner)
        plan = module.plan()
        assert plan.saved_bytes_per_row == sum(plan.saved.values()) == expected
        assert dict(plan.saved) == {"x0": 2 * hidden, "x2": 4 * ffn, "rstd0": 4}
        x = torch.randn(2, rows // 2, hidden, dtype=BF16, requires_grad=True)
        assert saved_bytes(lambda m=module, x=x: m(x)) == expected * rows
    linears = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)
    plain = nn.Sequential(linears[0], nn.SiLU(), linears[1])
    x = torch.randn(rows, hidden, requires_grad=True)
    assert saved_bytes(lambda: plain(x)) == rows * 4 * (hidden + 2 * ffn), "the counter is wrong"


def test_a_residual_keeps_nothing_more() -> None:
    alone, inside = reference(*llama(), dtype=BF16), reference(Residual(*llama()), dtype=BF16)
    assert inside.plan().saved_bytes_per_row == alone.plan().saved_bytes_per_row


def test_a_frozen_linear_keeps_nothing() -> None:
    modules = frozen()
    plan = reference(*modules, dtype=BF16).plan()
    assert set(plan.saved) == {"x0", "x2", "rstd0"}
    assert "wgrad" not in plan.backward_source
    modules[0].weight.requires_grad_(False)
    x = torch.randn(3, 64, dtype=BF16)
    plan = reference(*modules).plan(x=x)
    assert set(plan.saved) == {"x0", "x2", "rstd0"}, "dx of the norm and the activation need them"


def test_a_gradient_of_x_that_nobody_wants_is_not_computed() -> None:
    module = reference(Linear(4, 3, bias=False), SiLU())
    x = torch.randn(2, 4)
    module(x).sum().backward()
    (plan,) = module._stages[0].plans.values()
    assert "dgrad" not in plan.backward_source
    assert "wgrad" in plan.backward_source


def test_steps_say_what_they_cover_need_and_save() -> None:
    plan = reference(*llama(), dtype=BF16).plan()
    assert [(s.name, s.backend, s.direction, s.ops) for s in plan.forward] == [
        ("RMSNorm", "reference", "forward", (0,)),
        ("BasicLinear", "reference", "forward", (1,)),
        ("SwiGLU", "reference", "forward", (2,)),
        ("BasicLinear", "reference", "forward", (3,)),
    ]
    assert [s.ops for s in plan.backward] == [(3,), (2,), (1,), (0,)]
    assert {s.direction for s in plan.backward} == {"backward"}
    assert [s.saves for s in plan.forward] == [("rstd0",), (), (), ()]
    assert [s.needs for s in plan.backward] == [("x3",), ("x2",), ("x1",), ("x0", "rstd0")]
    assert [dict(s.again) for s in plan.backward] == [{"x3": (2,)}, {}, {"x1": (0,)}, {}]
    assert [str(s.edges[1]) for s in plan.forward] == [
        f"bf16[*,{width}]" for width in (64, 256, 128, 64)
    ]


def test_inference_plans_no_backward_and_keeps_nothing() -> None:
    plan = reference(*llama(), dtype=BF16).plan(training=False)
    assert plan.backward == ()
    assert plan.saved_bytes_per_row == 0
    assert plan.forward


class Picky(og.Fuser):
    """Takes nothing, and says why."""

    backend, pattern = "reference", dict(fc=BasicLinear, bias=Bias)

    def reject(self, fc: og.Op, bias: og.Op, x: og.Spec) -> str | None:
        return f"width {x.width} is not its favourite"

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor) -> tuple[Tensor, tuple[()]]:
        raise AssertionError


class Greedy(og.Fuser):
    """Linear, bias and SiLU in one; it cannot hand out what SiLU's backward needs."""

    backend, pattern = "reference", dict(fc=BasicLinear, bias=Bias, act=SiLU)

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor) -> tuple[Tensor, tuple[()]]:
        return nn.functional.silu(nn.functional.linear(x, fc_weight, bias_bias)), ()


def test_refusals_have_places_and_reasons() -> None:
    module = reference(RMSNorm(8), Linear(8, 4), SiLU())
    with og.register(Picky), og.register(Greedy):
        training, inference = module.plan(), module.plan(training=False)
    assert (1, 2) in [r.ops for r in training.rejected]
    refused = {(r.name, r.ops, r.direction): r.reason for r in training.rejected}
    assert refused["Picky", (1, 2), "forward"] == "width 8 is not its favourite"
    assert refused["Greedy", (1, 2, 3), "forward"] == "backward needs x3"
    assert [s.name for s in inference.forward] == ["RMSNorm", "Greedy"]
    assert "Greedy" not in {r.name for r in inference.rejected}
    assert "width 8 is not its favourite" in str(training)
    x = torch.randn(3, 8)
    with og.register(Greedy), torch.no_grad():
        fused = module(x)
    torch.testing.assert_close(fused, module(x))


def test_source_is_what_runs() -> None:
    module = reference(*llama())
    plan = module.plan()
    for function, source in (
        (plan.functions.forward.call, plan.forward_source),
        (plan.functions.backward.call, plan.backward_source),
    ):
        code = function.__code__
        assert "".join(linecache.getlines(code.co_filename)) == source
        compile(source, "source", "exec")
    x = torch.randn(3, 64)
    weights = [dict(module.named_parameters())[f"{k}.weight"] for k in (0, 1, 3)]
    (y,), saved = plan.functions.forward.call(plan.ops, x, *weights)
    torch.testing.assert_close(y, module(x))
    gradients = plan.functions.backward.call(plan.ops, torch.ones_like(y), list(saved))
    module(x).sum().backward()
    for found, weight in zip(gradients[1:], weights, strict=True):
        torch.testing.assert_close(found, weight.grad)


class Breaks(og.Op):
    """Raises in the pass that it is told."""

    constants = ("where",)

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def out(self, x: og.Spec) -> og.Spec:
        return x

    def fwd(self, x: Tensor, where: str) -> tuple[Tensor, tuple[()]]:
        if where == "forward":
            raise ZeroDivisionError("in fwd")
        return x, ()

    def bwd(self, dy: Tensor, where: str) -> tuple[Tensor, tuple[()]]:
        raise ZeroDivisionError("in bwd")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_tracebacks_show_the_generated_line(where: str) -> None:
    module = reference(SiLU(), Breaks(where))
    x = torch.randn(2, 4, requires_grad=True)
    with pytest.raises(ZeroDivisionError) as caught:
        module(x).sum().backward()
    shown = "".join(traceback.format_exception(caught.value))
    name = {"forward": "fwd", "backward": "bwd"}[where]
    assert f"Breaks.{name}(ops[1], " in shown
    assert "opsgraph plan" in shown


def test_a_plan_cannot_be_changed() -> None:
    plan = reference(SiLU()).plan(x=torch.randn(2, 4))
    with pytest.raises(AttributeError):
        plan.forward = ()


def test_an_unknown_planner_or_backend_is_an_error() -> None:
    with pytest.raises(og.PlanError, match="got planner 'best', expected one of greedy, optimal"):
        og.Sequential(Linear(4, 3), planner="best").plan()
    with pytest.raises(og.PlanError, match=r"got backend 'tpu', expected some of .*reference"):
        og.Sequential(Linear(4, 3), backends=("tpu",)).plan()
    with pytest.raises(og.PlanError, match="0:SiLU: got no width to plan for"):
        og.Sequential(SiLU()).plan()
