"""The most memory that a training step of an MLP takes on the CPU, beside eager PyTorch's.

Sizes in the proportions of 2048 rows, 1024 wide, inner width 4096; in fp32, for in bf16 the library
takes scratch that differs between processors. Kept memory that is idle is given back whenever more
is taken.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opsgraph as og
from benchmarks.memory import fresh_memory, tensor_peak
from opsgraph.fusers.cpu import products as cpu_gemm
from opsgraph.kernels.choices import Choices
from opsgraph.kernels.cpu import build, gemm, memory
from opsgraph.ops import GELU, LayerNorm, Linear, RMSNorm, SwiGLU

ROWS, HIDDEN, FFN = 512, 256, 1024
SCALE = 2048 * 1024 // (2 * ROWS * HIDDEN)

needs_kernels = pytest.mark.skipif(build.why_not() is not None, reason="no kernels here")


class TorchSwiGLU(nn.Module):
    """silu(a) * b."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return F.silu(a) * b


def blocks(gated: bool) -> tuple[og.Sequential, nn.Sequential]:
    """RMSNorm and SwiGLU without biases, or LayerNorm and GELU with them; ours and torch's."""
    width, bias = FFN * (1 + gated), not gated
    ours = og.Sequential(
        RMSNorm(HIDDEN) if gated else LayerNorm(HIDDEN),
        Linear(HIDDEN, width, bias),
        SwiGLU() if gated else GELU(),
        Linear(FFN, HIDDEN, bias),
    )
    theirs = nn.Sequential(
        nn.RMSNorm(HIDDEN) if gated else nn.LayerNorm(HIDDEN),
        nn.Linear(HIDDEN, width, bias),
        TorchSwiGLU() if gated else nn.GELU(approximate="tanh"),
        nn.Linear(FFN, HIDDEN, bias),
    )
    return ours, theirs


def peak(module: nn.Module) -> int:
    """Of forward and backward, gradients made anew, after one step that plans."""
    x, dy = torch.randn(2, ROWS, HIDDEN)
    x.requires_grad_()

    def step() -> None:
        module(x).backward(dy)

    def clear() -> None:
        for tensor in (x, *module.parameters()):
            tensor.grad = None

    step()
    clear()
    found = tensor_peak(step)
    clear()
    return found


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Says which layout of a product counts as the fastest; sizes that are limits are scaled."""
    monkeypatch.setattr(memory, "LEAST", 1)
    monkeypatch.setattr(gemm, "SMALL", 0)
    monkeypatch.setattr(gemm, "TINY", 0)
    monkeypatch.setattr(cpu_gemm, "COLUMNS", cpu_gemm.COLUMNS // 4)
    monkeypatch.setattr(gemm, "PIECE", gemm.PIECE // SCALE)
    monkeypatch.setattr(gemm, "LEAST_COLUMNS", gemm.LEAST_COLUMNS // 4)
    monkeypatch.setattr(cpu_gemm, "ROWS", cpu_gemm.ROWS // 4)
    monkeypatch.setattr(cpu_gemm, "_one_pass", lambda x: False)
    monkeypatch.setattr(gemm, "_chosen", {})

    def choose(name: str) -> None:
        def measure(candidates):
            return name if name in candidates else "mm"

        monkeypatch.setattr(gemm, "choices", Choices("gemm", tuple, measure, list))

    with fresh_memory():
        yield choose


@needs_kernels
@pytest.mark.parametrize("gated", [True, False], ids=["RMSNorm, SwiGLU", "LayerNorm, GELU"])
@pytest.mark.parametrize(
    "layout", ["mm", "flipped", "onednn", "mm first", "mm second", "mm first second"]
)
def test_a_step_takes_at_most_two_thirds_of_eagers_memory(
    answer: Callable[[str], None], layout: str, gated: bool
) -> None:
    answer(layout)
    ours, theirs = blocks(gated)
    found, eager = peak(ours), peak(theirs)
    assert found <= (0.57 if gated else 0.66) * eager


def test_what_the_measure_counts() -> None:
    def call() -> None:
        a = torch.empty(1000, dtype=torch.uint8)
        b = torch.empty(500, dtype=torch.uint8)
        del a
        c = torch.empty(600, dtype=torch.uint8)
        del b, c

    assert tensor_peak(call) == 1500
