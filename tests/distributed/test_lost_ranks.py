"""A rank that is lost: the others get an error from each exchange, and none waits for ever."""

import json
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import opsgraph as og
from opsgraph.ops import AllGather, AllReduce, AllReduceGrad, Linear, ReduceScatter, RMSNorm
from opsgraph.recipe import DelayedScaling

WIDTH, ROWS = 8, 4
SECONDS = 30


def _modules(name: str) -> nn.Module:
    torch.manual_seed(0)
    split: dict[str, Any] = {"sequence_parallel": True}
    return {
        "all_gather": lambda: og.Sequential(RMSNorm(WIDTH), AllGather()),
        "reduce_scatter": lambda: og.Sequential(RMSNorm(WIDTH), ReduceScatter()),
        "all_reduce": lambda: og.Sequential(RMSNorm(WIDTH), AllReduce()),
        "all_reduce_grad": lambda: og.Sequential(RMSNorm(WIDTH), AllReduceGrad()),
        "column": lambda: Linear(WIDTH, WIDTH, tensor_parallel_mode="column", **split),
        "row": lambda: Linear(2 * WIDTH, WIDTH, tensor_parallel_mode="row", **split),
        "amaxes": lambda: og.Sequential(Linear(16, 16)),
    }[name]()


def _step(module: nn.Module, name: str, backward: bool) -> None:
    x = torch.ones(ROWS, 16 if name == "amaxes" else WIDTH, requires_grad=True)
    if name == "amaxes":
        with og.autocast(recipe=DelayedScaling(), amax_reduction_group=dist.group.WORLD):
            module(x)
        return
    y = module(x)
    if backward:
        y.sum().backward()


def lost(rank: int, name: str, at: str, store: str) -> None:
    """Three steps of both ranks, then one of the first alone: prints its error, and the seconds."""
    dist.init_process_group(
        "gloo", f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=SECONDS)
    )
    module = _modules(name)
    for _ in range(3):
        _step(module, name, True)
    before = [p.detach().clone() for p in module.parameters()]
    y = module(torch.ones(ROWS, WIDTH, requires_grad=True)) if at == "backward" else None
    dist.barrier()
    if rank == 1:
        os._exit(0)
    start, error = time.monotonic(), ""
    try:
        if y is None:
            _step(module, name, False)
        else:
            y.sum().backward()
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    same = all(map(torch.equal, before, module.parameters()))
    print(json.dumps([error, time.monotonic() - start, same]), flush=True)
    os._exit(0)  # the group has no one to say goodbye to


CASES = [(n, "forward") for n in ("all_gather", "reduce_scatter", "all_reduce", "column", "row")]
CASES += [("all_reduce_grad", "backward"), ("all_gather", "backward"), ("column", "backward")]
CASES += [("reduce_scatter", "backward"), ("row", "backward")]
CASES += [("amaxes", "forward")]


@pytest.mark.slow
@pytest.mark.parametrize("name, at", CASES)
def test_a_rank_that_is_lost_before_an_exchange(name: str, at: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), name, at, str(tmp_path / "store")],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said, _ = ranks[0].communicate(timeout=4 * SECONDS)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    error, seconds, same = json.loads(said)
    assert error, "it ended without an error"
    assert any(word in error.lower() for word in ("closed", "reset", "peer", "timed out")), error
    assert seconds < SECONDS + 5
    assert same


if __name__ == "__main__":
    lost(int(sys.argv[1]), *sys.argv[2:])
