"""A training step of RMSNorm, SwiGLU MLP with gate and up as one weight, and as two.

    python -m benchmarks.separate [--rows 512] [--hidden 1024] [--ffn 2816] [--steps 30]

Prints medians of steps in alternation, in ms: one weight; `Linear.of(gate, up)`; the two weights
joined by torch.cat at each step; and the model's own modules, in eager PyTorch.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Linear, RMSNorm, SwiGLU


class Joined(nn.Module):
    """Two weights joined by a copy."""

    def __init__(self, gate: nn.Linear, up: nn.Linear) -> None:
        super().__init__()
        self.gate, self.up = gate, up

    @property
    def weight(self) -> Tensor:
        return torch.cat([self.gate.weight, self.up.weight])


def steps(hidden: int, ffn: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """What is compared, by name."""

    def linear(fan_in: int, fan_out: int) -> nn.Linear:
        return nn.Linear(fan_in, fan_out, bias=False, dtype=torch.bfloat16)

    def plan(fc1: nn.Module) -> og.Sequential:
        rest = SwiGLU(), Linear.of(linear(ffn, hidden))
        return og.Sequential(RMSNorm(hidden, dtype=torch.bfloat16), fc1, *rest)

    copied = Linear(hidden, 2 * ffn, bias=False, device="meta")
    copied.borrow(Joined(linear(hidden, ffn), linear(hidden, ffn)), weight="weight")
    norm = nn.RMSNorm(hidden, dtype=torch.bfloat16)
    gate, up, down = linear(hidden, ffn), linear(hidden, ffn), linear(ffn, hidden)
    return {
        "one weight": plan(Linear.of(linear(hidden, 2 * ffn))),
        "Linear.of(gate, up)": plan(Linear.of(linear(hidden, ffn), linear(hidden, ffn))),
        "torch.cat": plan(copied),
        "eager PyTorch": lambda x: down(F.silu(gate(h := norm(x))) * up(h)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("rows", 512), ("hidden", 1024), ("ffn", 2816), ("steps", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    torch.set_num_threads(2)
    x = torch.randn(given.rows, given.hidden, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    made = steps(given.hidden, given.ffn)
    times: dict[str, list[float]] = {name: [] for name in made}
    for k in range(given.steps + 3):
        for name, step in made.items():
            start = time.perf_counter()
            step(x).backward(dy)
            if k >= 3:
                times[name].append(time.perf_counter() - start)
    least = median(times["one weight"])
    for name, taken in times.items():
        print(f"{name:22} {1e3 * median(taken):8.2f} ms   {median(taken) / least:.3f}")


if __name__ == "__main__":
    main()
