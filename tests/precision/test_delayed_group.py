"""Amaxes of delayed scaling reduced over two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import Tensor

import opsgraph as og
from opsgraph.ops import Linear
from opsgraph.recipe import DelayedScaling

STEPS = 3


def drawn(step: int, rank: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * width + 2 * step + rank)
    return torch.randn(20, width, generator=generator)


def work(rank: int, folder: str, reduce: bool) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    torch.manual_seed(0)
    layer = Linear(64, 32)
    recipe = DelayedScaling(amax_history_len=STEPS + 1, reduce_amax=reduce)
    for step in range(STEPS):
        with og.autocast(recipe=recipe, amax_reduction_group=group):
            y = layer(drawn(step, rank, 64))
        y.backward(drawn(step, rank, 32))
    with og.autocast(recipe=recipe, amax_reduction_group=group):
        pass  # takes up what the last backward saw
    torch.save(layer.get_submodule("scaling").state_dict(), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("reduce", [True, False])
def test_the_largest_amax_of_all_ranks_counts(tmp_path: Path, reduce: bool) -> None:
    mp.spawn(work, (str(tmp_path), reduce), nprocs=2)
    for rank in range(2):
        state = torch.load(tmp_path / str(rank))
        for column, width in ((0, 64), (2, 32)):
            ranks = (0, 1) if reduce else (rank,)
            seen = [
                max(float(drawn(step, r, width).abs().max()) for r in ranks)
                for step in range(STEPS)
            ]
            assert state["amax_history"][:, column].tolist() == [0.0, *seen]
            limit = torch.tensor(448.0 if column == 0 else 57344.0)
            assert state["scale"][column] == limit / max(seen)


EXPERT = 32


def experts(rank: int, folder: str, prepared: bool) -> None:
    """Two experts of the same shape; in step 0 each rank runs another one, in step 1 both do."""
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    group = torch.distributed.group.WORLD
    torch.manual_seed(0)
    model = torch.nn.ModuleList(Linear(EXPERT, EXPERT) for _ in range(3))
    recipe = DelayedScaling(amax_history_len=STEPS)
    if prepared:
        recipe.prepare(model)
    found: Any = "no error"
    try:
        for ran in ((0, 1), (1, 0)):
            with og.autocast(recipe=recipe, amax_reduction_group=group):
                y = model[ran[rank]](torch.full((2, EXPERT), 1.0 + ran[rank] + 10 * rank))
            y.sum().backward()
        with og.autocast(recipe=recipe, amax_reduction_group=group):
            pass
        found = {name: b for name, b in model.named_buffers() if name.endswith("history")}
    except og.OpsgraphError as error:
        found = str(error)
    torch.save(found, f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("prepared", [True, False])
def test_experts_that_run_on_one_rank(tmp_path: Path, prepared: bool) -> None:
    mp.spawn(experts, (str(tmp_path), prepared), nprocs=2)
    first, second = (torch.load(tmp_path / str(rank)) for rank in range(2))
    if not prepared:
        assert first == second
        assert "call recipe.prepare(model) on every rank" in first
        return
    assert first.keys() == second.keys()
    assert len(first) == 3
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    # Expert 0 saw 1 on rank 0, then 11 on rank 1; expert 1 saw 12, then 2; expert 2 nothing.
    seen = [first[f"{k}.scaling.amax_history"][:, 0].tolist() for k in range(3)]
    assert seen == [[0, 1, 11], [0, 12, 2], [0, 0, 0]]
