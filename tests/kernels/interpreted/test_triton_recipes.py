"""Fusers that absorb quantization give the bits of the same kernels one after the other."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import opsgraph as og
from opsgraph.fusers.cublaslt import products as cublaslt
from opsgraph.fusers.triton import quantize as triton_quantize
from opsgraph.ops import Add, LayerNorm, Linear, RMSNorm, SwiGLU, Tee
from opsgraph.precision import recipe as r
from opsgraph.quantizers import Quantizer

RECIPES = {
    "current": r.Float8CurrentScaling(),
    "rows": r.Float8CurrentScaling(row_wise=True),
    "delayed": r.DelayedScaling(amax_history_len=2),
    "blocks": r.Float8BlockScaling(),
    "mx": r.MXFP8BlockScaling(),
    "dequantized": r.MXFP8BlockScaling(backward_override="dequantized"),
}
ALONE = (
    "QuantizeKernel", "QuantizeGradKernel", "NormKernel", "NormBackward",
    "ActivationKernel", "ActivationBackward",
    "ScaledLinear", "ScaledLinearBackward",
)  # fmt: skip


def block(norm: type[og.Op], device: str, **options: object) -> og.Sequential:
    torch.manual_seed(0)
    return og.Sequential(
        Add(), Tee("r"), norm(64), Linear(64, 512), SwiGLU(), Linear(256, 64, bias=False), Add("r"),
        device=device, dtype=torch.bfloat16,
        backends=("triton", "cublaslt", "reference"), **options,
    )  # fmt: skip


def results(module: og.Sequential, recipe: r.Recipe, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    with og.autocast(recipe=recipe):
        y = module(x, 2 * x)
    leaves = [x, *module.parameters()]
    return [y, *torch.autograd.grad(y, leaves, y.detach().flip(0)), *module.buffers()]


def refuse(*_: object) -> None:
    raise AssertionError("the reference was called")


@pytest.mark.sampled(4)
@pytest.mark.parametrize(
    ("norm", "name"), [*((RMSNorm, name) for name in RECIPES), (LayerNorm, "mx")]
)
def test_fused_quantization_gives_the_same_bits(
    norm: type[og.Op], name: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are quantized by the kernels too, outside of the plan."""
    fused, alone = block(norm, device), block(norm, device, fusers=ALONE)
    recipe = replace(RECIPES[name])
    with og.autocast(recipe=recipe):
        plan = fused.plan()
    names = {step.name for step in (*plan.forward, *plan.backward)}
    assert {"NormQuantize", "ActivationQuantize"} <= names
    absorbs = recipe.backward_override is None and name != "rows"
    absorbing = {"ActivationBackwardQuantize", "ActivationLinearBackwardQuantize"}
    assert bool(absorbing & names) == absorbs
    assert "NormQuantize.again(" in plan.backward_source  # from its statistics
    x = torch.randn(40, 64, device=device).bfloat16()
    monkeypatch.setattr(Quantizer, "__call__", refuse)
    # One context: delayed scales change when it ends, of both modules at once.
    with og.autocast(recipe=recipe):
        found, expected = results(fused, recipe, x), results(alone, recipe, x)
    assert all(map(torch.equal, found, expected))


def test_check_compares_quantized_steps(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSGRAPH_CHECK", "1")
    module, x = block(RMSNorm, device), torch.randn(8, 64, device=device).bfloat16()
    with og.autocast(recipe=RECIPES["current"]):
        source = module.plan().forward_source
    assert "check('forward 0-q3 NormQuantize (triton)', 'xq3', xq3, ref_xq3)" in source
    results(module, RECIPES["current"], x)
    original = triton_quantize.as_quantized

    def wrong(*args: object) -> object:
        made = original(*args)
        return made._replace(row=made.row._replace(inverse=2 * made.row.inverse))

    monkeypatch.setattr(triton_quantize, "as_quantized", wrong)
    with pytest.raises(og.OpsgraphError, match=r"NormQuantize .*: xq3, quantized, differs"):
        results(module, RECIPES["current"], x)


def test_nvfp4_is_the_references(device: str) -> None:
    """Quantizing kernels alone: equal inputs, equal seeds, equal bits."""
    recipe = r.NVFP4BlockScaling()
    with og.autocast(recipe=recipe):
        plan = block(RMSNorm, device).plan()
    names = {step.name for step in (*plan.forward, *plan.backward)}
    assert {"NormQuantize", "ActivationQuantize", "ActivationBackwardQuantize"} <= names
    x, found = torch.randn(40, 64, device=device).bfloat16(), []
    for fusers in (("QuantizeKernel", "QuantizeGradKernel"), ()):
        module = block(RMSNorm, device, fusers=fusers)
        torch.manual_seed(5)
        found.append(results(module, recipe, x))
    assert all(map(torch.equal, *found))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("multiplied", [False, True])
def test_nvfp4_fused_gives_the_same_bits(
    multiplied: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """multiplied: as on a chip whose units multiply NVFP4, so that GEMMs are fused too."""
    if multiplied:
        if device == "cuda":
            pytest.skip("products are the units' there, if there are any")
        monkeypatch.setattr(cublaslt.Family, "why_not", lambda family: None)
    monkeypatch.setattr(Quantizer, "__call__", refuse)
    recipe, found = r.NVFP4BlockScaling(), []
    x = torch.randn(40, 64, device=device).bfloat16()
    for fusers in (None, ALONE):
        module = block(RMSNorm, device, **({} if fusers is None else {"fusers": fusers}))
        with og.autocast(recipe=recipe):
            names = {step.name for step in module.plan().backward}
        linear = "Linear" if multiplied else ""
        assert (f"Activation{linear}BackwardQuantize" in names) == (fusers is None)
        torch.manual_seed(5)
        found.append(results(module, recipe, x))
    assert all(map(torch.equal, *found))
