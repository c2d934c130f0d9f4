"""The four environment variables: each changes what a module does from its next planning on."""

import pytest
import torch
from torch import Tensor

import opsgraph as og
from opsgraph.ops import Add as AddOp
from opsgraph.ops import BasicLinear, Bias, Dropout, Linear, RMSNorm, SiLU, SwiGLU, Tee

pytestmark = pytest.mark.usefixtures("without_cpu_backend")


def _mlp() -> og.Sequential:
    torch.manual_seed(0)
    return og.Sequential(
        Tee("r"), RMSNorm(16), Linear(16, 48), SwiGLU(), Linear(24, 16), AddOp("r")
    )


class WrongLinearBias(og.Fuser):
    """Right in the backward's eyes, wrong by a hundredth in the forward."""

    backend, pattern = "aten", dict(fc=BasicLinear, bias=Bias)

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor):
        return 1.01 * torch.addmm(bias_bias, x, fc_weight.t()), ()


class WrongSiLU(og.Fuser):
    """Forgets a part of the derivative."""

    backend, pattern = "aten", dict(act=SiLU)

    def bwd(self, dy: Tensor, act_x: Tensor):
        return dy * torch.sigmoid(act_x), ()


def _train(module: og.Sequential) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(6, 16, requires_grad=True)
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], torch.randn_like(y))]


def test_check_passes_on_right_steps_and_stands_in_the_source(monkeypatch) -> None:
    expected = _train(_mlp())
    monkeypatch.setenv("OPSGRAPH_CHECK", "1")
    module = _mlp()
    for found, other in zip(_train(module), expected, strict=True):
        assert torch.equal(found, other)
    plan = module.plan()
    assert "check('forward 2-3 LinearBias (aten)', 'x4', x4, ref_x4)" in plan.forward_source
    assert "check('backward 4-5 GatedLinearBackward (aten)', 'dx'" in plan.backward_source
    assert "'dweight5', dweight5, ref_dweight5" in plan.backward_source


def test_check_names_the_wrong_forward_step(monkeypatch) -> None:
    monkeypatch.setenv("OPSGRAPH_CHECK", "1")
    with (
        og.register(WrongLinearBias),
        pytest.raises(og.OpsgraphError, match=r"forward 2-3 WrongLinearBias \(aten\): x4 differs"),
    ):
        options = {"fusers": ("WrongLinearBias",)}
        _train(og.Sequential(*_mlp(), **options))


def test_check_names_the_wrong_backward_step(monkeypatch) -> None:
    monkeypatch.setenv("OPSGRAPH_CHECK", "1")
    with og.register(WrongSiLU):
        module = og.Sequential(Linear(16, 16), SiLU())
        with pytest.raises(og.OpsgraphError, match=r"backward 2 WrongSiLU \(aten\): dx differs"):
            _train(module)


class Dropped(og.Fuser):
    """Dropout by the op's own formula, and a factor."""

    backend, pattern, saves = "aten", dict(drop=Dropout), ("drop_seed",)
    factor = 1.0

    def fwd(self, x: Tensor, drop: Dropout):
        seed = torch.randint(2**62, (), dtype=torch.int64)
        return self.factor * drop.again(x, seed, drop.p), (seed,)


@pytest.mark.parametrize("grad", [True, False])
def test_check_makes_a_mask_again_also_without_a_backward(monkeypatch, grad: bool) -> None:
    monkeypatch.setenv("OPSGRAPH_CHECK", "1")
    monkeypatch.setattr("opsgraph.features.verify.every", True)
    x = torch.randn(6, 16)
    with og.register(Dropped), torch.set_grad_enabled(grad):
        og.Sequential(Bias(16), Dropout(0.5))(x)
        monkeypatch.setattr(Dropped, "factor", 1.01)
        with pytest.raises(og.OpsgraphError, match=r"forward 1 Dropped \(aten\): x2 differs"):
            og.Sequential(Bias(16), Dropout(0.5), SiLU())(x)


