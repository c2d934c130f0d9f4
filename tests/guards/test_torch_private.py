"""Names of PyTorch that are not public: which there are, and that their fallbacks work."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import opsgraph as og
from opsgraph.guards import torch_private

SEEN = ("2.9", "2.11", "2.13", "2.14", "2.15")
"""Versions in which all of these names are."""
NAMES = [
    "_C._functorch.unwrap_if_dead",
    "_C._are_functorch_transforms_active",
    "_C._functorch.peek_interpreter_stack",
    "_C._len_torch_dispatch_stack",
    "_C._is_tracing",
    "_C._get_tracing_state",
    "_C._set_tracing_state",
    "_C._has_storage",
    "_C._storage_Use_Count",
    "_C._dynamo.guards._torchinductor_pyobject_tensor_data_ptr",
    "_C._dynamo.guards._reinterpret_tensor",
    "_C._current_graph_task_id",
    "_C._autograd._top_saved_tensors_default_hooks",
    "_C._is_fwd_grad_enabled",
    "_C._will_engine_execute_node",
    "autograd.forward_ad._current_level",
]
AT_USE = [
    "_C._distributed_c10d._resolve_process_group",
    "Tensor._backward_hooks",
    "Tensor._post_accumulate_grad_hooks",
    "nn.parallel.DistributedDataParallel._active_ddp_module",
    "ops.mkldnn._is_mkldnn_bf16_supported",
    "cpu._is_avx512_bf16_supported",
    "cpu._is_amx_tile_supported",
]
"""Those that matter to what few users do; without them it is an error, or it goes unnoticed."""


@pytest.mark.parametrize("name", NAMES + AT_USE)
def test_a_private_name_is_there(name: str) -> None:
    found = torch
    for part in name.split("."):
        assert hasattr(found, part), f"PyTorch {torch.__version__}; {SEEN} have it"
        found = getattr(found, part)


def test_what_they_tell() -> None:
    x, seen = torch.randn(3), list[bool]()
    assert not torch_private.followed()

    def look(x: Tensor) -> Tensor:
        seen.append(torch_private.followed())
        return x.sum()

    torch.func.grad(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    with forward_ad.dual_level():
        look(x)
    assert seen == [True, True, True]
    assert torch_private.graph_task() == -1
    y = x.requires_grad_().sum()
    y.register_hook(lambda _: seen.append(torch_private.graph_task() != -1))
    y.backward()
    assert seen[-1]


def test_a_pytorch_without_them_is_served_too() -> None:
    program = f"""
import torch
for name in {NAMES!r}:
    owner = torch
    *parts, last = name.split(".")
    for part in parts:
        owner = getattr(owner, part)
    if last not in {{"_is_tracing", "_get_tracing_state", "_current_graph_task_id",
                    "_current_level",
                    "_are_functorch_transforms_active", "_len_torch_dispatch_stack"}}:
        delattr(owner, last)  # the others PyTorch itself reads
import opsgraph as og
module = og.LayerNormMLP(6, 8, device="cpu")
module(torch.randn(2, 6, requires_grad=True)).sum().backward()
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_hooks_of_a_leaf_are_those_that_autograd_calls() -> None:
    leaf, seen = nn.Parameter(torch.ones(2)), list[str]()
    assert torch_private.gradient_hooks(leaf) == ([], [])
    leaf.register_hook(lambda _: seen.append("before"))
    leaf.register_post_accumulate_grad_hook(lambda _: seen.append("after"))
    for hooks in torch_private.gradient_hooks(leaf):
        for hook in hooks:
            hook(leaf)
    leaf.sum().backward()
    assert seen == ["before", "after"] * 2
    assert torch_private.averaged_parameters() is None


def test_dead_wrappers_stand_for_their_tensors() -> None:
    module, left = og.Sequential(og.ops.Linear(6, 6)), list[Tensor]()
    torch.func.grad(lambda t: left.append(t) or t.sum())(x := torch.randn(2, 6))
    expected = nn.functional.linear(x, module[0].weight, module[0].bias)
    torch.testing.assert_close(module(left[0]), expected)
