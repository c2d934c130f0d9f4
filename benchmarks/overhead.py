"""What the host pays: an MLP too small for arithmetic to matter, beside the same in torch.nn.

RMSNorm, Linear, SwiGLU, Linear without biases; 4 rows, H=64, F=128, fp32, one thread, in
alternation. Also the time that planning takes. Prints a table and writes it as JSON.

    python -m benchmarks.overhead [--repeats 60] [--inner 200] [--out FILE]
"""

import argparse
import datetime
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opsgraph as og
from benchmarks.timing import alternate, machine
from opsgraph.ops import Linear, RMSNorm, SiLU, SwiGLU

ROWS, HIDDEN, FFN = 4, 64, 128
HOST_LIMIT = 1.1  # times nn.Sequential
PLANNING_LIMITS = {"MLP, greedy": 2e-3, "MLP, optimal": 2e-3, "1,000 ops, greedy": 0.5}


class TorchSwiGLU(nn.Module):
    """silu(a) * b of the two halves, as one writes it in PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return F.silu(a) * b


def make_ours(planner: str = "greedy") -> og.Sequential:
    """The MLP in opsgraph."""
    return og.Sequential(
        RMSNorm(HIDDEN, eps=1e-5),
        Linear(HIDDEN, 2 * FFN, bias=False),
        SwiGLU(),
        Linear(FFN, HIDDEN, bias=False),
        planner=planner,
    )


def make_theirs(ours: og.Sequential) -> nn.Sequential:
    """The MLP in torch.nn, from the same weights."""
    theirs = nn.Sequential(
        nn.RMSNorm(HIDDEN, eps=1e-5),
        nn.Linear(HIDDEN, 2 * FFN, bias=False),
        TorchSwiGLU(),
        nn.Linear(FFN, HIDDEN, bias=False),
    )
    with torch.no_grad():
        for to, source in zip(theirs.parameters(), ours.parameters(), strict=True):
            to.copy_(source)
    return theirs


def forward_without_grad(module: nn.Module, x: Tensor) -> Tensor:
    """Inference."""
    with torch.no_grad():
        return module(x)


def forward_and_backward(
    module: nn.Module, parameters: list[nn.Parameter], x: Tensor, dy: Tensor
) -> None:
    """A training step without an optimizer, its gradients made anew."""
    x.grad = None
    for parameter in parameters:
        parameter.grad = None
    module(x).backward(dy)


def host_cases() -> dict[str, dict[str, Callable[[], Any]]]:
    """For every kind of call, the same call of both modules."""
    torch.manual_seed(0)
    ours = make_ours()
    modules = {"opsgraph": ours, "nn.Sequential": make_theirs(ours)}
    x = torch.randn(ROWS, HIDDEN, requires_grad=True)
    dy = torch.randn(ROWS, HIDDEN)
    torch.testing.assert_close(*(module(x) for module in modules.values()))
    return {
        "forward, no_grad": {n: partial(forward_without_grad, m, x) for n, m in modules.items()},
        "forward, grad": {n: partial(m, x) for n, m in modules.items()},
        "forward + backward": {
            n: partial(forward_and_backward, m, list(m.parameters()), x, dy)
            for n, m in modules.items()
        },
    }


def plan_afresh(module: og.Sequential) -> Callable[[], Any]:
    """A function that plans the module's training again at every call, past its table.

    The only place here that reaches into the package: a stage plans for a key of its table.
    """
    plan = module.plan(training=True)
    (stage,) = module._stages
    key = next(key for key, found in stage.plans.items() if found is plan)
    return partial(stage._make, key, len(stage.inputs))


def planning_cases() -> dict[str, Callable[[], Any]]:
    """Plans to make: the MLP's with both planners, and that of a long run of ops."""
    layers = [layer for _ in range(500) for layer in (Linear(8, 8, bias=False), SiLU())]
    return {
        "MLP, greedy": plan_afresh(make_ours("greedy")),
        "MLP, optimal": plan_afresh(make_ours("optimal")),
        "1,000 ops, greedy": plan_afresh(og.Sequential(*layers)),
    }


def measure(repeats: int, inner: int) -> dict[str, Any]:
    """All timings in seconds, with where and when they were taken."""
    host = {name: alternate(pair, repeats, inner) for name, pair in host_cases().items()}
    planning = planning_cases()
    short = {name: call for name, call in planning.items() if name.startswith("MLP")}
    long = {name: call for name, call in planning.items() if name not in short}
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opsgraph": og.__version__,
        "shape": {"rows": ROWS, "hidden": HIDDEN, "ffn": FFN, "dtype": "float32"},
        "method": f"medians of {repeats} samples of {inner} calls, candidates in alternation",
        "host_seconds": host,
        "planning_seconds": alternate(short, repeats, 5) | alternate(long, 3, 1),
    }


def table(results: dict[str, Any]) -> str:
    """The results for the eye."""
    lines = [results["machine"], f"{'':<22}{'opsgraph':>12}{'nn.Sequential':>16}{'ratio':>8}"]
    for name, pair in results["host_seconds"].items():
        ours, theirs = pair["opsgraph"], pair["nn.Sequential"]
        times = f"{ours * 1e6:>9.1f} us{theirs * 1e6:>13.1f} us"
        lines.append(f"{name:<22}{times}{ours / theirs:>8.2f}")
    lines += ["", f"{'planning':<22}{'time':>12}{'limit':>16}"]
    for name, seconds in results["planning_seconds"].items():
        lines.append(f"{name:<22}{seconds * 1e3:>9.2f} ms{PLANNING_LIMITS[name] * 1e3:>13.0f} ms")
    return "\n".join(lines)


def misses(results: dict[str, Any]) -> list[str]:
    """What is above its limit."""
    host, planning = results["host_seconds"], results["planning_seconds"]
    slow = [n for n, p in host.items() if p["opsgraph"] > HOST_LIMIT * p["nn.Sequential"]]
    return slow + [name for name, seconds in planning.items() if seconds > PLANNING_LIMITS[name]]


def main() -> int:
    """Measure, print, write; 1 if a limit is missed and --check was given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--inner", type=int, default=200, help="calls in a sample")
    default = Path(__file__).parent / "results" / "overhead.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument("--check", action="store_true", help="fail if a limit is missed")
    args = parser.parse_args()
    torch.set_num_threads(1)
    results = measure(args.repeats, args.inner)
    print(table(results))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    missed = misses(results)
    if missed:
        print(f"above the limit: {', '.join(missed)}")
    return 1 if missed and args.check else 0


if __name__ == "__main__":
    sys.exit(main())
