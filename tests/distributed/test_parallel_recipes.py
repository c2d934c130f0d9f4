"""Tensor parallelism under recipes: ranks compute what one process does, up to the rounding."""

import gc
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import opsgraph as og
from opsgraph.parallel import shard_state_dict
from opsgraph.testing.distributed import Ranks

HIDDEN, FFN, ROWS = 128, 512, 256
RECIPES = (
    og.recipe.Float8CurrentScaling(),
    og.recipe.DelayedScaling(),
    og.recipe.Float8BlockScaling(),
    og.recipe.MXFP8BlockScaling(),
)


def make(**options: Any) -> og.LayerNormMLP:
    torch.manual_seed(0)
    kind: dict[str, Any] = dict(normalization="RMSNorm", activation="swiglu", device="cpu")
    return og.LayerNormMLP(HIDDEN, FFN, init_method=torch.nn.init.normal_, **kind, **options)


def run(mlp: og.LayerNormMLP, recipe: og.recipe.Recipe, x: Tensor, dy: Tensor) -> list[Tensor]:
    """y and dx of a second call, for which delayed scaling has seen a first."""
    for _ in range(2):
        with og.autocast(recipe=recipe, amax_reduction_group=dist.group.WORLD):
            leaf = x.detach().requires_grad_()
            y = mlp(leaf)
            y.backward(dy)
    assert leaf.grad is not None
    return [y.detach(), leaf.grad]


def keeping(rank: int, size: int) -> None:
    """What the backward needs of gathered values has as many rows as they have."""
    torch.manual_seed(rank)
    x, dy = torch.randn(32, HIDDEN), torch.randn(32, HIDDEN)
    parallel = dict(set_parallel_mode=True, sequence_parallel=True, tp_group=dist.group.WORLD)
    for recipe in RECIPES:
        layers = [make(recompute=r, **parallel) for r in (True, False)]  # the same on all ranks
        one, other = (run(layer, recipe, x, dy) for layer in layers)
        assert all(map(torch.equal, one, other)), type(recipe).__name__
        gc.collect()


def test_kept_values_are_those_made_again(ranks: Ranks) -> None:
    ranks.run(keeping, 2)


def near_one_process(rank: int, size: int) -> None:
    torch.manual_seed(1)
    x, dy = torch.randn(ROWS, HIDDEN), torch.randn(ROWS, HIDDEN)
    own = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    for recipe in RECIPES:
        whole = make()
        split = make(
            set_parallel_mode=True, sequence_parallel=True, tp_group=dist.group.WORLD, tp_size=size
        )
        split.load_state_dict(shard_state_dict(whole.state_dict(), split))
        plain = make()
        y = plain(leaf := x.clone().requires_grad_())
        y.backward(dy)
        found = run(split, recipe, x[own], dy[own])
        expected = run(whole, recipe, x, dy)
        exact = [y.detach(), leaf.grad]
        for one, right, truth in zip(found, expected, exact, strict=True):
            name = type(recipe).__name__
            error = (one - right[own]).norm() / right[own].norm()
            rounding = (right - truth).norm() / truth.norm()
            assert 0.003 < rounding < 0.2, f"{name} rounds by {rounding}"
            assert error < rounding, (
                f"{name}: {error} from one process, whose rounding is {rounding}"
            )


def test_recipes_over_ranks(ranks: Ranks) -> None:
    ranks.run(near_one_process, 2)
