"""Fusers over symmetric memory: on CPUs their ops are acted by plain collectives."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as memory
from torch import Tensor, nn

import opsgraph as og
from opsgraph import fusers
from opsgraph.base import backend, config
from opsgraph.kernels.exchange import symmetric
from opsgraph.ops import AllGather, BasicLinear, Linear, SwiGLU, Tee
from opsgraph.testing.distributed import Ranks

FLAGS = ("ub_overlap_ag", "ub_overlap_rs", "ub_overlap_rs_dgrad")
ALL_REDUCES = ("one_shot", "two_shot", "multimem_all_reduce")


def gather_matmul(
    a: Tensor, bs: list[Tensor], gather_dim: int, group_name: str, *, return_A: bool = True
) -> tuple[Tensor | None, list[Tensor]]:
    assert gather_dim == 0
    assert a.is_contiguous(), "as the real one demands"
    whole = a.new_empty(dist.get_world_size() * a.shape[0], a.shape[1])
    dist.all_gather_into_tensor(whole, a.contiguous())
    return whole if return_A else None, [whole @ b for b in bs]


def matmul_scatter(a: Tensor, b: Tensor, reduce_op: str, scatter_dim: int, group: str) -> Tensor:
    assert (reduce_op, scatter_dim) == ("sum", 0)
    total = a @ b
    dist.all_reduce(total)
    return total.chunk(dist.get_world_size())[dist.get_rank()].clone()


def summed(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    total = x.clone()
    dist.all_reduce(total)
    return total


def summed_in_place(x: Tensor, reduce_op: str, group_name: str) -> Tensor:
    dist.all_reduce(x)
    return x


class Workspace:
    """One buffer for all calls, as the real one is: what stays in it is overwritten."""

    rank = 0
    memory = torch.full((1 << 20,), float("nan"))

    def get_buffer(self, rank: int, sizes: Any, dtype: torch.dtype) -> Tensor:
        return self.memory.view(dtype)[: sizes[0] * sizes[1]].view(sizes)


@contextmanager
def acted() -> Iterator[None]:
    """The backend as if it were there, its ops over Gloo."""
    library = torch.library.Library("symm_mem", "IMPL")
    library.impl("fused_all_gather_matmul", gather_matmul, "CPU")
    library.impl("fused_matmul_reduce_scatter", matmul_scatter, "CPU")
    library.impl("one_shot_all_reduce", summed, "CPU")
    library.impl("two_shot_all_reduce_", summed_in_place, "CPU")
    library.impl("multimem_all_reduce_", summed_in_place, "CPU")
    there = backend.Backend("symmetric", "acted")
    with (
        mock.patch.dict(backend._BACKENDS, symmetric=there),
        mock.patch.object(memory, "get_symm_mem_workspace", return_value=Workspace()),
        mock.patch.object(fusers.exchanges.symmetric, "has_multicast", return_value=True),
        mock.patch.dict("os.environ", LOCAL_WORLD_SIZE=str(dist.get_world_size())),
    ):
        config.touch()
        yield
    config.touch()
    library._destroy()


def mlp(order: tuple[str, ...], device: str, sequence_parallel: bool, **asked: Any) -> nn.Module:
    torch.manual_seed(0)
    split = dict(sequence_parallel=sequence_parallel, device=device, **asked)
    return og.Sequential(
        Linear(16, 96, tensor_parallel_mode="column", **split),
        SwiGLU(),
        Linear(48, 16, tensor_parallel_mode="row", **split),
        backends=order,
    )


def compare(device: str, sequence_parallel: bool, **asked: Any) -> set[str]:
    """The steps over symmetric memory that were taken; their results are the reference's."""
    ours = mlp(("symmetric", "reference"), device, sequence_parallel, **asked)
    plain = mlp(("reference",), device, sequence_parallel)
    x, dy = torch.randn(2, 64, 16, device=device)
    dy = dy[:, :1].expand_as(dy)  # as the gradient of a sum is
    found = []
    for module in (ours, plain, ours):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        more = torch.autograd.grad(y, [leaf, *module.parameters()], dy)
        found.append([y.detach(), *more])
    for one, other, repeated in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(repeated, one)
    with torch.no_grad():
        assert ours(x[:0]).shape == (0, 16)
    plan = ours.plan(x=x)
    return {s.name for s in (*plan.forward, *plan.backward) if s.backend == "symmetric"}


