"""OPSGRAPH_CHECK=1: ranks about to exchange what does not fit are told, and do not hang."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import opsgraph as og
from opsgraph.base import config
from opsgraph.ops import AllGather, AllReduce, Linear, ReduceScatter, SiLU
from opsgraph.testing.distributed import Ranks


@contextmanager
def checking() -> Iterator[None]:
    os.environ["OPSGRAPH_CHECK"] = "1"
    config.touch()
    try:
        yield
    finally:
        del os.environ["OPSGRAPH_CHECK"]
        config.touch()


def mismatches(rank: int, size: int) -> None:
    def fails(module: og.Sequential, x: torch.Tensor, *parts: str) -> None:
        with pytest.raises(og.OpsgraphError, match=r"OPSGRAPH_CHECK: .*ranks of group '") as error:
            module(x)
        for part in parts:
            assert part in str(error.value), f"{part} is not in {error.value}"

    with checking():
        rows = torch.randn(4 + 2 * rank, 6, requires_grad=True)
        both = "rank 0 has (4, 6) torch.float32", "rank 1 has (6, 6) torch.float32"
        fails(og.Sequential(AllGather()), rows, "forward 0 AllGather", *both)
        fails(og.Sequential(AllReduce()), rows, *both)
        fails(og.Sequential(SiLU(), ReduceScatter()), rows, "forward 1 ReduceScatter", *both)
        mixed = torch.randn(4, 6, dtype=torch.float64 if rank else torch.float32)
        fails(og.Sequential(AllReduce()), mixed, "torch.float64", "torch.float32")
        order = [AllReduce(), AllGather()]
        fails(og.Sequential(order[rank]), torch.randn(4, 6), "AllReduce", "AllGather")
        wide = torch.randn(4, 4 + rank)
        column = Linear(4 + rank, 8, tensor_parallel_mode="column", sequence_parallel=True)
        fails(og.Sequential(column), wide, "(4, 4)", "(4, 5)")


def equal_ranks_pass(rank: int, size: int) -> None:
    with checking():
        layer = og.Sequential(
            Linear(4, 8, tensor_parallel_mode="column", sequence_parallel=True),
            SiLU(),
            Linear(8, 4, tensor_parallel_mode="row", sequence_parallel=True),
        )
        x = torch.randn(4, 4, requires_grad=True)
        layer(x).sum().backward()
        plan = layer.plan()
        assert plan.forward_source.count("check_ranks") == 2
        assert plan.backward_source.count("check_ranks") >= 2
    layer(x)
    assert "check_ranks" not in layer.plan().forward_source


def test_differing_ranks_are_told(ranks: Ranks) -> None:
    ranks.run(mismatches, 2, timeout=300)


def test_equal_ranks_pass(ranks: Ranks) -> None:
    ranks.run(equal_ranks_pass, 2, timeout=300)
