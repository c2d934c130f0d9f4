"""Exports: ONNX by both exporters, AOTInductor's packages, TensorBoard's graph."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import LayerNorm, Linear, ReLU

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def _run(model: Any, x: Tensor) -> Tensor:
    evaluator = pytest.importorskip("onnx.reference").ReferenceEvaluator(model)
    return torch.tensor(evaluator.run(None, {model.graph.input[0].name: x.numpy()})[0])


@pytest.mark.slow
def test_onnx(module: nn.Module, x: Tensor) -> None:
    pytest.importorskip("onnxscript")
    exported = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    torch.testing.assert_close(_run(exported.model_proto, x), module(x).detach())


def test_the_old_onnx_exporter(x: Tensor) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    module, file = og.Sequential(LayerNorm(32), Linear(32, 16), ReLU()), io.BytesIO()
    torch.onnx.export(module, (x,), file, dynamo=False)
    model = onnx.load_model_from_string(file.getvalue())
    torch.testing.assert_close(_run(model, x), module(x).detach())


def test_the_old_onnx_exporter_knows_no_rmsnorm(module: nn.Module, x: Tensor) -> None:
    """As of nn.RMSNorm's: its error names the op."""
    pytest.importorskip("onnxscript")
    with pytest.raises(torch.onnx.errors.UnsupportedOperatorError, match="rms_norm"):
        torch.onnx.export(module, (x,), io.BytesIO(), dynamo=False)


@pytest.mark.slow
def test_a_package_of_aotinductor_in_another_process(
    module: nn.Module, x: Tensor, tmp_path: Path
) -> None:
    package, results = tmp_path / "model.pt2", tmp_path / "results.pt"
    with torch.no_grad():
        exported = torch.export.export(module.eval(), (x,))
        torch._inductor.aoti_compile_and_package(exported, package_path=str(package))
        torch.save((x, module(x)), results)
    source = f"""
import sys, torch
x, y = torch.load({str(results)!r})
torch.testing.assert_close(torch._inductor.aoti_load_package({str(package)!r})(x), y)
assert "opsgraph" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", source], check=True, timeout=300)


def test_tensorboard(module: nn.Module, x: Tensor, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        writer.add_graph(module, x)
    assert any(tmp_path.iterdir())


def test_torch_fx_is_told_of_leaves(module: nn.Module, x: Tensor) -> None:
    with pytest.raises(
        og.OpError, match=r"torch\.fx Proxy.*a torch\.fx\.Tracer has to call .* leaf"
    ):
        torch.fx.symbolic_trace(module)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, one: nn.Module, name: str) -> bool:
            return one is module or super().is_leaf_module(one, name)

    model = nn.Sequential(module, nn.ReLU())
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    torch.testing.assert_close(traced(x), model(x))
