"""Wrappers that wait for gradients in the backward, and marks on parameters that they make anew."""

import copy
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import opsgraph as og
from opsgraph.ops import GroupedLinear, Linear, SwiGLU
from opsgraph.testing.distributed import Ranks


def mlp(**options: Any) -> Any:
    torch.manual_seed(0)
    return og.LayerNormMLP(8, 16, device="cpu", **options)


def averaged(rank: int, size: int) -> None:
    """DistributedDataParallel around delayed gradients: an error, or hooks that average them."""
    x = torch.randn(size, 4, 8)[rank]
    plain = DistributedDataParallel(mlp())
    plain(x).square().sum().backward()
    right = {n: p.grad for n, p in plain.module.named_parameters()}
    for options, expected in (
        ({"delay_wgrad_compute": True}, "register_wgrad_accumulation_and_reduce_hooks, with"),
        ({"fuse_wgrad_accumulation": True}, "a weight that it was told to ignore"),
    ):
        wrapped = DistributedDataParallel(mlp(**options))
        with torch.no_grad():
            wrapped(x)
        with pytest.raises(og.OpError, match=f"fc1_weight, expected {expected}"):
            wrapped(x)
    late = mlp(delay_wgrad_compute=True)
    wrapped = DistributedDataParallel(late)
    weights = [p for p in late.parameters() if getattr(p, "skip_backward_post_hook", False)]
    assert len(weights) == 2

    def average() -> None:
        for weight in weights:
            dist.all_reduce(weight.grad)
            weight.grad /= size

    late.register_wgrad_accumulation_and_reduce_hooks(average)
    wrapped(x).square().sum().backward()
    late.backward_dw()
    for name, parameter in late.named_parameters():
        torch.testing.assert_close(parameter.grad, right[name])


def ignored(rank: int, size: int) -> None:
    """Weights that DistributedDataParallel was told to ignore are another library's."""
    x = torch.randn(size, 4, 8)[rank]
    for options in ({"delay_wgrad_compute": True}, {"fuse_wgrad_accumulation": True}):
        module = mlp(**options)
        names = ["fc1_weight", "fc2_weight"]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, names)
        for name in names:
            module.get_parameter(name).main_grad = torch.zeros_like(module.get_parameter(name))
        DistributedDataParallel(module)(x).sum().backward()


def shards(rank: int, size: int) -> None:
    """FSDP2 has reduced what was there at the end of the backward: later is too late."""
    module = fully_shard(mlp(delay_wgrad_compute=True))
    module(torch.randn(4, 8)).sum().backward()
    with pytest.raises(og.OpError, match=r"backward_dw: got fc2_weight as a DTensor"):
        module.backward_dw()


def test_wrappers_miss_no_gradient(ranks: Ranks) -> None:
    for body in (averaged, ignored, shards):
        ranks.run(body, 2)


def groups(rank: int, size: int) -> None:
    """The groups of a GroupedLinear under wrappers: a parameter for each, and one for all."""
    for count, single in ((4, True), (3, True), (3, False)):
        options = {"single_grouped_weight": single, "single_grouped_bias": single}

        def make(count: int = count, options: Any = options) -> Any:
            torch.manual_seed(0)
            first, last = (
                GroupedLinear(count, 8, 16, **options),
                GroupedLinear(count, 8, 8, **options),
            )
            return og.Sequential(first, SwiGLU(), last, device="cpu")

        sizes = [12 - 2 * (count - 1)] + [2] * (count - 1)
        torch.manual_seed(1)  # the same rows on both ranks, whatever ran there before
        x, plain = torch.randn(12, 8), make()
        plain(x, sizes, sizes).square().sum().backward()
        fsdp = partial(FSDP, use_orig_params=True, device_id=torch.device("cpu"))
        for wrap in (DistributedDataParallel, fully_shard, fsdp):
            module = make()
            wrapped: Any = wrap(module)
            for _ in range(2):
                wrapped.zero_grad()
                wrapped(x, sizes, sizes).square().sum().backward()
            full = FSDP.summon_full_params(wrapped, with_grads=True)
            with full if isinstance(wrapped, FSDP) else nullcontext():
                for one, other in zip(wrapped.parameters(), plain.parameters(), strict=True):
                    gradient = one.grad
                    whole = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
                    torch.testing.assert_close(whole, other.grad)


def test_groups_under_wrappers(ranks: Ranks) -> None:
    ranks.run(groups, 2)


def summed_as_documented(parameters: Any) -> None:
    """The loop of docs/parallel.md."""
    for parameter in parameters:
        if getattr(parameter, "sequence_parallel", False):
            gradient = parameter.grad
            if hasattr(gradient, "to_local"):
                gradient = gradient.to_local()
            dist.all_reduce(gradient, group=dist.group.WORLD)


def marked(rank: int, size: int) -> None:
    """Under sequence parallelism and FSDP2 gradients are those of the whole layer."""
    whole, x = mlp(), torch.randn(2 * size, 8)
    whole(x).square().sum().backward()
    split = {"fc1_weight": 0, "fc1_bias": 0, "fc2_weight": 1}
    mesh = init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "tp"))
    module = mlp(
        tp_group=mesh["tp"].get_group(), tp_size=size, sequence_parallel=True,
        set_parallel_mode=True,
    )  # fmt: skip
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            full = whole.get_parameter(name)
            part = full.chunk(size, split[name])[rank] if name in split else full
            parameter.copy_(part)
    for make in (lambda m: m, copy.deepcopy, lambda m: fully_shard(m, mesh=mesh["dp"])):
        module = make(module)
        module.zero_grad()
        module(x.chunk(size)[rank]).square().sum().backward()
        summed_as_documented(module.parameters())
        for name, parameter in module.named_parameters():
            right = whole.get_parameter(name).grad
            right = right.chunk(size, split[name])[rank] if name in split else right
            found = parameter.grad
            found = found.full_tensor() if hasattr(found, "full_tensor") else found
            torch.testing.assert_close(found, right, msg=lambda m, n=name: f"{n}: {m}")
            assert hasattr(parameter, "partition_dim") == (name in split)
    row = fully_shard(Linear(8, 8, tensor_parallel_mode="row", sequence_parallel=True))
    assert row.bias.sequence_parallel
    assert row.weight.partition_dim == 1


def test_marks_are_there_whoever_makes_the_parameters(ranks: Ranks) -> None:
    ranks.run(marked, 2)
