"""Weights held in low precision: what they stand for, how they are written, saved and trained."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from recipe_cases import FFN, HIDDEN, RECIPES, example

import opsgraph as og
from opsgraph.ops import GroupedLinear, Linear
from opsgraph.precision.weights import QuantizedTensor

NAMES = ["current", "rows", "delayed", "blocks", "mx", "nvfp4"]


def held(name: str, **options: Any) -> Linear:
    torch.manual_seed(0)
    with og.quantized_model_init(recipe=RECIPES[name], **options):
        return Linear(HIDDEN, 32)


@pytest.mark.parametrize("name", NAMES)
def test_a_held_weight_stands_for_the_quantized_one(name: str) -> None:
    layer = held(name)
    torch.manual_seed(0)
    plain = Linear(HIDDEN, 32)
    weight = layer.weight
    assert isinstance(weight, torch.nn.Parameter)
    assert isinstance(weight, QuantizedTensor)
    assert (weight.shape, weight.dtype) == (plain.weight.shape, torch.float32)
    assert all(part.dtype.itemsize < 4 or part.numel() <= 64 for part in weight.value.row.parts)
    expected = RECIPES[name].quantize(plain.weight.detach(), "weight").dequantize()
    torch.testing.assert_close(weight + 0, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_its_recipe_multiplies_what_it_holds(name: str) -> None:
    layer = held(name)
    same = Linear(HIDDEN, 32)
    torch.manual_seed(0)
    same.load_state_dict(Linear(HIDDEN, 32).state_dict())
    recipe = RECIPES["current" if name == "delayed" else name]
    x, y = (example(dtype=torch.float32).requires_grad_() for _ in range(2))
    torch.manual_seed(1)
    with og.autocast(recipe=recipe):
        found = layer(x)
    found.square().sum().backward()
    torch.manual_seed(1)
    with og.autocast(recipe=recipe):
        expected = same(y)
    expected.square().sum().backward()
    assert torch.equal(found, expected)
    assert torch.equal(x.grad, y.grad)
    assert torch.equal(layer.weight.grad, same.weight.grad)


def test_another_recipe_or_none_reads_the_values() -> None:
    layer, x = held("current"), example(dtype=torch.float32)
    plain = Linear(HIDDEN, 32)
    plain.load_state_dict(layer.state_dict())
    assert type(plain.weight) is torch.nn.Parameter
    assert torch.equal(layer(x), plain(x))
    with og.autocast(recipe=RECIPES["mx"]):
        assert torch.equal(layer(x), plain(x))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_sgd_quantizes_its_result(name: str) -> None:
    layer, recipe = held(name), RECIPES[name]
    before = layer.weight.detach() + 0
    layer.weight.grad = torch.randn_like(before)
    torch.optim.SGD([layer.weight], lr=0.1).step()
    expected = recipe.quantize(before - 0.1 * layer.weight.grad, "weight").dequantize()
    torch.testing.assert_close(layer.weight + 0, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["current", "delayed", "nvfp4"])
def test_adamw_trains_it(name: str) -> None:
    recipe = RECIPES[name]
    with og.quantized_model_init(recipe=recipe):
        module = og.LayerNormMLP(HIDDEN, FFN, device="cpu")
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    torch.manual_seed(1)
    x, target = torch.randn(2, 32, HIDDEN)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        with og.autocast(recipe=recipe):
            loss = (module(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert isinstance(module.fc1_weight, QuantizedTensor)
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_as_a_plain_tensor_and_copied_as_it_is(name: str) -> None:
    layer, file = held(name), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert type(state["weight"]) is torch.Tensor
    twin, other = copy.deepcopy(layer), held(name)
    with torch.no_grad():
        other.weight.zero_()
        assert float(other.weight.abs().max()) == 0
    other.load_state_dict(state)
    with torch.no_grad():
        layer.weight.mul_(2)
    for one in (twin, other):
        torch.testing.assert_close(one.weight + 0, state["weight"], rtol=1e-6, atol=0)


def test_data_that_is_set_is_held() -> None:
    """As `vector_to_parameters` and optimizers of other libraries set it."""
    layer = held("mx")
    torch.nn.utils.vector_to_parameters(torch.full((HIDDEN * 32 + 32,), 0.5), layer.parameters())
    assert isinstance(layer.weight, QuantizedTensor)
    torch.testing.assert_close(layer.weight + 0, torch.full((32, HIDDEN), 0.5))
    layer.weight.data = held("mx").weight.data
    assert torch.equal(layer.weight + 0, held("mx").weight + 0)
    with pytest.raises(og.OpsgraphError, match=r"got data of shape \(3, 2\).*, expected \(32, "):
        layer.weight.data = torch.ones(3, 2)


WRITES: dict[str, Any] = {
    "row": lambda w: w[1].fill_(0.5),
    "set": lambda w: w.__setitem__((slice(2, 5), 3), -0.25),
    "view of a view": lambda w: w.narrow(0, 4, 8)[2].view(2, -1)[1].mul_(2),
    "chunk": lambda w: w.chunk(2)[1].zero_(),
    "unbind": lambda w: w.unbind(1)[7].copy_(torch.ones(32)),
    "data": lambda w: w.data.diagonal().add_(0.5),
    "flat": lambda w: w.view(-1)[:64].clamp_(-0.01, 0.01),
    "foreach": lambda w: torch._foreach_mul_([w[0], w[3]], 2.0),
}


@pytest.mark.parametrize("name", ["mx", "current"])
@pytest.mark.parametrize("what", WRITES)
def test_what_is_written_into_a_part_is_written_into_the_weight(what: str, name: str) -> None:
    weight = held(name).weight
    expected = weight.detach().dequantize()
    with torch.no_grad():
        WRITES[what](weight)
        WRITES[what](expected)
    assert isinstance(weight, QuantizedTensor)
    quantized = QuantizedTensor.of(expected, weight.quantizer).dequantize()
    assert torch.equal(weight.detach().dequantize(), quantized)


def test_a_part_is_read_as_a_tensors_part() -> None:
    weight = held("mx").weight
    plain = weight.detach().dequantize().requires_grad_()
    x = torch.randn(HIDDEN)
    for each in (weight, plain):
        (each[2:4] @ x + each.view(-1)[0] * each.chunk(2)[0].sum()).square().sum().backward()
    torch.testing.assert_close(weight.grad, plain.grad)
    row = weight.detach()[1]
    expected = plain.detach()[1]
    assert row.tolist() == expected.tolist()
    assert (row.numpy() == expected.numpy()).all()
    assert repr(row) == repr(expected)
    for copied in (copy.deepcopy(row), pickle.loads(pickle.dumps(row)), row.clone(), row + 0):
        assert type(copied) is torch.Tensor
        assert torch.equal(copied, expected)
    with torch.no_grad():
        weight.mul_(2)
    assert torch.equal(row + 0, weight.detach().dequantize()[1])
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
        weight[0].zero_()


def test_shared_memory_and_dlpack_have_its_values() -> None:
    """Both ended the process: what is held lies elsewhere than a tensor's values."""
    layer = held("mx").share_memory()
    weight = layer.weight.detach()
    assert all(part.is_shared() for part in layer.weight.value.row.parts)
    for each in (weight, weight[1]):
        assert torch.equal(torch.from_dlpack(each), each + 0)


