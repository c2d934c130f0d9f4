"""Every launch configuration that kernels offer computes the same as the usual one."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from kernel_checks import INTERPRETING, normal
from torch import Tensor

import opsgraph as og
from opsgraph.features import measured
from opsgraph.kernels import configs
from opsgraph.kernels.choices import Choices
from opsgraph.kernels.configs import asked, text
from opsgraph.kernels.formats import Format
from opsgraph.kernels.triton.activations import activation_backward, activation_forward
from opsgraph.kernels.triton.norms import norm_backward, norm_forward
from opsgraph.kernels.triton.quantize import activation_quantize, quantize
from opsgraph.kernels.triton.quantize_backward import activation_backward_quantize
from opsgraph.kernels.triton.quantize_norms import norm_quantize
from opsgraph.ops import Linear, RMSNorm, SwiGLU
from opsgraph.recipe import DelayedScaling
from opsgraph.tune.measure import tune

ROWS, WIDTH = (33, 96) if INTERPRETING else (1000, 4096)
TENSOR, BLOCKS = Format("tensor"), Format("blocks")
BOTH = ("row", "col", "amax")


def calls(device: str) -> dict[str, Callable[[], Any]]:
    shape = ROWS, WIDTH
    x, dy, weights = (normal(*shape, dtype=torch.float32, device=device, seed=s) for s in range(3))
    weight, half = weights[0], dy[:, : WIDTH // 2]
    rstd = x.square().mean(1, keepdim=True).rsqrt()
    every = ("x", "y", "bias")
    return {
        "norm_forward": partial(norm_forward, x, weight, None, 1e-5),
        "norm_backward": partial(norm_backward, dy, x, None, rstd, weight),
        "norm_quantize": partial(norm_quantize, x, weight, None, 1e-5, BLOCKS),
        "activation_forward": partial(activation_forward, x, "swiglu"),
        "activation_backward": partial(activation_backward, half, x, "swiglu", want=every),
        "quantize": partial(quantize, x, TENSOR, want=BOTH),
        "quantize, rows": partial(quantize, x, TENSOR, want=("row",)),
        "activation_quantize": partial(activation_quantize, x, "silu", BLOCKS, want=("row",)),
        "activation_backward_quantize": partial(
            activation_backward_quantize, dy, x, "silu", TENSOR, want=BOTH, y_want=("row",),
            dbias=torch.float32,
        ),
    }  # fmt: skip


NAMES = list(calls("cpu"))


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result.view(torch.uint8) if result.dtype.itemsize == 1 else result]
    return [t for part in result if part is not None for t in tensors(part)]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMES)
def test_every_configuration_computes_the_same(
    name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "_chosen", {})
    monkeypatch.setattr(configs, "choices", lambda: None)  # whatever was measured here
    run = calls(device)[name]
    with asked() as found:
        expected = tensors(run())
    assert found, "it asks for none"
    for where, offered in found.items():
        assert len(offered) > 1
        assert len({text(config.items()) for config in offered}) == len(offered)
        for config in offered[1:]:
            configs._chosen[where] = config
            made = tensors(run())
            for one, other in zip(made, expected, strict=True):
                if one.dtype == torch.uint8 and "norm" not in name:
                    assert torch.equal(one, other), (where, config)
                else:
                    torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5, equal_nan=True)
            del configs._chosen[where]


@pytest.mark.skipif(not INTERPRETING, reason="tests/tune tunes on a GPU")
@pytest.mark.parametrize("recipe", [None, DelayedScaling])
def test_tuning_measures_the_configurations_of_a_plans_kernels(
    recipe: type | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = Choices("launch", tuple, lambda runs: [*runs][-1], list)
    monkeypatch.setattr(configs, "choices", lambda: last)
    monkeypatch.setattr(configs, "_chosen", {})
    monkeypatch.setattr(measured, "plans", lambda device: None)
    module = og.Sequential(
        RMSNorm(32), Linear(32, 64, bias=False), SwiGLU(), Linear(32, 32, bias=False),
        backends=("triton", "reference"), dtype=torch.float32,
    )  # fmt: skip
    tune(module, [16], context=partial(og.autocast, recipe=recipe()) if recipe else ExitStack)
    names = {key.partition(" ")[0] for key in last.all()}
    kernels = {"norm_forward", "norm_backward"}
    assert names >= kernels | ({"quantize"} if recipe else {"activation_forward"})
    assert all(choice.name != choice.usual for choice in last.all().values())
