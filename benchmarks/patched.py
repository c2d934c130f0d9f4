"""A Llama-shaped model's training step, its MLPs and norms patched and not.

python -m benchmarks.patched [--layers 12] [--tokens 512] [--without-amx]

Prints the time of forward and backward of all norms, MLPs and residuals, unpatched and patched, for
gate and up as two weights and as one; beside it that of the products alone, as PyTorch has them,
and how long patching took. --without-amx keeps the library and our own products from AMX's units,
as on a CPU that has none. Where PyTorch's products of bf16 are slow, on CPUs without AVX-512, take
fewer layers: an unpatched step of one takes 10 s and more there.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from opsgraph.integrations.transformers import patch
from opsgraph.kernels.cpu import product

from .cpu import flags
from .timing import machine


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


def step(model: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """A forward and backward of a model."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        model(x).backward(dy)

    return run


def products(model: Model, x: Tensor) -> Callable[[], None]:
    """The products of a step alone, each as PyTorch's autograd has it."""
    weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    rows = {weight.shape[k]: None for weight in weights for k in (0, 1)}
    given = {width: torch.randn(x.numel() // x.shape[-1], width).to(x.dtype) for width in rows}

    def run() -> None:
        with torch.no_grad():
            for weight in weights:
                functional.linear(given[weight.shape[1]], weight)
                torch.mm(given[weight.shape[0]], weight)
                torch.mm(given[weight.shape[0]].t(), given[weight.shape[1]])

    return run


def measured(runs: Mapping[str, Callable[[], None]], seconds: float) -> dict[str, float]:
    """Median seconds of each, in turns until the time is over, three times at the least."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + seconds
    while len(times["unpatched"]) < 3 or time.perf_counter() < end:
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--inner", type=int, default=2816)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=30, help="to measure for, of each kind")
    parser.add_argument("--without-amx", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.without_amx:  # the library asks for it at its first product
        os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_BF16"
        product.units = lambda: tuple(unit for unit in product.UNITS if unit != "tiles")  # type: ignore[assignment]
    print(machine(), *(flag for flag in flags() if not (args.without_amx and "amx" in flag)))
    for mlp in (Separate, Merged):
        torch.manual_seed(0)
        plain = Model(args.layers, args.width, args.inner, mlp).bfloat16()
        patched = copy.deepcopy(plain)
        x = torch.randn(1, args.tokens, args.width).bfloat16().requires_grad_()
        start = time.process_time()
        report = patch(patched, {"x": x[:, :16].detach()})
        process = (time.process_time() - start) / args.layers
        dy = torch.randn_like(x)
        runs = {"unpatched": step(plain, x, dy), "patched": step(patched, x, dy)}
        found = measured(runs | {"products": products(plain, x)}, args.seconds)
        unpatched = found["unpatched"]
        shares = ", ".join(
            f"{name} {taken * 1e3:.0f} ms ({taken / unpatched:.2f})"
            for name, taken in found.items()
        )
        each = report.seconds / args.layers
        print(
            f"{mlp.__name__}, {args.layers} layers: {shares}; patching {each:.2f} s a layer, "
            f"{process:.2f} of a core"
        )


if __name__ == "__main__":
    main()
