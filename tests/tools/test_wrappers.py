"""Libraries that wrap modules, put hooks on them, or look inside."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tool_blocks import WIDTH, plain, sequence
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def test_captum(x: Tensor) -> None:
    attr = pytest.importorskip("captum.attr")
    found = []
    for one in (sequence(), plain()):
        found.append(
            [
                attr.IntegratedGradients(one).attribute(x, target=0),
                attr.LayerActivation(one, one[1]).attribute(x),
                attr.LayerGradientXActivation(one, one[1]).attribute(x, target=0),
            ]
        )
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5, check_dtype=False)


@pytest.mark.filterwarnings("ignore")
def test_opacus(module: nn.Module, x: Tensor) -> None:
    wrap = pytest.importorskip("opacus").GradSampleModule
    found: list[Any] = []
    for one in (module, plain()):
        wrapped = wrap(one)
        wrapped(x).sum().backward()
        found.append([p.grad_sample for p in one.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_opacus_trains_in_private(module: nn.Module) -> None:
    """Without noise: each sample's gradient is clipped, so all of them have to be right."""
    engine = pytest.importorskip("opacus").PrivacyEngine
    rows = torch.randn(24, WIDTH, generator=torch.Generator().manual_seed(2))
    loader = DataLoader(TensorDataset(rows, rows.flip(0)), batch_size=8)
    found = []
    for one in (module, plain()):
        private, optimizer, batches = engine().make_private(
            module=one, optimizer=torch.optim.SGD(one.parameters(), 0.1), data_loader=loader,
            noise_multiplier=0.0, max_grad_norm=0.5, poisson_sampling=False,
        )  # fmt: skip
        for x, y in batches:
            optimizer.zero_grad()
            (private(x) - y).square().mean().backward()
            optimizer.step()
        found.append([p.detach() for p in one.parameters()])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def test_offload_by_accelerate(module: nn.Module, x: Tensor, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = module(x).detach()
    accelerate.cpu_offload(module, execution_device="cpu")
    assert all(p.is_meta for p in module.parameters())
    torch.testing.assert_close(module(x).detach(), expected)
    if not isinstance(module, nn.Sequential):
        return
    other = sequence()
    accelerate.disk_offload(other, str(tmp_path), execution_device="cpu")
    torch.testing.assert_close(other(x).detach(), expected)


def test_safetensors(module: nn.Module, x: Tensor, tmp_path: Path) -> None:
    files = pytest.importorskip("safetensors.torch")
    files.save_model(module, str(tmp_path / "model"))
    expected = module(x).detach()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    files.load_model(module, str(tmp_path / "model"))
    assert torch.equal(module(x).detach(), expected)


def test_torchviz(module: nn.Module, x: Tensor) -> None:
    graph = pytest.importorskip("torchviz").make_dot(module(x), dict(module.named_parameters()))
    assert "PlanFunctionBackward" in "".join(graph.body)


def test_input_by_name(x: Tensor) -> None:
    assert torch.equal(sequence()(input=x), sequence()(x))
