"""Recipes under torch.compile: the same bits, no graph break, no stale plan."""

import pytest
import torch
from compiled import Compiled, cold
from recipe_cases import HIDDEN, RECIPES, example, mlp, results

import opsgraph as og
from opsgraph.ops import GroupedLinear
from opsgraph.precision import recipe as r

__all__ = ["cold"]

SAYS_WHY = torch.__version__ >= "2.10"
"""Whether Dynamo gives the text of an error that leaves a context manager: 2.9's does not."""


@pytest.mark.parametrize("name", ["current", "rows", "blocks", "mx", "nvfp4 plain", "dequantized"])
def test_compiled_and_eager_give_the_same_bits(name: str) -> None:
    module = mlp(recompute=name != "mx")
    compiled = Compiled(module)
    for rows in (40, 50, 33):
        x = example(rows)
        found = results(module, RECIPES[name], x, compiled)
        assert all(map(torch.equal, found, results(module, RECIPES[name], x)))
    assert compiled.count <= 2


@pytest.mark.parametrize("name", ["current", "mx"])
def test_groups(name: str) -> None:
    torch.manual_seed(0)
    module, sizes = og.Sequential(GroupedLinear(2, HIDDEN, 32)), torch.tensor([32, 64])
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(96, HIDDEN)
    found = results(module, RECIPES[name], x, lambda x: compiled(x, sizes))
    expected = results(module, RECIPES[name], x, lambda x: module(x, sizes))
    assert all(map(torch.equal, found, expected))


def test_another_recipe_compiles_again() -> None:
    module, x = mlp(), example()
    compiled = Compiled(module)
    for recipe in (None, r.Float8CurrentScaling(), r.MXFP8BlockScaling(), None):
        found = results(module, recipe, x, compiled)
        assert all(map(torch.equal, found, results(module, recipe, x)))
    assert compiled.count == 3


def test_first_microbatch_is_refused() -> None:
    module = og.LayerNormMLP(HIDDEN, 128, device="cpu")
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    text = "is_first_microbatch keeps weights" if SAYS_WHY else "raised exception"
    raises = pytest.raises(Exception, match=text)
    with raises, og.autocast(recipe=r.Float8CurrentScaling()):
        compiled(torch.randn(4, HIDDEN), is_first_microbatch=True)


def test_a_context_inside_the_compiled_function() -> None:
    module, x = mlp(), example()

    def run(x: torch.Tensor, recipe: r.Recipe) -> torch.Tensor:
        with og.autocast(recipe=recipe):
            return module(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    recipe = r.Float8CurrentScaling()
    assert torch.equal(compiled(x, recipe), run(x, recipe))
    text = "DelayedScaling inside a compiled function" if SAYS_WHY else "Observed exception"
    with pytest.raises(Exception, match=text):
        compiled(x, r.DelayedScaling())


def test_held_weights_are_refused() -> None:
    with og.quantized_model_init(recipe=r.MXFP8BlockScaling()):
        module = og.ops.Linear(HIDDEN, 32)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    refused = pytest.raises(Exception, match="cannot see into weights of quantized_model_init")
    with refused, og.autocast(recipe=r.MXFP8BlockScaling()):
        compiled(torch.randn(4, HIDDEN))
