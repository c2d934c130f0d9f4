"""Ops that other people write: with and without a `bwd`, with every kind of argument."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Linear, RMSNorm, SwiGLU, Tee

F64 = torch.float64


class SquaredReLU(og.Op):
    """y = relu(x)**2"""

    def fwd(self, x: Tensor) -> Any:
        return torch.relu(x).square(), ()


class SquaredReLUByHand(SquaredReLU):
    def bwd(self, dy: Tensor, x: Tensor) -> Any:
        return 2 * torch.relu(x) * dy, ()


class Gain(og.Op):
    """y = x * gain: a parameter."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))

    def fwd(self, x: Tensor, gain: Tensor) -> Any:
        return x * gain, ()


class GainByHand(Gain):
    def bwd(self, dy: Tensor, x: Tensor, gain: Tensor) -> Any:
        return dy * gain, ((dy * x).sum(0),)


class Power(og.Op):
    """y = |x|**power: a constant."""

    constants = ("power",)

    def __init__(self, power: float = 1.5) -> None:
        super().__init__()
        self.power = power

    def fwd(self, x: Tensor, power: float) -> Any:
        return x.abs() ** power, ()


class PowerByHand(Power):
    def bwd(self, dy: Tensor, x: Tensor, power: float) -> Any:
        return dy * power * x.abs() ** (power - 1) * x.sign(), ()


class Gate(og.Op):
    """y = x * sigmoid(gate): an extra input."""

    extra_inputs = ("gate",)

    def fwd(self, x: Tensor, gate: Tensor) -> Any:
        return x * torch.sigmoid(gate), ()


class GateByHand(Gate):
    def bwd(self, dy: Tensor, x: Tensor, gate: Tensor) -> Any:
        s = torch.sigmoid(gate)
        return dy * s, (dy * x * s * (1 - s),)


