"""Linear layers whose frozen weights are stored in another way: torchao's int8, and a stand-in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from saved_bytes import saved_bytes
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import GELU, Linear, LoRA, LoRALinear, RMSNorm


class Stored(Tensor):
    """int8 with a scale for each row, as torchao's Int8Tensor: it knows few operators."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> "Stored":
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def dequantize(self) -> Tensor:
        return self.codes.to(self.scale.dtype) * self.scale[:, None]

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is F.linear:
            x, weight, *bias = args
            return F.linear(x, weight.dequantize(), *bias, **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten.detach.default:
            return Stored(args[0].codes, args[0].scale)
        if function is torch.ops.aten._to_copy.default:
            return torch.empty(args[0].shape, **kwargs)
        raise NotImplementedError(f"{function} of a Stored")


def _stored(layer: nn.Linear) -> None:
    scale = layer.weight.detach().abs().amax(1) / 127
    codes = (layer.weight.detach() / scale[:, None]).round().to(torch.int8)
    layer.weight = nn.Parameter(Stored(codes, scale), requires_grad=False)


def _torchao(layer: nn.Linear) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(layer, torchao.Int8WeightOnlyConfig())


@pytest.fixture(params=[_stored, _torchao], ids=["stand-in", "torchao"])
def quantize(request: pytest.FixtureRequest) -> Callable[[nn.Linear], None]:
    """Stores a frozen layer's weight in int8."""
    made: Callable[[nn.Linear], None] = request.param
    return made


def test_a_linear_op_infers_with_such_a_weight(quantize: Callable[[nn.Linear], None]) -> None:
    """It has a product in F.linear alone: no kernel asks it for another view."""
    layer = nn.Linear(32, 48).requires_grad_(False)
    op = Linear(32, 48)
    op.weight, op.bias = layer.weight, layer.bias
    quantize(layer)
    module = og.Sequential(op, GELU())
    op.weight = layer.weight
    x = torch.randn(5, 32)
    with torch.no_grad():
        torch.testing.assert_close(module(x), F.gelu(layer(x), approximate="tanh"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_and_backward_in_the_plan(
    quantize: Callable[[nn.Linear], None], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layer, norm = nn.Linear(32, 48, dtype=dtype).requires_grad_(False), nn.RMSNorm(32, dtype=dtype)
    quantize(layer)
    eager = nn.Sequential(norm, layer, nn.GELU(approximate="tanh"))
    fused = og.Sequential(RMSNorm.of(norm), Linear.of(layer), GELU())
    x = torch.randn(9, 32, dtype=dtype, requires_grad=True)
    results = []
    for run in (fused, eager):
        y = run(x)
        results.append([y.detach(), *torch.autograd.grad(y.float().sum(), (x, norm.weight))])
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * 10)
    size = dtype.itemsize
    assert saved_bytes(lambda: fused(x)) <= 9 * (size * (32 + 48) + 4)  # no input of the product


def test_with_adapters(quantize: Callable[[nn.Linear], None]) -> None:
    torch.manual_seed(0)
    layer, branch = nn.Linear(32, 48).requires_grad_(False), LoRA(32, 48, 4)
    nn.init.normal_(branch.lora_B)
    quantize(layer)
    op, x = LoRALinear(Linear.of(layer), branch), torch.randn(9, 32, requires_grad=True)
    dense = layer.weight.dequantize()
    expected = x @ (dense + branch.lora_B @ branch.lora_A).T + layer.bias
    y = og.Sequential(op)(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    wanted = x, branch.lora_A, branch.lora_B
    torch.testing.assert_close(op.merged()(x), y, rtol=1e-4, atol=1e-4)
    both = [torch.autograd.grad(value.square().sum(), wanted) for value in (y, expected)]
    for found, right in zip(*both, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-3)


def test_pefts_layer_of_a_stored_weight(quantize: Callable[[nn.Linear], None]) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("torchao")
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU())
    quantize(model[0].requires_grad_(False))
    config = peft.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).base_model.model
    fused, x = og.Sequential(Linear.of(adapted[0]), GELU("none")), torch.randn(9, 32)
    torch.testing.assert_close(fused(x), adapted(x), rtol=1e-4, atol=1e-4)


def test_a_weight_that_trains_is_refused_nothing_else_is_changed() -> None:
    layer = nn.Linear(8, 8)
    assert type(Linear.of(layer)) is Linear
    _stored(layer)
    fused = og.Sequential(Linear.of(layer))
    layer.weight.requires_grad_(True)
    with pytest.raises(og.OpError, match="a weight that wants a gradient, expected a frozen one"):
        fused(torch.ones(2, 8)).sum().backward()
