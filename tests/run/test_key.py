"""The key of a call: what distinguishes it from another, and what does not."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import opsgraph as og
from opsgraph.ops import Add, Dropout, Linear, SiLU, Tee


def key(module: og.Sequential, x: torch.Tensor) -> Any:
    (stage,) = module._stages
    return stage.key(x, (), stage.weights())


@contextmanager
def evaluating(module: og.Sequential) -> Iterator[None]:
    module.eval()
    yield
    module.train()


@contextmanager
def frozen(module: og.Sequential) -> Iterator[None]:
    module[0].weight.requires_grad_(False)
    yield
    module[0].weight.requires_grad_(True)


@pytest.mark.parametrize(
    "around",
    [
        evaluating,
        frozen,
        lambda module: torch.no_grad(),
        lambda module: torch.autocast("cpu", torch.bfloat16),
        lambda module: torch.autocast("cpu", torch.float16),
    ],
    ids=["eval", "frozen", "no grad", "bf16", "fp16"],
)
def test_calls_that_need_other_plans_have_other_keys(around: Callable[..., Any]) -> None:
    module, x = og.Sequential(Linear(4, 4), Dropout(0.5)), torch.randn(2, 4)
    usual = key(module, x)
    with around(module):
        assert key(module, x) != usual
    assert key(module, x) == usual
    assert key(module, torch.randn(7, 3, 4)) == usual, "rows are in no key"
    assert key(module, x.clone().requires_grad_()) != usual


def test_a_value_that_two_ops_read_gets_the_sum_of_its_gradients() -> None:
    torch.manual_seed(0)
    module = og.Sequential(Tee("r"), Linear(4, 4), Add("r"), SiLU(), Add("r"), SiLU())
    x = torch.randn(3, 4, requires_grad=True)
    (found,) = torch.autograd.grad(module(x).sum(), x)
    y = F.silu(F.silu(module[1](x) + x) + x)
    torch.testing.assert_close(found, torch.autograd.grad(y.sum(), x)[0])
