"""GEMMs with an activation in the epilogue beside the library's GEMM and a pointwise kernel.

Forward in training (the pre-activation is written too) and in inference, and the activation's
gradient in the next linear's dgrad. Each pair runs in alternation, as CUDA graphs, so that the host
is left out; medians. First they are compared: a wrong result is not timed. Ratios below 1 are wins.
The sweep times other tiles than `gemm.config` chooses.

    python -m benchmarks.gpu_gemm [--seconds 80] [--out benchmarks/results/gpu_gemm.json]
"""

import argparse
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.timing import alternate, machine

SIZES = [
    *(("swiglu", 8192, *size) for size in ((512, 2048), (1024, 3584), (2048, 5632))),
    *(("swiglu", 8192, *size) for size in ((4096, 14336), (8192, 28672))),
    *(("swiglu", rows, *size) for rows in (64, 16) for size in ((1024, 3584), (4096, 14336))),
    *(("gelu", 8192, *size) for size in ((1024, 4096), (4096, 16384))),
]
SWEEP = [("swiglu", 8192, 1024, 3584), ("swiglu", 8192, 2048, 5632), ("swiglu", 8192, 4096, 14336)]
TILES = [  # BLOCK_M, BLOCK_N, BLOCK_K, GROUP, warps, stages
    (128, 128, 64, 8, 8, 3),
    (128, 128, 64, 8, 4, 3),
    (128, 256, 64, 8, 8, 3),
    (128, 256, 64, 8, 8, 4),
    (128, 256, 64, 16, 8, 3),
    (64, 256, 64, 8, 4, 3),
    (256, 128, 64, 8, 8, 3),
]
SAMPLE = 1.5e-3  # seconds of work in one graph

Function = Callable[[], Any]
chosen = threading.local()


class Case(NamedTuple):
    """A size: x `[rows, depth]`, width columns on each side of a gate."""

    kind: str
    rows: int
    depth: int
    width: int


def use_chosen_tiles() -> None:
    """Let `chosen.tile`, where it is set, stand for what `gemm.config` says."""
    from opsgraph.kernels.triton import gemm

    usual = gemm.config
    gemm.config = lambda *args: getattr(chosen, "tile", None) or usual(*args)  # type: ignore


def options(tile: tuple[int, ...]) -> dict[str, int]:
    """A tile as `gemm.config` gives it."""
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages")
    return dict(zip(names, tile, strict=True))


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Random bf16 on the device."""
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda") * scale


def functions(case: Case, rows: int | None = None) -> dict[str, Function]:
    """By direction, fused and not, on one set of inputs; rows: instead of the case's."""
    from opsgraph.kernels.triton.activations import KINDS, activation_backward, activation_forward
    from opsgraph.kernels.triton.gemm import linear_activation, linear_activation_backward

    kind, rows = case.kind, rows or case.rows
    gated = KINDS[kind].GATED
    total = case.width * 2 if gated else case.width
    x, weight = normal(rows, case.depth), normal(total, case.depth, scale=case.depth**-0.5)
    bias = None if gated else normal(total)
    back, pre = normal(case.depth, case.width, scale=case.depth**-0.5), normal(rows, total)
    want = ("x", "y") if bias is None else ("x", "y", "bias")
    return {
        "training": lambda: linear_activation(x, weight, bias, kind, want=("pre",)),
        "inference": lambda: linear_activation(x, weight, bias, kind)[0],
        "forward, unfused": lambda: activation_forward(F.linear(x, weight, bias), kind),
        "backward": lambda: linear_activation_backward(x, back, pre, kind, want=want),
        "backward, unfused": lambda: activation_backward(x @ back, pre, kind, want=want),
    }


def differ(one: Any, other: Any) -> float:
    """The largest relative error, by norm, of some results against others; NaN counts as 1."""
    ones = one if isinstance(one, tuple) else (one,)
    others = other if isinstance(other, tuple) else (other,)
    worst = 0.0
    for a, b in zip(ones, others, strict=False):
        if a is not None and b is not None:
            error = ((a.float() - b.float()).norm() / b.float().norm()).nan_to_num(1.0)
            worst = max(worst, float(error))
    return worst


