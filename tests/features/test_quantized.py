"""The function of a plan that quantizes weights: its text, and that nothing is chosen in a call."""

from typing import Any

import pytest
import torch

import opsgraph as og
from opsgraph.fusers import quantizing
from opsgraph.ops import Linear

pytestmark = pytest.mark.usefixtures("without_cpu_backend")


def test_a_plan_without_quantized_weights_has_none() -> None:
    plan = og.Sequential(Linear(32, 32)).plan()
    assert plan.prepare_source == ""
    assert plan.functions.prepare.call() == ((), ())


def test_one_bound_function_for_weights_of_one_kind() -> None:
    module = og.Sequential(Linear(32, 64, bias=False), Linear(64, 32, bias=False))
    with og.autocast(recipe=og.recipe.MXFP8BlockScaling()):
        source = module.plan(training=True).prepare_source
        inference = module.plan(training=False).prepare_source
    assert source.splitlines()[0] == "def prepare(weight0, weight1):"
    assert source.count("= MXE4M3_row_col(weight") == 2
    assert inference.count("= MXE4M3_row(weight") == 2


def test_delayed_scales_are_arguments_and_amaxes_results() -> None:
    module = og.Sequential(Linear(32, 64, bias=False))
    with og.autocast(recipe=og.recipe.DelayedScaling()):
        plan = module.plan()
    assert plan.prepare_source.startswith("def prepare(weight0, weight0_scale):")
    weight = torch.randn(64, 32)
    parts, (amax,) = plan.functions.prepare.call(weight, torch.tensor(2.0))
    assert amax == weight.abs().max()
    assert len(parts) == plan.specs.prepared[0].parts == 3


def test_calls_choose_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = og.Sequential(Linear(32, 64)), torch.randn(4, 32)
    with og.autocast(recipe=og.recipe.Float8CurrentScaling()):
        y = module(x)
        monkeypatch.setattr(quantizing, "_chosen", None)
        assert torch.equal(module(x), y)


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [og.recipe.Float8CurrentScaling, og.recipe.DelayedScaling])
def test_on_a_gpu_no_backward_transposes_weights(
    recipe: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product reads operands by rows: kernels write both copies when weights are quantized.

    Without the library products are emulated: their sums are converted, which is a copy.
    """
    monkeypatch.setenv("OPSGRAPH_BACKENDS", "triton,cublaslt,aten,reference")
    options: Any = dict(bias=False, device="cuda", dtype=torch.bfloat16)
    module = og.Sequential(Linear(64, 128, **options), Linear(128, 64, **options))
    with og.autocast(recipe=recipe()):
        plan, inference = module.plan(training=True), module.plan(training=False)
        x = torch.randn(32, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = module(x)
    assert "_row_col(weight" in plan.prepare_source
    assert "_row(weight" in inference.prepare_source
    scale = [torch.tensor(2.0, device="cuda")] if plan.specs.reports else []
    weights = [p.detach() for p in module.parameters()]
    parts, _ = plan.functions.prepare.call(*weights, *scale * 2)
    rows, cols = parts[0], parts[3]
    assert torch.equal(rows.view(torch.uint8), cols.view(torch.uint8))
    assert rows.is_contiguous()
    assert cols.t().is_contiguous()
    with torch.profiler.profile() as profile:
        y.backward(torch.ones_like(y))
    assert not [event.key for event in profile.key_averages() if "aten::copy_" in event.key]
