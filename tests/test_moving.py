"""TransformerEngine's names and arguments, 2.20's: each is taken, and a hint changes nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import opsgraph as og
from opsgraph import ops

HINTS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "LayerNorm": (ops.LayerNorm, dict(sm_margin=2)),
    "RMSNorm": (ops.RMSNorm, dict(sm_margin={"forward": 1, "backward": 2, "inference": 0})),
    "L2Normalization": (ops.L2Normalization, dict(seq_length=4, micro_batch_size=2)),
    "AllReduce": (ops.AllReduce, dict(reduce_in_backward=False)),
    "BasicLinear": (
        lambda **o: ops.BasicLinear(8, 8, init_method=nn.init.ones_, **o),
        dict(userbuffers_options={"comm_name": "fc1"}),
    ),
} | {
    name: (getattr(ops, name), dict(cache_quantized_input=True))
    for name in ("GELU", "GEGLU", "GLU", "QGELU", "QGEGLU", "ReLU", "ReGLU", "SReLU", "SReGLU",
                 "SiLU", "SwiGLU", "ClampedSwiGLU", "SiTUGLU")
}  # fmt: skip
SCALED = {
    "ScaledSwiGLU": {}, "ScaledSReLU": {}, "ScaledSiTUGLU": {}, "ScaledClampedQGeGLU": {},
    "ScaledTanhSReLU": {"tanh_clamp_scale": 3.0},
}  # fmt: skip


def _results(module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    y = module(*inputs)
    return [y.detach(), *torch.autograd.grad(y.sum(), inputs)]


@pytest.mark.parametrize("build, hints", HINTS.values(), ids=HINTS)
def test_a_hint_changes_nothing(build: Callable[..., nn.Module], hints: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 8)
    for one, other in zip(_results(build(**hints), x), _results(build(), x), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name, arguments", SCALED.items(), ids=SCALED)
def test_recomputing_in_a_grouped_mlp_is_a_hint(name: str, arguments: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x, scales, kind = torch.randn(3, 8), torch.rand(3), getattr(ops, name)
    hinted = kind(activation_recompute_in_mlp=True, **arguments)
    for one, other in zip(
        _results(hinted, x, scales), _results(kind(**arguments), x, scales), strict=True
    ):
        assert torch.equal(one, other)
    with pytest.raises(og.OpError, match=rf"{name}: got activation_recompute_in_mlp="):
        kind(activation_recompute_in_mlp="yes", **arguments)


def test_scaled_tanh_srelu_has_its_second_derivative() -> None:
    x = torch.randn(3, 8, dtype=torch.double, requires_grad=True)
    scales = torch.rand(3, dtype=torch.double, requires_grad=True)
    module = og.Sequential(ops.ScaledTanhSReLU(1.5))
    assert torch.autograd.gradcheck(module, (x, scales))
    twice = og.Sequential(ops.ScaledTanhSReLU(1.5), double_backward=True)
    assert torch.autograd.gradgradcheck(twice, (x, scales))


def test_scaled_clamped_qgeglu_is_planned_as_scaled_clamped_swiglu() -> None:
    plans = [
        og.Sequential(kind(limit=2.0)).plan(x=torch.ones(3, 8))
        for kind in (ops.ScaledClampedQGeGLU, ops.ScaledClampedSwiGLU)
    ]
    assert plans[0].forward_source == plans[1].forward_source


def test_bias_takes_a_size() -> None:
    assert ops.Bias(size=8).bias.shape == (8,)
    with pytest.raises(og.OpError, match="Bias: got width=8 and size=8, expected one of them"):
        ops.Bias(8, size=8)
    alone = ops.Bias(size=8, tensor_parallel=True)
    assert alone.bias.shape == (8,)
    assert alone.bias.partition_dim == 0


def test_basic_linear_takes_the_tensor_parallel_arguments() -> None:
    """On one rank they split nothing; tests/distributed has more ranks."""

    class Tracker:
        forks = 0

        def fork(self) -> Any:
            Tracker.forks += 1
            return torch.random.fork_rng()

    x = torch.randn(3, 8)
    for mode, dim in (("column", 0), ("row", 1)):
        module = ops.BasicLinear(
            8, 4, tensor_parallel_mode=mode, sequence_parallel=True,
            rng_state_tracker_function=Tracker, accumulate_into_main_grad=False,
        )  # fmt: skip
        torch.testing.assert_close(module(x), x @ module.weight.T)
        assert (module.weight.tensor_model_parallel, module.weight.partition_dim) == (True, dim)
    assert Tracker.forks == 2
    with pytest.raises(og.OpError, match="BasicLinear: got tensor_parallel_mode='rows', expected"):
        ops.BasicLinear(8, 4, tensor_parallel_mode="rows")
