"""What is not finite shows in the results under every recipe, so that a GradScaler sees it."""

import math
from typing import Any

import pytest
import torch
from recipe_cases import RECIPES
from torch import Tensor

import opsgraph as og
from opsgraph.ops import Linear

each_recipe = pytest.mark.parametrize("name", RECIPES)
REACHES = {"x": ("y", "first"), "weight": ("y", "dx", "second"), "dy": ("dx", "first", "second")}
"""What is made of an input, the first weight and an output's gradient."""


def step(module: Any, recipe: og.recipe.Recipe, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    module.zero_grad()
    x = x.requires_grad_()
    with og.autocast(recipe=recipe):
        y = module(x)
    y.backward(dy)
    assert x.grad is not None
    first, second = (linear.weight.grad for linear in module)
    return {"y": y.detach(), "dx": x.grad, "first": first, "second": second}


@pytest.mark.sampled(26)
@each_recipe
@pytest.mark.parametrize("where", REACHES)
def test_what_is_not_finite_shows_in_what_is_made_of_it(name: str, where: str) -> None:
    torch.manual_seed(0)
    module = og.Sequential(Linear(64, 32, bias=False), Linear(32, 64, bias=False)).bfloat16()
    for value in (1.0, math.inf, -math.inf, math.nan):  # delayed scales come from the first step
        x, dy = torch.randn(48, 64).bfloat16(), torch.randn(48, 64).bfloat16()
        {"x": x, "weight": module[0].weight.data, "dy": dy}[where][3, 5] = value
        found = step(module, RECIPES[name], x, dy)
        for key in REACHES[where]:
            assert bool(found[key].isfinite().all()) == (value == 1), f"{value}: {key}"


@each_recipe
def test_a_gradscaler_sees_an_overflow(name: str) -> None:
    torch.manual_seed(0)
    module = og.LayerNormMLP(64, 64, bias=False, normalization="RMSNorm", device="cpu")
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor, expected in ((1.0, 4.0), (1e38, 2.0)):  # 4 * 1e38 is infinite
        optimizer.zero_grad()
        before = [p.detach().clone() for p in module.parameters()]
        with og.autocast(recipe=RECIPES[name]):
            y = module(torch.randn(32, 64))
        scaler.scale((y * factor).mean() if factor == 1.0 else (y * factor).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == expected
        moved = [not torch.equal(p, b) for p, b in zip(module.parameters(), before, strict=True)]
        assert any(moved) == (factor == 1.0)