class Shift(og.Op):
    """y = x * shift: a buffer."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.register_buffer("shift", torch.linspace(1, 2, width))

    def fwd(self, x: Tensor, shift: Tensor) -> Any:
        return x * shift, ()


class ShiftByHand(Shift):
    def bwd(self, dy: Tensor, shift: Tensor) -> Any:
        return dy * shift, (None,)


class Exp(og.Op):
    """y = exp(x), whose derivative is y: it names `y`."""

    def fwd(self, x: Tensor) -> Any:
        return x.exp(), ()


class ExpByHand(Exp):
    def bwd(self, dy: Tensor, y: Tensor) -> Any:
        return dy * y, ()


class ExpSavingItsOutput(Exp):
    """The same, saving its own output under a name."""

    saves = ("power",)

    def fwd(self, x: Tensor) -> Any:
        y = x.exp()
        return y, (y,)

    def bwd(self, dy: Tensor, power: Tensor) -> Any:
        return dy * power, ()


class SoftmaxSaving(og.Op):
    """Saves a value for each row, and one for all: two saved values, no derivative by hand."""

    saves = ("total", "scale")

    def fwd(self, x: Tensor) -> Any:
        total = x.exp().sum(-1, keepdim=True)
        return x.exp() / total, (total, x.new_ones(()))


CLASSES = (
    SquaredReLU,
    SquaredReLUByHand,
    Gain,
    GainByHand,
    Power,
    PowerByHand,
    Gate,
    GateByHand,
    Shift,
    ShiftByHand,
    Exp,
    ExpByHand,
    ExpSavingItsOutput,
    SoftmaxSaving,
)


def inputs(op: og.Op, *shape: int) -> list[Tensor]:
    torch.manual_seed(0)
    count = 1 + len(op.extra_inputs)
    return [torch.randn(*shape, dtype=F64, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("shape", [(4, 6), (2, 2, 6)], ids=str)
@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_gradients(kind: type[og.Op], shape: tuple[int, ...]) -> None:
    module = og.Sequential(kind(), dtype=F64)
    given = inputs(module[0], *shape)
    parameters = dict(module.named_parameters())

    def call(*values: Tensor) -> Tensor:
        weights = dict(zip(parameters, values[len(given) :], strict=True))
        return torch.func.functional_call(module, weights, values[: len(given)])

    assert torch.autograd.gradcheck(call, (*given, *parameters.values()))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_between_other_ops(kind: type[og.Op]) -> None:
    """What a neighbour needs of it, and what it needs of them, is there; alone it runs too."""
    op = kind().double()
    module = og.Sequential(Linear(6, 6), op, op, RMSNorm(6), dtype=F64)
    x, *extras = inputs(op, 4, 6)
    y = module(x, *extras, *extras)
    alone = x
    for step in module:
        alone = step(alone, *(extras if step is op else ()))
    torch.testing.assert_close(y, alone)
    leaves = [x, *extras, *module.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), leaves),
        torch.autograd.grad(alone.square().sum(), leaves),
    )


@pytest.mark.parametrize(
    "module, saved",
    [
        ([ExpByHand()], {"x1": 24}),
        ([ExpSavingItsOutput()], {"power0": 24}),
        ([ExpByHand(), SquaredReLUByHand()], {"x1": 24}),
        ([PowerByHand()], {"x0": 24}),
        ([GateByHand()], {"x0": 24, "gate0": 24}),
        ([ShiftByHand()], {}),
    ],
    ids=lambda value: "+".join(type(v).__name__ for v in value) if value else "",
)
def test_what_bwd_does_not_name_is_not_kept(module: list[og.Op], saved: dict[str, int]) -> None:
    assert dict(og.Sequential(*module).plan(x=torch.randn(2, 6)).saved) == saved


def test_a_changed_constant_plans_again() -> None:
    op = Power(2.0)
    module, x = og.Sequential(op), torch.rand(3, 6)
    torch.testing.assert_close(module(x), x**2)
    assert "2.0" in module.plan(x=x).forward_source
    op.power = 3.0
    torch.testing.assert_close(module(x), x**3)
    assert "3.0" in module.plan(x=x).forward_source


def test_a_changed_buffer_is_read_at_each_call() -> None:
    op = Shift()
    module, x = og.Sequential(op), torch.rand(3, 6)
    module(x)
    op.shift.fill_(5.0)
    torch.testing.assert_close(module(x), 5 * x)
    op.shift = torch.full((6,), 4.0)
    torch.testing.assert_close(module(x), 4 * x)


def test_an_extra_input_may_come_from_a_channel() -> None:
    gate = GateByHand()
    gate.set_extra_input_channel(0, "g")
    module, x = og.Sequential(Tee("g"), Exp(), gate, dtype=F64), inputs(Exp(), 4, 6)
    assert torch.autograd.gradcheck(module, x)
    y = module(*x)
    torch.testing.assert_close(y, x[0].exp() * torch.sigmoid(x[0]))


def test_a_width_that_changes() -> None:
    class Pair(og.Op):
        """Sums neighbours."""

        def fwd(self, x: Tensor) -> Any:
            return x.unflatten(-1, (-1, 2)).sum(-1), ()

    module = og.Sequential(Linear(6, 8), SwiGLU(), Pair(), Linear(2, 3), dtype=F64)
    assert module.plan().forward[-1].edges[1].width == 3
    assert torch.autograd.gradcheck(module, inputs(Pair(), 3, 6))


def test_a_parameter_that_fwd_does_not_name() -> None:
    class Forgetful(Gain):
        def fwd(self, x: Tensor) -> Any:
            return x, ()

    with pytest.raises(og.PlanError, match=r"0:Forgetful: parameters \['gain'\] are not arg"):
        og.Sequential(Forgetful())


@pytest.mark.parametrize("name", ["x", "y", "dy", "gain"])
def test_names_that_cannot_be_saved(name: str) -> None:
    kind = type("Greedy", (Gain,), {"saves": (name,)})
    with pytest.raises(og.PlanError, match=rf"0:Greedy: it cannot save under the names \['{name}'"):
        og.Sequential(kind())


def test_bwd_needs_a_name_that_nobody_has() -> None:
    class Wrong(Gain):
        def bwd(self, dy: Tensor, x: Tensor, gian: Tensor) -> Any:
            return dy, (None,)

    with pytest.raises(og.OpsgraphError, match="0:Wrong: Wrong has no 'gian'"):
        og.Sequential(Wrong()).plan(x=torch.randn(2, 6))


def test_a_subclass_of_linear_with_its_own_fwd_is_used() -> None:
    class Doubled(Linear):
        def fwd(self, x: Tensor, weight: Tensor) -> Any:
            return 2 * (x @ weight.t()), ()

        def dgrad(self, dy: Tensor, weight: Tensor) -> Tensor:
            return 2 * (dy @ weight)

        def wgrad(self, dy: Tensor, x: Tensor, weight_stored: Tensor) -> Tensor:
            return 2 * (dy.t() @ x)

    module, x = Doubled(6, 4, bias=False), torch.randn(3, 6, requires_grad=True)
    plain = nn.Linear(6, 4, bias=False)
    plain.weight = module.weight
    torch.testing.assert_close(module(x), 2 * plain(x))
    found = torch.autograd.grad(module(x).sum(), [x, module.weight])
    expected = torch.autograd.grad(2 * plain(x).sum(), [x, module.weight])
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("without_cpu_backend")
def test_a_subclass_with_its_own_fwd_is_not_replaced() -> None:
    class Shifted(RMSNorm):
        def fwd(self, x: Tensor, weight: Any, eps: float, zero_centered_gamma: bool) -> Any:
            y, saved = super().fwd(x, weight, eps, zero_centered_gamma)
            return y + 1, saved

    class Norm(og.Fuser):
        backend, pattern = "aten", dict(norm=RMSNorm)

        def fwd(self, x: Tensor, norm_weight: Tensor) -> Any:
            return torch.full_like(x, 7), ()

    x = torch.randn(3, 8)
    with og.register(Norm), torch.no_grad():
        assert torch.equal(RMSNorm(8)(x), torch.full_like(x, 7))
        shifted = Shifted(8)(x)
    torch.testing.assert_close(shifted, 1 + RMSNorm(8)(x).detach())
