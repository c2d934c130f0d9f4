"""Passes that quantize weights and note amaxes do what the plan's own do, bit by bit."""

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from replays import compare, random, told
from torch.utils.checkpoint import checkpoint

import opsgraph as og
from opsgraph.kernels.cpu import build as library
from opsgraph.ops import Add, Linear, RMSNorm, SwiGLU, Tee
from opsgraph.recipe import DelayedScaling, Float8BlockScaling, Recipe

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")
WIDTH, ROWS, STEPS = 32, 8, 5
RECIPES: dict[str, Callable[[], Recipe]] = {
    "delayed": lambda: DelayedScaling(amax_history_len=next(_lengths)),
    "blocks": Float8BlockScaling,
}
_ENDS = "scale", "rward", "kward"
_lengths = count(200)
"""More than updates. States of equal recipes would be updated together."""


def trained(module: Any, recipe: Recipe, run: Callable[..., Any] | None = None) -> list[Any]:
    """Some steps: outputs, gradients, and in the end the buffers of scaling states."""
    found: list[Any] = []
    for k in range(STEPS):
        x = random(ROWS, WIDTH, dtype=torch.bfloat16, seed=k).requires_grad_()
        with og.autocast(recipe=recipe):
            y = module(x) if run is None else run(module, x, recipe)
        y.backward(random(ROWS, WIDTH, dtype=torch.bfloat16, seed=k + 9))
        found += [y, x.grad, [p.grad for p in module.parameters()]]
        for parameter in module.parameters():
            parameter.grad = None
    return [found, states(module)]


def states(module: Any) -> list[Any]:
    """What they hold, but for histories."""
    return [value for name, value in module.state_dict().items() if name[-5:] in _ENDS]


def block(**options: Any) -> Any:
    torch.manual_seed(0)
    layers = RMSNorm(WIDTH), Linear(WIDTH, 2 * WIDTH, **options), SwiGLU(), Linear(WIDTH, WIDTH)
    return og.Sequential(Tee("r"), *layers, Add("r"), dtype=torch.bfloat16)


def both(make: Callable[[], Any], name: str, run: Callable[..., Any] | None = None) -> Any:
    """With replays and without."""
    return compare(make, lambda module: trained(module, RECIPES[name](), run))


@pytest.mark.parametrize("name", RECIPES)
def test_a_block_with_biases_and_a_residual(name: str) -> None:
    module, recipe = both(block, name), RECIPES[name]()
    with og.autocast(recipe=recipe):
        plan = module.plan(True, random(ROWS, WIDTH, dtype=torch.bfloat16))
    texts = told(plan)["forward"]
    assert any("native call" in text for text in texts)
    assert plan.joined.forward is not plan.passes.forward


def test_a_layer_that_stands_twice() -> None:
    def make() -> Any:
        torch.manual_seed(0)
        layer = Linear(WIDTH, WIDTH)
        return og.Sequential(layer, RMSNorm(WIDTH), layer, dtype=torch.bfloat16)

    both(make, "delayed")


@pytest.mark.parametrize("name", RECIPES)
def test_stored_weights_under_autocast(name: str) -> None:
    def run(module: Any, x: Any, recipe: Recipe) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    both(lambda: block().float(), name, run)


@pytest.mark.parametrize("name", RECIPES)
def test_gradients_that_go_into_main_grad(name: str) -> None:
    def make() -> Any:
        module = block(accumulate_into_main_grad=True)
        weight = module[2].weight
        weight.main_grad = torch.ones(weight.shape)
        return module

    def use(module: Any) -> Any:
        return [trained(module, RECIPES[name]()), module[2].weight.main_grad]

    compare(make, use)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("how", ["hooks", "checkpoint", "reentrant", "contexts"])
def test_what_watches_calls(how: str, name: str) -> None:
    """Every other one: so that passes of both kinds have records."""
    calls = count()

    def run(module: Any, x: Any, recipe: Recipe) -> Any:
        if next(calls) % STEPS % 2 == 0:
            return module(x)
        if how == "hooks":
            with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
                return module(x)
        if how == "contexts":
            options = {"context_fn": og.checkpoint_contexts}
            return checkpoint(module, x, use_reentrant=False, **options)

        def inside(x: Any) -> Any:
            with og.autocast(recipe=recipe):
                return module(x)

        return checkpoint(inside, x, use_reentrant=how == "reentrant")

    both(block, name, run)


def test_first_microbatches() -> None:
    def use(module: Any) -> Any:
        found, recipe = [], RECIPES["delayed"]()
        for k in range(8):
            x = random(ROWS, WIDTH, dtype=torch.bfloat16, seed=k).requires_grad_()
            first = [None, None, True, False][k % 4]
            with og.autocast(recipe=recipe):
                y = module(x, is_first_microbatch=first)
            y.sum().backward()
            found += [y, x.grad]
        return [found, states(module)]

    def make() -> Any:
        torch.manual_seed(0)
        return og.LayerNormMLP(WIDTH, WIDTH, device="cpu", params_dtype=torch.bfloat16)

    compare(make, use)


def test_the_pass_of_calls_without_grad_is_made_for_these() -> None:
    module, recipe = block(), RECIPES["delayed"]()
    x = random(ROWS, WIDTH, dtype=torch.bfloat16)
    with og.autocast(recipe=recipe):
        for _ in range(3):
            module(x)
            with torch.no_grad():
                module(x)
        made = [module.plan(grad, x).joined.silent.cache_info() for grad in (True, False)]
    assert [(info.misses, info.hits) for info in made] == [(0, 0), (1, 2)]


def test_grad_and_no_grad_in_turns() -> None:
    def use(module: Any) -> Any:
        found, recipe = [], RECIPES["delayed"]()
        for k in range(9):
            x = random(ROWS, WIDTH, dtype=torch.bfloat16, seed=k)
            with og.autocast(recipe=recipe), torch.set_grad_enabled(k % 3 != 2):
                found.append(module(x))
                if k % 3 == 1:
                    module.requires_grad_(k % 2 == 0)
        return [found, states(module)]

    compare(block, use)
