"""Operands of passes on CUDA: the cases of `test_operands` whose kernels are others there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import opsgraph as og
from opsgraph.ops import Linear, RMSNorm, SwiGLU

pytestmark = pytest.mark.gpu
WIDTH, ROWS = 64, 16


def _module(calls: int) -> Any:
    torch.manual_seed(0)
    layers = RMSNorm(WIDTH), Linear(WIDTH, 2 * WIDTH), SwiGLU(), Linear(WIDTH, WIDTH)
    module = og.Sequential(*layers, device="cuda", dtype=torch.bfloat16)
    for _ in range(calls):
        _step(module)
    return module


def _x() -> Any:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(ROWS, WIDTH, generator=generator).to("cuda", torch.bfloat16)


def _step(module: Any, between: Callable[[nn.Module], object] | None = None) -> None:
    y = module(_x().requires_grad_())
    if between is not None:
        between(module)
    y.backward(torch.ones_like(y))


def _shorten(module: nn.Module) -> None:
    parameter = module.get_parameter("0.weight")
    parameter.data = parameter.data[: WIDTH // 2].clone()


def _free(module: nn.Module) -> None:
    module.get_parameter("0.weight").untyped_storage().resize_(0)


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_what_is_not_what_was_planned(calls: int) -> None:
    with pytest.raises(og.OpError, match=r"got bfloat16 \[32\] for weight0 in its backward"):
        _step(_module(calls), _shorten)
    module = _module(calls)
    _free(module)
    with pytest.raises(og.OpsgraphError, match="freed"):
        _step(module)
    with pytest.raises(og.OpsgraphError, match="freed"):
        _step(_module(calls), _free)
    torch.cuda.synchronize()


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_zeros_and_negated_values(calls: int) -> None:
    module = _module(calls)
    zeros = torch._efficientzerotensor((ROWS, WIDTH), dtype=torch.bfloat16, device="cuda")
    negated = torch._neg_view(_x())
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(module(zeros), module(_x() * 0))
            assert torch.equal(module(negated), module(-_x()))
    torch.cuda.synchronize()