def all_fusers(device: str, multicast: bool) -> None:
    assert compare(device, True) == set(), "taken though nobody asked"
    assert compare(device, True, overlap=FLAGS) == {
        "SymmetricGatherLinear",
        "SymmetricGatherLinearBackward",
        "SymmetricLinearScatter",
        "SymmetricLinearScatterBackward",
    }
    for flag, taken in (
        ("ub_overlap_ag", {"SymmetricGatherLinear", "SymmetricLinearScatterBackward"}),
        ("ub_overlap_rs", {"SymmetricLinearScatter"}),
        ("ub_overlap_rs_dgrad", {"SymmetricGatherLinearBackward"}),
        ("ub_bulk_wgrad", set()),
    ):
        assert compare(device, True, overlap=(flag,)) == taken
    for how in ALL_REDUCES:
        taken = {"SymmetricLinearAllReduce"} if multicast or "multimem" not in how else set()
        assert compare(device, False, symmetric_ar_type=how) == taken


def on_cpu(rank: int, size: int) -> None:
    with acted():
        all_fusers("cpu", multicast=True)


def test_every_fuser_is_taken_where_it_is_asked_for(ranks: Ranks) -> None:
    ranks.run(on_cpu, 2)


def on_gpu(rank: int, size: int) -> None:
    torch.cuda.set_device(rank)
    all_fusers(f"cuda:{rank}", symmetric.has_multicast(torch.device("cuda", rank)))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_symmetric_memory(ranks: Ranks) -> None:
    ranks.run(on_gpu, 2, timeout=240)


def refusals(rank: int, size: int) -> None:
    with acted():
        module = mlp(("symmetric", "reference"), "cpu", True, overlap=("ub_overlap_ag",))
        told = {(r.name, r.reason) for r in module.plan().rejected}
        assert ("SymmetricLinearScatter", "it takes ub_overlap_rs, which is off") in told
        with mock.patch.dict("os.environ", LOCAL_WORLD_SIZE="1"):
            config.touch()
            module = mlp(("symmetric", "reference"), "cpu", True, overlap=FLAGS)
            reasons = {r.reason for r in module.plan().rejected}
            assert "its group of 2 ranks is more than the 1 of this node" in reasons
        module = mlp(("symmetric", "reference"), "cpu", True, overlap=FLAGS, dtype=torch.float64)
        told = {r.reason for r in module.plan().rejected}
        assert "SymmetricLinearScatter takes float32, float16 and bfloat16, not float64" in told
        split = dict(tensor_parallel_mode="row", symmetric_ar_type="one_shot")
        odd = Linear(16, 15, dtype=torch.bfloat16, **split)
        plan = og.Sequential(odd, backends=("symmetric", "reference")).plan()
        assert "whole 4 bytes" in " ".join(r.reason for r in plan.rejected)
        linear = Linear(16, 32, overlap=FLAGS)
        gathered = og.Sequential(AllGather(), Tee(), linear, backends=("symmetric", "reference"))
        assert "added before" in " ".join(r.reason for r in gathered.plan().rejected)


def test_what_is_refused_is_told(ranks: Ranks) -> None:
    ranks.run(refusals, 2)


def test_an_absent_backend_is_told_where_it_could_serve() -> None:
    order = ("symmetric", "reference")
    plan = og.Sequential(AllGather(), BasicLinear(8, 8), backends=order).plan()
    if not torch.cuda.is_available():
        reason = "no CUDA device, whose memory other ranks could read"
        assert ("symmetric", reason) in {(r.name, r.reason) for r in plan.rejected}
    plain = og.Sequential(BasicLinear(8, 8), backends=order).plan()
    assert "symmetric" not in {r.name for r in plain.rejected}
