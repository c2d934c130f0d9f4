"""A Llama-shaped model's training step, its MLPs and norms patched and not.

python -m benchmarks.patched [--layers 12] [--tokens 512] [--merged]

Prints the time of forward and backward of all norms, MLPs and residuals, unpatched and patched, for
gate and up as two weights and as one, and how long patching took.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from opsgraph.integrations.transformers import patch


class Norm(nn.Module):
    """LlamaRMSNorm's formula."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class Separate(nn.Module):
    """LlamaMLP's formula."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Merged(nn.Module):
    """Phi3MLP's formula."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(width, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * functional.silu(gate))


class Layer(nn.Module):
    """Norm, MLP and residual: what a decoder layer is without attention."""

    def __init__(self, width: int, inner: int, mlp: type[nn.Module]) -> None:
        super().__init__()
        self.input_layernorm, self.norm = Norm(width), Norm(width)
        self.mlp = mlp(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.input_layernorm(x)  # attention's place
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    def __init__(self, layers: int, width: int, inner: int, mlp: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, inner, mlp) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward and backward of a model."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(x).sum().backward()

    return run


def measured(steps: list[Callable[[], None]], rounds: int) -> list[float]:
    """Median seconds of each, run in turn."""
    times: list[list[float]] = [[] for _ in steps]
    for k in range(rounds + 2):
        for run, taken in zip(steps, times, strict=True):
            start = time.perf_counter()
            run()
            if k >= 2:
                taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for mlp in (Separate, Merged):
        torch.manual_seed(0)
        plain = Model(args.layers, args.width, args.inner, mlp).bfloat16()
        patched = copy.deepcopy(plain)
        x = torch.randn(1, args.tokens, args.width).bfloat16().requires_grad_()
        report = patch(patched, {"x": x[:, :16].detach()})
        before, after = measured([step(plain, x), step(patched, x)], args.rounds)
        print(
            f"{mlp.__name__}: {before * 1e3:.0f} ms, patched {after * 1e3:.0f} ms "
            f"({after / before:.2f}); patched in {report.seconds / args.layers:.2f} s a layer"
        )


if __name__ == "__main__":
    main()
