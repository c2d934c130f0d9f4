"""A compiled module beside the eager one. Import `cold`: each test then starts from nothing."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from opsgraph.ops import Linear, RMSNorm, SwiGLU


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    """Every test starts with nothing compiled, and ends without a graph break."""
    torch.compiler.reset()
    counters.clear()
    yield
    assert not counters["graph_break"], dict(counters["graph_break"])
    torch.compiler.reset()


class Compiled:
    """A compiled module, and how often it was compiled."""

    def __init__(self, module: Callable[..., Any], backend: str = "aot_eager") -> None:
        self.counter = CompileCounterWithBackend(backend)
        self.run = torch.compile(module, fullgraph=True, backend=self.counter)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)

    @property
    def count(self) -> int:
        return self.counter.frame_count


def llama(width: int = 16) -> list[nn.Module]:
    return [RMSNorm(width), Linear(width, 2 * width), SwiGLU(), Linear(width, width)]


def results(call: Callable[..., Any], module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Outputs, and gradients of all that needs one."""
    torch.manual_seed(3)
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    found = call(*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    moving = [y for y in outputs if y.requires_grad]
    if not moving:
        return outputs
    wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
    torch.manual_seed(4)
    dys = [torch.randn_like(y) for y in moving]
    return [*outputs, *torch.autograd.grad(moving, wanted, dys, allow_unused=True)]


def assert_equal(compiled: Compiled, module: nn.Module, *inputs: Tensor) -> None:
    """The same bits as in eager mode: outputs and every gradient."""
    expected = results(module, module, *inputs)
    for k, (one, other) in enumerate(
        zip(results(compiled, module, *inputs), expected, strict=True)
    ):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other), f"result {k}"
