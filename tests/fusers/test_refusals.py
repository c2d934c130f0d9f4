"""Where a fuser that fits may not be used: a user's, whose results would be wrong there."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import opsgraph as og
from opsgraph.ops import Add, Dropout, SiLU

pytestmark = pytest.mark.usefixtures("seeded")


@pytest.fixture
def seeded() -> None:
    torch.manual_seed(0)


class DroppedSiLU(og.Fuser):
    """Takes Dropout as it is in training."""

    backend, pattern = "reference", dict(drop=Dropout, act=SiLU)

    def fwd(self, x: Tensor) -> Any:
        return torch.zeros_like(x), ()


def test_no_fuser_takes_dropout_where_it_does_nothing() -> None:
    module, x = og.Sequential(Dropout(0.5), SiLU()).eval(), torch.randn(3, 4)
    with og.register(DroppedSiLU):
        torch.testing.assert_close(module(x), F.silu(x))
        plan = module.plan(training=False, x=x)
    assert "Dropout does nothing in this mode" in str(plan)


class SumBackward(og.Fuser):
    """Has no place for the gradient that leaves at the Add."""

    backend, pattern = "reference", dict(add=Add, act=SiLU)

    def bwd(self, dy: Tensor, act_x: Tensor) -> Any:
        s = torch.sigmoid(act_x)
        return dy * s * (1 + act_x * (1 - s)), ()


def test_no_backward_has_a_gradient_leave_in_its_midst() -> None:
    module = og.Sequential(Add("other"), SiLU())
    x, other = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    with og.register(SumBackward):
        found = torch.autograd.grad(module(x, other).sum(), (x, other))
        assert "the gradient that leaves at 0 is inside it" in str(module.plan(x=x))
    expected = torch.autograd.grad(F.silu(x + other).sum(), (x, other))
    torch.testing.assert_close(found, expected)


class Noise(og.Op):
    """Cheap to make again, were it not another one each time."""

    random = True

    def out(self, x: og.Spec) -> og.Spec:
        return x

    def fwd(self, x: Tensor) -> Any:
        return x + torch.randn_like(x), ()

    def bwd(self, dy: Tensor) -> Any:
        return dy, ()


@pytest.mark.parametrize("checkpoint", [False, True])
def test_what_is_random_is_not_made_again(checkpoint: bool) -> None:
    module = og.Sequential(Noise(), SiLU(), checkpoint=checkpoint, backends=("reference",))
    x = torch.randn(3, 4, requires_grad=True)
    torch.manual_seed(1)
    (found,) = torch.autograd.grad(module(x).sum(), x)
    torch.manual_seed(1)
    (expected,) = torch.autograd.grad(F.silu(x + torch.randn_like(x)).sum(), x)
    torch.testing.assert_close(found, expected)
