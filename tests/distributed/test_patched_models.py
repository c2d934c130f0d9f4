"""Patched models under DDP and FSDP2 train as before, with the same keys of their state."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from opsgraph.integrations.transformers import patch
from opsgraph.integrations.transformers.deferred import Deferred
from opsgraph.testing.distributed import Ranks
from tests.integrations.test_patch import Gated, H, Model

STEPS = 4
"""The later ones are replayed."""


def whole(x: Tensor) -> Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def wrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    if how != "whole":
        for layer in model.layers if how == "layers" else [m.mlp for m in model.layers]:
            fully_shard(layer)
    return fully_shard(model)


def trained(model: nn.Module, module: nn.Module, x: Tensor) -> tuple[list[str], list[Tensor]]:
    """Keys of the state, and parameters after some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(STEPS):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    return list(model.state_dict()), [whole(p.detach()) for p in model.parameters()]


def body(rank: int, size: int, how: str) -> tuple[int, int]:
    """How many plans ran while a model was trained as part of a wrapped one."""
    init_device_mesh("cpu", (size,))
    x = torch.randn(2 * size, 5, H, generator=torch.Generator().manual_seed(1))
    plain, runs = Model(), [0]
    model = copy.deepcopy(plain)
    report = patch(model, {"x": x})
    assert any("Linear(gate, up)" in row.found for row in report.rows)
    module = wrapped(model, how)
    run = Gated.forward

    def counted(self: Any, x: Any) -> Any:
        runs[0] += type(x) is Deferred
        return run(self, x)

    Gated.forward = counted  # type: ignore[method-assign]
    try:
        keys, found = trained(model, module, x[2 * rank : 2 * rank + 2])
    finally:
        Gated.forward = run  # type: ignore[method-assign]
    expected_keys, expected = trained(plain, plain, x)
    assert keys == expected_keys
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    return runs[0], len(model.layers) * STEPS


@pytest.mark.parametrize("how", ["ddp", "layers", "whole", "parts"])
def test_a_patched_model_trains_as_before(ranks: Ranks, how: str) -> None:
    for ran, most in ranks.run(body, 2, how, timeout=300):
        # FSDP's hooks on a part come after patching, so its modules run as they are.
        assert ran == (0 if how == "parts" else most)
