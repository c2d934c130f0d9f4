"""Tools that PyTorch has itself."""

import copy
from typing import Any

import fresh
import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn
from torch._dynamo import compiled_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode


def gradients(module: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    return list(torch.autograd.grad(module(x).square().sum(), [x, *module.parameters()]))


def test_compiled_autograd(module: nn.Module, x: Tensor) -> None:
    """Dynamo, which makes a function of the backward, looks into none of a plan's."""
    expected = gradients(module, x)
    torch._dynamo.utils.counters.clear()
    with compiled_autograd._enable(torch.compile(backend="aot_eager")):
        found = gradients(module, x)
    torch.testing.assert_close(found, expected)
    assert torch._dynamo.utils.counters["frames"]["total"] < 10  # of hundreds


def test_fake_tensors(module: nn.Module, x: Tensor) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        y = copy.deepcopy(module)(torch.empty(7, x.shape[1]))
    assert isinstance(y, FakeTensor)
    assert y.shape == (7, x.shape[1])


def test_functionalize(module: nn.Module, x: Tensor) -> None:
    torch.testing.assert_close(torch.func.functionalize(module)(x), module(x))


def test_dynamic_quantization_looks_for_torch_nn(module: nn.Module, x: Tensor) -> None:
    """Ops of opsgraph are left as they are, for it knows nn.Linear by its exact type."""
    quantize: Any = torch.ao.quantization.quantize_dynamic
    with pytest.warns(DeprecationWarning, match="quantization"):
        quantized = quantize(copy.deepcopy(module), {nn.Linear}, dtype=torch.qint8)
    assert torch.equal(quantized(x), module(x))


def _put(module: nn.Module, x: Tensor, queue: Any) -> None:
    torch.set_num_threads(1)
    queue.put([t.numpy() for t in gradients(module, x)])


@pytest.mark.parametrize("context", [multiprocessing.get_context("fork"), fresh.context])
def test_processes(module: nn.Module, x: Tensor, context: Any) -> None:
    """A module that has run here runs there, in a copy of this process and in one of its own."""
    expected = gradients(module, x)
    queue = context.Queue()
    process = context.Process(target=_put, args=(module, x, queue))
    process.start()
    found = [torch.from_numpy(value) for value in queue.get(timeout=120)]
    process.join()
    assert all(map(torch.equal, found, expected))
