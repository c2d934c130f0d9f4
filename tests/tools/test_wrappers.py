"""Libraries that wrap modules, put hooks on them, or look inside."""

from collections import OrderedDict
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


def test_accelerate_dispatches_ops_one_by_one(x: Tensor, tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(sequence(), nn.Linear(WIDTH, 4))
    expected = model(x).detach()
    places = {"0.0": "cpu", "0.1": "disk", "0.2": "cpu", "0.3": "cpu", "1": "cpu"}
    dispatched = accelerate.dispatch_model(
        model, device_map=places, main_device="cpu", offload_dir=str(tmp_path)
    )
    torch.testing.assert_close(dispatched(x).detach(), expected)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true"])
def test_fabric(precision: Any, x: Tensor) -> None:
    fabric = pytest.importorskip("lightning_fabric").Fabric(
        accelerator="cpu", devices=1, precision=precision
    )
    found = []
    for one in (sequence(), plain()):
        module, optimizer = fabric.setup(one, torch.optim.SGD(one.parameters(), 0.1))
        for _ in range(2):
            optimizer.zero_grad()
            y = module(x)
            fabric.backward(y.square().mean())
            optimizer.step()
        found.append([y.detach(), *(p.detach() for p in one.parameters())])
    tolerance = {} if precision in ("32-true", "64-true") else {"rtol": 2e-2, "atol": 1e-2}
    torch.testing.assert_close(*found, **tolerance)


def test_peft_knows_the_classes_of_torch_nn(x: Tensor) -> None:
    """By name they are an error; "all-linear" leaves them out, without a word."""
    peft = pytest.importorskip("peft")

    def made() -> nn.Module:
        layers = {"first": nn.Linear(WIDTH, WIDTH), "mlp": sequence()}
        return nn.Sequential(OrderedDict(layers))

    def adapted(**options: Any) -> set[str]:
        model = made()
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
        model(x).sum().backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        return {name.partition("model.")[2].partition(".lora")[0] for name in trained}

    assert adapted(target_modules="all-linear") == {"model.first"}
    with pytest.raises(ValueError, match="is not supported"):
        adapted(target_modules=["mlp.1"])
    assert adapted(target_modules=[], target_parameters=["mlp.1.weight"]) == {"model.mlp.1"}
    config = peft.LoraConfig(r=4, target_modules=["mlp.1"])
    config._register_custom_module({type(sequence()[1]): peft.tuners.lora.Linear})
    model = peft.get_peft_model(made(), config)
    model(x).sum().backward()
    assert model.base_model.model.mlp[1].lora_B["default"].weight.grad is not None


def test_torchao_quantizes_what_a_filter_names(x: Tensor) -> None:
    ao = pytest.importorskip("torchao.quantization")
    ours, theirs = sequence(), plain()
    before = ours(x).detach()
    ao.quantize_(ours, ao.Int8WeightOnlyConfig())
    assert type(ours[1].weight) is nn.Parameter  # left out, without a word
    found = []
    for one in (ours, theirs):
        linear = type(one[1])
        ao.quantize_(one, ao.Int8WeightOnlyConfig(), lambda m, _, kind=linear: type(m) is kind)
        with torch.no_grad():
            found.append(one(x))
    assert not torch.equal(found[0], before)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="Int8Tensor"):
        ours(x.clone().requires_grad_()).sum().backward()
