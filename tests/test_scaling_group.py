"""Amaxes of delayed scaling reduced over two processes."""

from pathlib import Path

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
