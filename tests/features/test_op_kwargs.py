"""op_kwargs: buffers of the caller's for GroupedLinear's result and gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph import ops

SIZES = torch.tensor([3, 0, 4])


def _module() -> og.Sequential:
    torch.manual_seed(0)
    return og.Sequential(
        ops.GroupedLinear(3, 8, 16, bias=False), ops.SwiGLU(), ops.GroupedLinear(3, 8, 6)
    )


def _gradients(module: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    dy = torch.linspace(-1, 1, y.numel()).view(y.shape)
    return list(torch.autograd.grad(y, [x, *module.parameters()], dy, retain_graph=True))


@pytest.mark.parametrize("by_index", [False, True])
def test_output_and_gradient_are_in_the_callers_buffers(by_index: bool) -> None:
    module, x = _module(), torch.randn(7, 8, requires_grad=True)
    expected = module(x, SIZES, SIZES)
    wanted = _gradients(module, x, expected)
    output, gradient = torch.full((7, 6), 7.0), torch.full((7, 8), 7.0)
    first, last = (0, -1) if by_index else (module[0], module[2])
    kwargs: Any = {first: {"grad_input": gradient}, last: {"output": output}}
    y = module(x, SIZES, SIZES, op_kwargs=kwargs)
    assert y.data_ptr() == output.data_ptr()
    assert torch.equal(output, expected)
    found = _gradients(module, x, y)
    assert torch.equal(gradient, wanted[0])
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
    y.sum().backward()
    gradient.zero_()
    assert x.grad.any()  # memory of its own: the buffer is the caller's to write to
    with torch.no_grad():
        output.fill_(7.0)
        assert torch.equal(module(x, SIZES, SIZES, op_kwargs=kwargs), expected)
        assert torch.equal(output, expected)
    assert torch.equal(module(x, SIZES, SIZES, op_kwargs={}), expected)
    assert torch.equal(module(x, SIZES, SIZES, op_kwargs={0: {"grad_input": None}}), expected)


def test_extra_outputs_stay_beside_a_buffer() -> None:
    module = og.Sequential(ops.MakeExtraOutput(), ops.GroupedLinear(3, 8, 6))
    x, output = torch.randn(7, 8), torch.zeros(7, 6)
    y, more = module(x, SIZES, op_kwargs={1: {"output": output}})
    assert y.data_ptr() == output.data_ptr()
    assert torch.equal(more, x)


BUFFER = torch.zeros(7, 6)
WRONG: dict[str, tuple[Any, str]] = {
    "not in it": ({ops.GELU(): {}}, r"op_kwargs: got the key GELU, expected an op of the sequence"),
    "index": ({3: {}}, r"op_kwargs: got the key 3, expected an op of the sequence, or its index"),
    "key": ({"0": {}}, r"op_kwargs: got the key '0'"),
    "not a dict": ([1], r"op_kwargs: got list, expected a dict"),
    "keyword": (
        {2: {"out": BUFFER}}, r"2:GroupedLinear: got op_kwargs 'out', expected some of output, gr"
    ),
    "no keyword": ({1: {"output": BUFFER}}, r"1:SwiGLU: got op_kwargs 'output', expected none"),
    "inside": ({0: {"output": BUFFER}}, r"0:GroupedLinear: got op_kwargs 'output', expected it f"),
    "inside too": ({2: {"grad_input": BUFFER}}, r"expected it for the first op of the sequence"),
    "shape": ({2: {"output": torch.zeros(8, 6)}}, r"2:GroupedLinear: got output \(8, 6\) torch.fl"),
    "dtype": ({2: {"output": BUFFER.double()}}, r"output \(7, 6\) torch.float64 on cpu, expected "),
    "no tensor": ({0: {"grad_input": 3}}, r"0:GroupedLinear: got grad_input as a int, expected a"),
    "gradient": (
        {2: {"output": torch.zeros(7, 6, requires_grad=True)}}, r"cpu that requires a gradient, exp"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kwargs, message", WRONG.values(), ids=WRONG)
def test_wrong_op_kwargs_are_named(kwargs: Any, message: str) -> None:
    with pytest.raises(og.OpError, match=message):
        _module()(torch.randn(7, 8), SIZES, SIZES, op_kwargs=kwargs)