def graph(function: Function) -> tuple[Function, int]:
    """A CUDA graph of as many calls as take `SAMPLE` seconds, and their number."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    calls = max(1, min(200, int(SAMPLE * 3 / (time.perf_counter() - start))))
    recorded = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recorded):
        for _ in range(calls):
            function()
    return recorded.replay, calls


def timed(candidates: dict[str, Function], repeats: int = 9) -> dict[str, float]:
    """Median seconds of one call of each."""
    graphs = {name: graph(function) for name, function in candidates.items()}
    replays = {name: replay for name, (replay, _) in graphs.items()}
    found = alternate(replays, repeats, inner=1, synchronize=torch.cuda.synchronize)
    return {name: seconds / graphs[name][1] for name, seconds in found.items()}


def compile_all(jobs: list[tuple[Case, tuple[int, ...] | None]]) -> None:
    """Call every kernel once, several threads at a time: most of a compilation holds no GIL.

    What fails to compile is left for its own run to tell.
    """

    def run(job: tuple[Case, tuple[int, ...] | None]) -> None:
        case, tile = job
        chosen.tile = options(tile) if tile else None
        for name, function in functions(case, min(case.rows, 129)).items():
            if tile is None or name in ("training", "backward"):
                try:
                    function()
                except Exception as error:
                    print(f"{name} {tuple(case)} {tile}: {error!r}"[:200], file=sys.stderr)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(run, jobs))
    torch.cuda.synchronize()


def compare(case: Case) -> dict[str, Any]:
    """A row of the table. Raises SystemExit where the two do not agree."""
    made = functions(case)
    unfused = {"training": "forward", "inference": "forward", "backward": "backward"}
    for name, other in unfused.items():
        error = differ(made[name](), made[f"{other}, unfused"]())
        if error > 2e-2:
            raise SystemExit(f"{name} {case}: relative error {error:.3g}, so no time")
    found = timed(made)
    ratios = {n: found[n] / found[f"{other}, unfused"] for n, other in unfused.items()}
    flop = 2 * case.rows * case.depth * case.width * (1 if case.kind == "gelu" else 2)
    speed = flop / found["training"] / 1e12
    return case._asdict() | {"seconds": found, "ratios": ratios, "TFLOP/s of training": speed}


def sweep(case: Case) -> Iterator[dict[str, Any]]:
    """Seconds of each tile, in training and backward; tiles that do not run are left out."""
    made = functions(case)
    for name in ("training", "backward"):
        candidates: dict[str, Function] = {}
        for tile in TILES:

            def run(function: Function = made[name], tile: tuple[int, ...] = tile) -> Any:
                chosen.tile = options(tile)
                try:
                    return function()
                finally:
                    chosen.tile = None

            try:
                run()
                candidates[str(tile)] = run
            except Exception as error:
                print(f"{name} {tuple(case)} {tile}: {error!r}"[:200], file=sys.stderr)
        other = "forward" if name == "training" else name
        candidates["unfused"] = made[f"{other}, unfused"]
        yield case._asdict() | {"direction": name, "seconds": timed(candidates, repeats=5)}


def show(row: dict[str, Any]) -> None:
    """Print a row of the table."""
    size = "{kind:<8}{rows:>6}{depth:>6}{width:>7}".format(**row)
    times = "".join(f"{seconds * 1e6:>10.1f}" for seconds in row["seconds"].values())
    ratios = "".join(f"{ratio:>7.3f}" for ratio in row["ratios"].values())
    print(f"{size}{times}  {ratios}{row['TFLOP/s of training']:>8.0f}", flush=True)


def show_sweep(row: dict[str, Any]) -> None:
    """Print the tiles of one size, the fastest first."""
    print("\n{direction} {kind} {rows} {depth} {width}".format(**row))
    for name, seconds in sorted(row["seconds"].items(), key=lambda item: item[1]):
        print(f"  {name:<28}{seconds * 1e6:>10.1f} us", flush=True)


def measure(seconds: float) -> dict[str, Any]:
    """The table and the sweep, as far as the time goes."""
    deadline = time.monotonic() + seconds
    use_chosen_tiles()
    cases = [Case(*size) for size in SIZES]
    compile_all([(case, None) for case in cases])
    print(f"compiled in {seconds - (deadline - time.monotonic()):.0f} s; us, then ratios")
    print("kind      rows depth  width  training inference   unfused  backward   unfused")
    result: dict[str, Any] = {"machine": machine(), "sizes": [], "sweep": []}
    with torch.no_grad():
        for case in cases:
            if time.monotonic() > deadline:
                print(f"no time left for {tuple(case)}")
                continue
            result["sizes"].append(compare(case))
            show(result["sizes"][-1])
        for case in (Case(*size) for size in SWEEP):
            if time.monotonic() > deadline - 12:
                print(f"no time left for tiles of {tuple(case)}")
                continue
            compile_all([(case, tile) for tile in TILES])
            for row in sweep(case):
                show_sweep(row)
                result["sweep"].append(row)
    return result


def main() -> None:
    """Prints the table and writes it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=80.0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/gpu_gemm.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a CUDA device; there is none")
        return
    result = measure(arguments.seconds)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
