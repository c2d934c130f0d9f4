"""What is made again in the backward, where chains of values are long."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import opsgraph as og
from opsgraph.ops import ConstantScale, Linear, RMSNorm, SiLU, SwiGLU


@pytest.fixture
def shallow() -> Iterator[None]:
    """A stack for far fewer calls than there are ops."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(350)
    yield
    sys.setrecursionlimit(before)


FORMULAS: dict[type[og.Op], Callable[[Any, Tensor], Tensor]] = {
    SiLU: lambda op, x: F.silu(x),
    ConstantScale: lambda op, x: x * op.scale,
    RMSNorm: lambda op, x: F.rms_norm(x, (4,), op.weight, op.eps),
    Linear: lambda op, x: F.linear(x, op.weight, op.bias),
}
CHAINS: dict[str, Callable[[int], list[og.Op]]] = {
    "without a GEMM": lambda count: [
        f for _ in range(count // 2) for f in (SiLU(), ConstantScale(2.0))
    ],
    "without saved values": lambda count: [*(ConstantScale(-1.0) for _ in range(count)), SiLU()],
    "norms": lambda count: [RMSNorm(4) for _ in range(count)],
    "linear layers": lambda count: [
        f for _ in range(count // 2) for f in (Linear(4, 4), RMSNorm(4))
    ],
}


@pytest.mark.parametrize("checkpoint", [False, True], ids=["kept", "checkpoint"])
@pytest.mark.parametrize("name", CHAINS)
def test_a_long_chain_is_planned_and_run(shallow: None, name: str, checkpoint: bool) -> None:
    torch.manual_seed(0)
    ops = CHAINS[name](300)
    module = og.Sequential(*ops, checkpoint=checkpoint, backends=("reference",)).double()
    x = (-torch.rand(2, 4, dtype=torch.float64)).requires_grad_()
    plain = x
    for op in ops:
        plain = FORMULAS[type(op)](op, plain)
    (found,) = torch.autograd.grad(module(x).sum(), x)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    size = expected.abs().max()
    assert size > 0
    torch.testing.assert_close(found / size, expected / size, rtol=1e-6, atol=1e-6)


def test_what_is_made_again_is_made_in_order() -> None:
    torch.manual_seed(0)
    ops = [RMSNorm(6), Linear(6, 8), SwiGLU(), Linear(4, 6), RMSNorm(6), SiLU(), Linear(6, 6)]
    x = torch.randn(3, 6, requires_grad=True)
    found = []
    for options in ({"checkpoint": True}, {"recompute": False}, {"double_backward": True}):
        module = og.Sequential(*ops, **options)
        found.append(torch.autograd.grad(module(x).square().sum(), (x, *module.parameters())))
    for one, two, three in zip(*found, strict=True):
        torch.testing.assert_close(one, three)
        torch.testing.assert_close(two, three)