class Dropping(og.Fuser):
    """Keeps the seed of its mask to itself."""

    backend, pattern = "reference", dict(drop=Dropout, act=SiLU)

    def fwd(self, x: Tensor, drop: Dropout):
        return torch.nn.functional.silu(drop.fwd(x, drop.p)[0]), ()


def test_a_step_whose_mask_nobody_knows_is_not_compared(monkeypatch) -> None:
    monkeypatch.setenv("OPSGRAPH_CHECK", "1")
    module, x = og.Sequential(Dropout(0.5), SiLU()), torch.randn(4, 8)
    with og.register(Dropping), torch.no_grad():
        y = module(x)
        assert "Dropping" in str(module.plan(training=False, x=x))
    kept = y != 0
    torch.testing.assert_close(y[kept], torch.nn.functional.silu(2 * x[kept]))


def test_check_under_transforms_compares_what_can_be_read(monkeypatch) -> None:
    """Under vmap nothing is, and that is no error; under grad a wrong step is named."""
    monkeypatch.setenv("OPSGRAPH_CHECK", "1")
    x = torch.randn(3, 6, 16)

    class WrongBias(og.Fuser):
        backend, pattern = "reference", dict(bias=Bias, act=SiLU)

        def fwd(self, x: Tensor, bias_bias: Tensor):
            return 1.01 * torch.nn.functional.silu(x + bias_bias), ()

    with og.register(WrongBias):
        module = og.Sequential(Bias(16), SiLU())
        expected = 1.01 * torch.nn.functional.silu(x)
        torch.testing.assert_close(torch.func.vmap(module)(x), expected)
        with pytest.raises(og.OpsgraphError, match="WrongBias"):
            torch.func.grad(lambda x: module(x).sum())(x)


def test_fuel_admits_claims_one_by_one(monkeypatch) -> None:
    def fused(fuel: str) -> int:
        monkeypatch.setenv("OPSGRAPH_FUEL", fuel)
        plan = _mlp().plan()
        steps = (*plan.forward, *plan.backward)
        return sum(step.backend != "reference" for step in steps)

    counts = [fused(str(n)) for n in range(5)]
    assert counts[0] == 0
    assert counts == sorted(counts)
    assert counts[-1] > 1
    monkeypatch.setenv("OPSGRAPH_FUEL", "0")
    assert "OPSGRAPH_FUEL is used up" in {r.reason for r in _mlp().plan().rejected}


def test_backends_limits_and_names_wrong_ones(monkeypatch) -> None:
    monkeypatch.setenv("OPSGRAPH_BACKENDS", "reference")
    assert {step.backend for step in _mlp().plan().forward} == {"reference"}
    monkeypatch.setenv("OPSGRAPH_BACKENDS", "cudnn")
    with pytest.raises(
        og.PlanError, match=r"got backend 'cudnn', expected some of .*triton, cublaslt, cpu, aten"
    ):
        _mlp().plan()


def test_logs_print_plan_rejections_and_code(monkeypatch, capsys) -> None:
    monkeypatch.setenv("OPSGRAPH_LOGS", "plan,reject,code")
    plan = _mlp().plan()
    text = capsys.readouterr().err
    assert "saved  x0 64" in text
    assert f"planned in {plan.planning_seconds * 1e3:.1f} ms" in text
    assert "def backward(ops, dx" in text
    assert "triton (both): " in text or "opsgraph:" in text


@pytest.mark.parametrize(
    "name, value, message",
    [
        (
            "OPSGRAPH_LOGS",
            "plans",
            "OPSGRAPH_LOGS: got .'plans'., expected plan, reject, code or steps",
        ),
        ("OPSGRAPH_FUEL", "-1", "OPSGRAPH_FUEL: got '-1', expected a whole number"),
        ("OPSGRAPH_CHECK", "yes", "OPSGRAPH_CHECK: got 'yes', expected 0 or 1"),
    ],
)
def test_wrong_values_are_named(monkeypatch, name: str, value: str, message: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        _mlp()
