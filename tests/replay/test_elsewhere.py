"""Backwards whose weight gradients go elsewhere are replayed but for the lines that make those."""

import pytest
import torch

import opsgraph as og
from opsgraph.kernels.cpu import build as library
from opsgraph.ops import Linear, RMSNorm, SwiGLU

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")


def _with_main_grad(settings):
    torch.manual_seed(0)
    model = og.Sequential(
        RMSNorm(32), Linear(32, 64, bias=False, **settings), SwiGLU(), Linear(32, 32, **settings),
        dtype=torch.bfloat16, backends=("reference",),
    )  # fmt: skip
    for parameter in model.parameters():
        parameter.main_grad = torch.zeros(parameter.shape, dtype=torch.float32)
    return model


@pytest.mark.parametrize("settings", [
    {"accumulate_into_main_grad": True},
    {"delay_wgrad_compute": True},
    {"accumulate_into_main_grad": True, "delay_wgrad_compute": True},
])  # fmt: skip
def test_the_bits_are_those_of_python(settings, monkeypatch):
    """The lines that make those stay in Python: the first calls ask for none, later ones do."""
    inputs = [torch.randn(8, 32, dtype=torch.bfloat16, requires_grad=True) for _ in range(7)]
    results = {}
    for on in "01":
        monkeypatch.setenv("OPSGRAPH_REPLAY", on)
        model, results[on] = _with_main_grad(settings), []
        for k, x in enumerate(inputs):
            x.grad = None
            model(x).sum().backward(inputs=[x] if k in (0, 1, 5) else None)
            if k in (3, 6) and "delay_wgrad_compute" in settings:
                model.backward_dw()
            held = [t for p in model.parameters() for t in (p.grad, p.main_grad) if t is not None]
            results[on] += [x.grad, *[t.clone() for t in held]]
        (plan,) = model._stages[0].plans.values()
        told = " ".join(getattr(plan.passes.backward, "told", list)())
        in_part = "native call" in told and ("wgrad in Python" in told or "weigh in" in told)
        assert in_part == (on == "1")
    assert len(results["0"]) == len(results["1"])
    for without, replayed in zip(results["0"], results["1"], strict=True):
        assert torch.equal(without, replayed)
