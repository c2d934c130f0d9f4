"""Whole MLP blocks on a CUDA device: opsgraph beside eager and compiled PyTorch.

RMSNorm, Linear, SwiGLU, Linear without biases in bf16, and LayerNorm, Linear, GELU, Linear with
biases: forward alone, forward and backward, memory kept for the backward and the peak of a step.
The three run in alternation on the same inputs; medians.

    python -m benchmarks.gpu            # writes benchmarks/results/gpu.json
    python -m benchmarks.gpu --fp8      # GEMMs, casts and blocks in FP8: gpu_fp8.json
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import opsgraph as og
from benchmarks.peers import TorchSwiGLU
from benchmarks.timing import alternate
from opsgraph.fuser import registered
from opsgraph.ops import GELU, LayerNorm, Linear, RMSNorm, SwiGLU

SIZES = ((8192, 1024, 3584), (8192, 2048, 5632), (8192, 4096, 14336))
SMALL = (64, 1024, 3584)
EPILOGUES = ("LinearActivation", "ActivationEpilogueBackward")
"""Fusers that put an activation into a Triton GEMM; "library GEMMs" is opsgraph without them."""


def models(kind: str, hidden: int, ffn: int) -> dict[str, nn.Module]:
    """opsgraph's module and plain ones with the same weights."""
    place: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    if kind == "swiglu":
        ours = og.Sequential(
            RMSNorm(hidden), Linear(hidden, 2 * ffn, False), SwiGLU(), Linear(ffn, hidden, False)
        ).to(**place)
        plain = nn.Sequential(
            nn.RMSNorm(hidden, eps=1e-5),
            nn.Linear(hidden, 2 * ffn, False),
            TorchSwiGLU(),
            nn.Linear(ffn, hidden, False),
        ).to(**place)
    else:
        ours = og.Sequential(
            LayerNorm(hidden), Linear(hidden, ffn), GELU(), Linear(ffn, hidden)
        ).to(**place)
        plain = nn.Sequential(
            nn.LayerNorm(hidden), nn.Linear(hidden, ffn), nn.GELU("tanh"), nn.Linear(ffn, hidden)
        ).to(**place)
    plain.load_state_dict(ours.state_dict())
    compiled: Any = torch.compile(plain)
    names = tuple(f.name for f in registered() if f.name not in EPILOGUES)
    library = og.Sequential(*ours, fusers=names)
    return {"opsgraph": ours, "eager": plain, "compiled": compiled, "library GEMMs": library}


def graphed(found: dict[str, nn.Module], x: Tensor) -> dict[str, Callable[..., Any]]:
    """opsgraph and eager as CUDA graphs, forward and backward: the host's cost left out."""
    sample = torch.randn_like(x, requires_grad=True)
    return {
        f"{name}, graphed": torch.cuda.make_graphed_callables(copy.deepcopy(found[name]), (sample,))
        for name in ("opsgraph", "eager")
    }


def step(model: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Forward and backward, fresh gradients."""
    model.zero_grad(set_to_none=True)
    model(x).backward(dy)


def forward(model: nn.Module, x: Tensor) -> None:
    """Inference."""
    with torch.no_grad():
        model(x)


def timed(calls: dict[str, Callable[[], None]], rounds: int, inner: int) -> dict[str, float]:
    """Median milliseconds of each, in alternation."""
    found = alternate(calls, rounds, inner, torch.cuda.synchronize)
    return {name: 1e3 * seconds for name, seconds in found.items()}


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of distinct storages that autograd keeps, parameters apart."""
    held: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = model(x)
    del y
    return sum(held.values())


def peak_bytes(call: Callable[[], None]) -> int:
    """The most memory that a step holds beyond what is there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(kind: str, rows: int, hidden: int, ffn: int, rounds: int) -> dict[str, Any]:
    """All figures for one block and size."""
    found = models(kind, hidden, ffn)
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn_like(x)
    inner = 20 if rows < 1024 else 3
    if rows < 1024:
        found |= graphed(found, x)  # type: ignore[arg-type]
    steps = {n: (lambda m=m: step(m, x, dy)) for n, m in found.items()}  # type: ignore[misc]
    forwards = {n: (lambda m=m: forward(m, x)) for n, m in found.items()}  # type: ignore[misc]
    result: dict[str, Any] = {
        "kind": kind, "rows": rows, "hidden": hidden, "ffn": ffn,
        "train_ms": timed(steps, rounds, inner),
        "forward_ms": timed(forwards, rounds, inner),
        "saved_bytes_per_row": {n: saved_bytes(found[n], x) / rows for n in ("opsgraph", "eager")},
        "peak_bytes_per_row": {n: peak_bytes(steps[n]) / rows for n in ("opsgraph", "eager")},
    }  # fmt: skip
    result["plan"] = str(found["opsgraph"].plan())
    return result


def row(result: dict[str, Any]) -> str:
    """One line of the table: ratios are opsgraph's time over the other's."""
    train, infer = result["train_ms"], result["forward_ms"]
    saved, peak = result["saved_bytes_per_row"], result["peak_bytes_per_row"]
    size = f"{result['kind']:7} {result['rows']:5} {result['hidden']:5} {result['ffn']:6}"
    return (
        f"{size}  {train['opsgraph']:8.3f} ms {train['opsgraph'] / train['eager']:5.2f} "
        f"{train['opsgraph'] / train['compiled']:5.2f}   {infer['opsgraph']:8.3f} ms "
        f"{infer['opsgraph'] / infer['eager']:5.2f} {infer['opsgraph'] / infer['compiled']:5.2f}   "
        f"{saved['opsgraph']:8.0f} {saved['eager']:8.0f}   "
        f"{peak['opsgraph'] / peak['eager']:5.2f}   "
        f"{train['opsgraph'] / train['library GEMMs']:5.2f} "
        f"{infer['opsgraph'] / infer['library GEMMs']:5.2f}"
    ) + graphed_ratios(train, infer)


def graphed_ratios(train: dict[str, float], infer: dict[str, float]) -> str:
    """Where graphs were measured: their ratios, opsgraph's over eager's."""
    ours, eager = "opsgraph, graphed", "eager, graphed"
    if ours not in train:
        return ""
    return f"   graphed: {train[ours] / train[eager]:5.2f} {infer[ours] / infer[eager]:5.2f}"


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--fp8", action="store_true", help="recipes beside bf16 instead")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device; there is none here")
        return
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    if options.fp8:
        from benchmarks import gpu_fp8

        results = [gpu_fp8.measure(*size, options.rounds) for size in SIZES]
        write(results, options.out or Path("benchmarks/results/gpu_fp8.json"))
        print(results[-1]["plans"]["delayed"])
        return
    results = []
    print("kind rows H F | train ms, /eager /compiled | forward ms, /eager /compiled | saved bytes")
    print("per row: opsgraph, eager | peak/eager | train and forward over library GEMMs")
    for kind in ("swiglu", "gelu"):
        for rows, hidden, ffn in (SMALL, *SIZES):
            torch._dynamo.reset()
            results.append(measure(kind, rows, hidden, ffn, options.rounds))
            print(row(results[-1]), flush=True)
    write(results, options.out or Path("benchmarks/results/gpu.json"))
    print(results[1]["plan"])


def write(results: list[dict[str, Any]], path: Path) -> None:
    """The figures and the machine, as JSON."""
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
