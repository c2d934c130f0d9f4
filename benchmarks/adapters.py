"""A training step of a frozen bf16 block with LoRA on gate, up and down: fused, and eager.

    python -m benchmarks.adapters [--device cpu] [--rows 512] [--hidden 1024] [--ffn 2816]
                                  [--rank 16] [--dtype float32] [--steps 20]

RMSNorm, gate and up, SwiGLU, down, as in a Llama. Eager is what peft runs: base layer, then
`lora_B(lora_A(x)) * scaling`. dtype is the adapters': peft makes fp32 ones of a bf16 model unless
told otherwise. Prints the median of steps in alternation and the bytes kept for the backward.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Linear, LoRA, LoRALinear, RMSNorm, SwiGLU

BF16 = torch.bfloat16


class Eager(nn.Module):
    """A frozen layer and an adapter, computed as peft does."""

    def __init__(self, fan_in: int, fan_out: int, branch: LoRA) -> None:
        super().__init__()
        self.base = nn.Linear(fan_in, fan_out, bias=False, dtype=BF16).requires_grad_(False)
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        branch, y = self.branch, self.base(x)
        low = F.linear(x.to(branch.lora_A.dtype), branch.lora_A)
        return (y + F.linear(low, branch.lora_B) * branch.scale).to(y.dtype)


def blocks(hidden: int, ffn: int, rank: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The two that are compared."""

    def lora(fan_in: int, fan_out: int, start: int | None = None) -> LoRA:
        return LoRA(fan_in, fan_out, rank, alpha=2.0 * rank, start=start, dtype=dtype)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(hidden, dtype=BF16).requires_grad_(False)
            self.gate = Eager(hidden, ffn, lora(hidden, ffn))
            self.up = Eager(hidden, ffn, lora(hidden, ffn))
            self.down = Eager(ffn, hidden, lora(ffn, hidden))

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            return self.down(F.silu(self.gate(h)) * self.up(h))

    def linear(*sizes: int) -> Linear:
        return Linear(*sizes, bias=False, dtype=BF16).requires_grad_(False)

    fused = og.Sequential(
        RMSNorm(hidden, dtype=BF16).requires_grad_(False),
        LoRALinear(linear(hidden, 2 * ffn), lora(hidden, ffn, 0), lora(hidden, ffn, ffn)),
        SwiGLU(),
        LoRALinear(linear(ffn, hidden), lora(ffn, hidden)),
    )
    return {"fused": fused, "eager": Block()}


def kept(step: Callable[[], Tensor]) -> int:
    """Bytes of the tensors that autograd keeps, parameters apart."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        whole = tensor if tensor._base is None else tensor._base
        if tensor.dim() and not isinstance(whole, nn.Parameter):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = step()
    del y
    return sum(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    sizes = (("rows", 512), ("hidden", 1024), ("ffn", 2816), ("rank", 16), ("steps", 20))
    for name, default in sizes:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    given = parser.parse_args()
    torch.set_num_threads(2)
    made = blocks(given.hidden, given.ffn, given.rank, getattr(torch, given.dtype))
    x = torch.randn(given.rows, given.hidden, dtype=BF16, device=given.device, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in made}
    wait = torch.cuda.synchronize if given.device == "cuda" else lambda: None
    for module in made.values():
        module.to(given.device)
    for k in range(given.steps + 3):
        for name, module in made.items():
            wait()
            start = time.perf_counter()
            y = module(x)
            y.backward(y.detach())
            wait()
            if k >= 3:
                times[name].append(time.perf_counter() - start)
    for name, module in made.items():
        mib = kept(partial(module, x)) / 2**20
        print(f"{name:8} {1e3 * median(times[name]):9.3f} ms {mib:9.2f} MiB kept")


if __name__ == "__main__":
    main()
