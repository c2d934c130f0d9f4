"""Products with an activation in one kernel beside the library's product and a pointwise kernel.

Forward in training (the pre-activation is written too) and in inference, and the activation's
gradient in the next linear's dgrad: by two groups of warps in turn (`kernels/triton/pairs.py`, on
Hopper), by a Triton GEMM with an epilogue, and by the library's fastest product and a pass. They
run in alternation, as CUDA graphs, so that the host is left out; medians. First they are compared:
a wrong result is not timed. Ratios to the library's and a pass below 1 are wins.

Then FP8 products of scales for 1 x 128 by scales for 128 x 128: the library's fastest and ours
(`kernels/triton/block_product.py`), measured in the same way.

    python -m benchmarks.gpu_gemm [--seconds 100] [--out benchmarks/results/gpu_gemm.json]
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.timing import alternate, machine

SIZES = [
    *(("swiglu", 8192, *size) for size in ((2048, 5632), (4096, 14336), (1024, 3584), (512, 2048))),
    ("swiglu", 2048, 4096, 14336),
    ("swiglu", 4096, 8192, 28672),
    ("gelu", 8192, 1024, 4096),
    ("gelu", 8192, 4096, 16384),
    *(("swiglu", rows, 1024, 3584) for rows in (1024, 256, 64)),
    *(("swiglu", 8192, *size) for size in ((256, 1024), (128, 512))),
]
BLOCKS = [
    (8192, 28672, 4096), (8192, 4096, 14336), (8192, 4096, 28672), (8192, 14336, 4096),
    (2048, 4096, 14336), (8192, 11264, 2048), (8192, 2048, 5632), (8192, 7168, 1024),
    (8192, 1024, 3584), (1024, 4096, 4096),
]  # fmt: skip
"""FP8 products: rows, columns, depth."""
SAMPLE = 1.5e-3  # seconds of work in one graph

Function = Callable[[], Any]


class Case(NamedTuple):
    """A size: x `[rows, depth]`, width columns on each side of a gate."""

    kind: str
    rows: int
    depth: int
    width: int


def normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Random bf16 on the device."""
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda") * scale


def functions(case: Case, rows: int | None = None) -> dict[str, Function]:
    """By direction and kernel, on one set of inputs; rows: instead of the case's."""
    from opsgraph.kernels.cublaslt.gemm import matmul
    from opsgraph.kernels.triton import pairs
    from opsgraph.kernels.triton.activations import activation_backward, activation_forward
    from opsgraph.kernels.triton.functions import KINDS
    from opsgraph.kernels.triton.gemm import linear_activation, linear_activation_backward

    kind, rows = case.kind, rows or case.rows
    total = case.width * 2 if KINDS[kind].GATED else case.width
    x, weight = normal(rows, case.depth), normal(total, case.depth, scale=case.depth**-0.5)
    back, pre = normal(case.depth, case.width, scale=case.depth**-0.5), normal(rows, total)
    dpre, want = torch.empty_like(pre), ("x", "y")
    made: dict[str, Function] = {
        "training": lambda: (activation_forward(y := matmul(x, weight.t()), kind), y),
        "inference": lambda: activation_forward(matmul(x, weight.t()), kind),
        "backward": lambda: activation_backward(matmul(x, back), pre, kind, want=want),
        "training, triton": lambda: linear_activation(x, weight, None, kind, want=("pre",)),
        "inference, triton": lambda: linear_activation(x, weight, None, kind)[0],
        "backward, triton": lambda: linear_activation_backward(x, back, pre, kind, want=want),
    }
    if pairs.none_for(x.device, case.depth, case.width) is None:
        made |= {
            "training, pairs": lambda: pairs.activation(x, weight, None, kind, want=("pre",)),
            "inference, pairs": lambda: pairs.activation(x, weight, None, kind)[0],
            "backward, pairs": lambda: pairs.gradient(x, back, pre, dpre, kind, want=want),
        }
    return made