def test_its_first_values_can_be_kept() -> None:
    torch.manual_seed(0)
    plain = Linear(HIDDEN, 32)
    weight: Any = held("nvfp4", preserve_high_precision_init_val=True).weight
    assert torch.equal(weight.get_high_precision_init_val(), plain.weight)
    weight.clear_high_precision_init_val()
    assert weight.get_high_precision_init_val() is None
    assert not hasattr(held("nvfp4").weight, "get_high_precision_init_val")


def test_dtype_and_nesting() -> None:
    layer = held("mx").to(torch.bfloat16)
    assert isinstance(layer.weight, QuantizedTensor)
    assert layer.weight.dtype == torch.bfloat16
    with og.quantized_model_init(recipe=RECIPES["mx"]), og.quantized_model_init(enabled=False):
        assert type(Linear(HIDDEN, 32).weight) is torch.nn.Parameter
    with og.quantized_model_init(recipe=RECIPES["mx"]):
        assert type(GroupedLinear(2, HIDDEN, 32).weight0) is torch.nn.Parameter
    assert type(Linear(HIDDEN, 32).weight) is torch.nn.Parameter
    assert "mxe4m3" in repr(layer.weight)


def test_quantized_parameters_are_marked_as_others() -> None:
    with og.quantized_model_init(recipe=RECIPES["current"]):
        module = og.LayerNormMLP(HIDDEN, FFN, device="cpu", delay_wgrad_compute=True)
    for name, dim in (("fc1_weight", 0), ("fc2_weight", 1)):
        weight: Any = module.get_parameter(name)
        assert type(weight) is not torch.nn.Parameter
        assert weight.partition_dim == dim
        assert weight.tensor_model_parallel
        assert weight.skip_backward_post_hook
    module(torch.randn(4, HIDDEN)).sum().backward()
    module.backward_dw()
    assert module.get_parameter("fc1_weight").grad is not None
