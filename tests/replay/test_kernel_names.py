"""What a training step launches on a GPU: kernels and products of ours, none of PyTorch's ops.

cublasLt clears counters of its own before some of its kernels: that is a `Memset`.
"""

from typing import Any

import pytest
import recipe_cases
import torch
from torch.profiler import ProfilerActivity, profile

import opsgraph as og

pytestmark = pytest.mark.gpu

RECIPES: dict[str, Any] = {
    "bf16": None,
    **{name: recipe_cases.RECIPES[name] for name in ("current", "rows", "delayed", "blocks")},
}


@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("name", RECIPES)
def test_no_elementwise_kernel_of_pytorch(name: str, biases: bool) -> None:
    recipe, width = RECIPES[name], 512
    module = og.Sequential(
        og.ops.RMSNorm(width), og.ops.Linear(width, 2 * width, bias=biases), og.ops.SwiGLU(),
        og.ops.Linear(width, width, bias=biases), device="cuda", dtype=torch.bfloat16,
    )  # fmt: skip
    x = torch.randn(512, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)

    def step() -> None:
        with og.autocast(enabled=recipe is not None, recipe=recipe):
            y = module(x)
        torch.autograd.grad(y, [x, *module.parameters()], dy)

    for _ in range(4):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step()
        torch.cuda.synchronize()
    names = {
        event.name for event in profiler.events() if event.device_type.name == "CUDA"
        and not event.name.startswith("opsgraph ")
    }  # fmt: skip
    assert names
    foreign = [name for name in names if "at::native" in name or name.startswith("Memcpy")]
    assert not foreign, "\n".join(foreign)
    if name != "rows":  # whose products alone still have scales inverted for them
        assert not [kernel for kernel in names if "inverse_kernel" in kernel]