def block_functions(rows: int, columns: int, depth: int) -> dict[str, Function]:
    """By the library and, where there is such a kernel, by ours, on one set of operands."""
    from opsgraph.kernels.cublaslt import blocks
    from opsgraph.kernels.cublaslt.product import product
    from opsgraph.kernels.formats import E4M3, inverse_shape
    from opsgraph.kernels.triton.block_product import block_product, why_not

    a, b = (normal(size, depth, scale=30.0).to(E4M3) for size in (rows, columns))
    out = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda")
    shapes = inverse_shape("blocks", rows, depth), inverse_shape("square", columns, depth)
    scales = [(torch.rand(shape, device="cuda") + 0.1).flatten(1) for shape in shapes]
    made: dict[str, Function] = {
        "library": lambda: product(out, a, b.t(), (scales[0], scales[1]), blocks.MODES),
    }
    if why_not(out, a, b, scales[0]) is None:
        again = torch.empty_like(out)
        made["triton"] = lambda: (block_product(again, a, b, *scales, None), again)[1]
    return made


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


def compile_all(cases: list[Case]) -> None:
    """Call every kernel once, several threads at a time: most of a compilation holds no GIL.

    What fails to compile is left for its own run to tell.
    """

    def run(case: Case) -> None:
        for name, function in functions(case, min(case.rows, 129)).items():
            try:
                function()
            except Exception as error:
                print(f"{name} {tuple(case)}: {error!r}"[:200], file=sys.stderr)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(run, cases))
    torch.cuda.synchronize()


def compare(case: Case) -> dict[str, Any]:
    """A row of the table. Raises SystemExit where two do not agree."""
    made = functions(case)
    fused = {name: name.split(",")[0] for name in made if "," in name}
    for name, other in fused.items():
        error = differ(made[name](), made[other]())
        if error > 2e-2:
            raise SystemExit(f"{name} {case}: relative error {error:.3g}, so no time")
    found = timed(made)
    ratios = {name: found[name] / found[other] for name, other in fused.items()}
    return case._asdict() | {"seconds": found, "ratios": ratios}


def compare_blocks(rows: int, columns: int, depth: int) -> dict[str, Any]:
    """A row of the table of FP8 products. Raises SystemExit where two do not agree."""
    made = block_functions(rows, columns, depth)
    size = {"rows": rows, "columns": columns, "depth": depth}
    if "triton" in made and (error := differ(made["triton"](), made["library"]())) > 5e-3:
        raise SystemExit(f"FP8 product {size}: relative error {error:.3g}, so no time")
    found = timed(made)
    ratio = found["triton"] / found["library"] if "triton" in found else None
    return size | {"seconds": found, "ratio": ratio}


def show_blocks(row: dict[str, Any]) -> None:
    """Print a row of FP8 products."""
    text = "{rows:>6}{columns:>9}{depth:>7}".format(**row)
    for name in ("library", "triton"):
        seconds = row["seconds"].get(name)
        text += f"{seconds * 1e6:>10.1f}" if seconds else f"{'-':>10}"
    print(text + (f"{row['ratio']:>8.3f}" if row["ratio"] else f"{'-':>8}"), flush=True)


def show(row: dict[str, Any]) -> None:
    """Print the rows of a size: a direction each."""
    for direction in ("training", "inference", "backward"):
        us = row["seconds"][direction] * 1e6
        text = (
            "{kind:<8}{rows:>6}{depth:>6}{width:>7}".format(**row) + f"  {direction:<10}{us:>9.1f}"
        )
        for kernel in ("triton", "pairs"):
            ratio = row["ratios"].get(f"{direction}, {kernel}")
            text += f"{ratio:>8.3f}" if ratio else f"{'-':>8}"
        print(text, flush=True)


def measure(seconds: float) -> dict[str, Any]:
    """The tables, as far as the time goes."""
    from opsgraph.kernels.cublaslt.library import CublasError

    deadline = time.monotonic() + seconds
    cases = [Case(*size) for size in SIZES]
    compile_all(cases)
    print(f"compiled in {seconds - (deadline - time.monotonic()):.0f} s; us, then ratios to it")
    print("kind      rows depth  width  direction   library  triton   pairs")
    result: dict[str, Any] = {"machine": machine(), "sizes": [], "blocks": []}
    with torch.no_grad():
        for case in cases:
            if time.monotonic() > deadline:
                print(f"no time left for {tuple(case)}")
                continue
            result["sizes"].append(compare(case))
            show(result["sizes"][-1])
        print("FP8 by blocks, us\n  rows  columns  depth   library      ours   ratio")
        for size in BLOCKS:
            if time.monotonic() > deadline:
                print(f"no time left for {size}")
                continue
            try:
                result["blocks"].append(compare_blocks(*size))
            except CublasError as error:
                print(f"the library has none of {size}: {error}")
                continue
            show_blocks(result["blocks"][-1])
    return result


def main() -> None:
    """Prints the tables and writes them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=100.0)
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
