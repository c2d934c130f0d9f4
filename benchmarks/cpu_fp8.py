"""An MLP under low-precision recipes on the CPU, where their products are emulated on bf16 units.

A training step of LayerNorm, linear, GELU, linear under every recipe beside one in bf16, and how
much of it the passes over rows take: norms and activations (quantized at once or not), quantizing,
and making bf16 or fp32 numbers of quantized copies for the products. "formulas": the step with
PyTorch's formulas for the last. Then these passes alone; "gelu, blocks row" is an activation and
its row copy, by two kernels and by one. All run in alternation and are judged by medians. Prints
tables; writes JSON.

    taskset -c 0 python -m benchmarks.cpu_fp8 [--threads 1] [--repeats 9] [--rows 2048]
"""

import argparse
import datetime
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import opsgraph as og
from benchmarks.timing import alternate, machine
from opsgraph.kernels.cpu import activations, dequantize, norms
from opsgraph.kernels.cpu.launch import Kernel
from opsgraph.kernels.cpu.quantize import activation_quantize, ahead, quantize
from opsgraph.kernels.formats import Format
from opsgraph.precision import recipe as r

RECIPES: dict[str, og.recipe.Recipe | None] = {
    "bf16": None,
    "current": r.Float8CurrentScaling(),
    "delayed": r.DelayedScaling(),
    "rows": r.Float8CurrentScaling(row_wise=True),
    "rows, powers": r.Float8CurrentScaling(row_wise=True, use_power_2_scales=True),
    "blocks": r.Float8BlockScaling(),
    "mx": r.MXFP8BlockScaling(),
}
FORMULAS = ("current", "blocks", "mx")
"""Recipes that are also run with the formulas."""
PASSES = {"quantize": "quantize", "dequantize": "dequantize"}
"""The column of a kernel's name; what is in none counts as a norm or an activation."""
BF16 = torch.bfloat16
Results = dict[str, dict[str, float]]


@contextmanager
def timed_kernels() -> Iterator[Counter[str]]:
    """Seconds in C++ kernels, by column, while it is open. It reaches into the package for that."""
    spent: Counter[str] = Counter()
    call = Kernel.__call__

    def timed(self: Kernel, *values: Any) -> None:
        start = time.perf_counter()
        call(self, *values)
        name = self.name.removeprefix("opsgraph_")
        spent[PASSES.get(name, "norms, act")] += time.perf_counter() - start

    Kernel.__call__ = timed  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Kernel.__call__ = call  # type: ignore[method-assign]


def step(module: og.LayerNormMLP, recipe: og.recipe.Recipe | None, x: Tensor, dy: Tensor) -> None:
    """Forward and backward, gradients made anew as after `zero_grad`."""
    module.zero_grad()
    x.grad = None
    with og.autocast(enabled=recipe is not None, recipe=recipe):
        y = module(x)
    y.backward(dy)


def by_formulas(call: Callable[[], None]) -> None:
    """A step that dequantizes by PyTorch's formulas; it reaches into the package, too."""
    takes = dequantize._takes
    dequantize._takes = lambda data, scale, dtype: False
    try:
        call()
    finally:
        dequantize._takes = takes


def steps(rows: int, hidden: int, ffn: int, repeats: int) -> Results:
    """Milliseconds of a step by recipe, and those of its passes (medians of their own)."""
    torch.manual_seed(0)
    module = og.LayerNormMLP(hidden, ffn, activation="gelu", params_dtype=BF16, device="cpu")
    x, dy = (torch.randn(rows, hidden, dtype=BF16) for _ in range(2))
    x.requires_grad_()
    calls = {name: partial(step, module, recipe, x, dy) for name, recipe in RECIPES.items()}
    more = {f"{name}, formulas": partial(by_formulas, calls[name]) for name in FORMULAS}
    medians = {name: 1e3 * seconds for name, seconds in alternate(calls | more, repeats, 1).items()}
    found = {name: {"step": medians[name]} for name in calls}
    for name, call in calls.items():
        samples: list[Counter[str]] = []
        for _ in range(repeats):
            with timed_kernels() as spent:
                call()
            samples.append(spent)
        for column in ("norms, act", *PASSES.values()):
            values = sorted(sample[column] for sample in samples)
            found[name][column] = 1e3 * values[len(values) // 2]
        if name in FORMULAS:
            found[name]["formulas"] = medians[f"{name}, formulas"]
    return found


def after_gelu(x: Tensor, to: Format, scale: Tensor | None) -> None:
    """An activation, and its row copy by the next kernel."""
    quantize(activations.activation_forward(x, "gelu")[0], to, scale)


def passes(rows: int, width: int, repeats: int) -> dict[str, float]:
    """Milliseconds of each pass over a bf16 tensor, and of quantizing it by every scaling."""
    torch.manual_seed(0)
    x, dy, gamma = (
        torch.randn(*shape).to(BF16) for shape in ((rows, width), (rows, width), (width,))
    )
    calls: dict[str, Callable[[], Any]] = {
        "layernorm": partial(norms.norm_forward, x, gamma, gamma, 1e-5, center=True),
        "gelu": partial(activations.activation_forward, x, "gelu"),
        "gelu backward": partial(
            activations.activation_backward, dy, x, "gelu", want=("x", "bias")
        ),
    }
    scale = torch.ones(())
    for scaling in ("tensor", "delayed", "rows", "blocks", "mx"):
        delayed = scaling == "delayed"
        to, given = Format("tensor" if delayed else scaling), scale if delayed else None
        for want in (("row",), ("row", "col")):
            names = (*want, "amax") if delayed else want
            calls[f"{scaling} {' '.join(want)}"] = partial(quantize, x, to, given, names)
        if not ahead(to, given):
            pair = f"gelu, {scaling} row"
            calls[f"{pair}, two"] = partial(after_gelu, x, to, given)
            calls[f"{pair}, one"] = partial(activation_quantize, x, "gelu", to, scale=given)
    return {name: 1e3 * seconds for name, seconds in alternate(calls, 3 * repeats, 1).items()}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, value in (("rows", 2048), ("hidden", 1024), ("ffn", 4096), ("repeats", 9)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_fp8.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = {name: getattr(args, name) for name in ("rows", "hidden", "ffn")}
    print(machine(), sizes, sep="\n")
    found = steps(*sizes.values(), args.repeats)
    print(f"{'ms':20}", *(f"{name:>12}" for name in found[FORMULAS[0]]))
    for name, row in found.items():
        print(f"{name:20}", *(f"{value:12.2f}" for value in row.values()))
    alone = {
        str(width): passes(args.rows, width, args.repeats) for width in (args.hidden, args.ffn)
    }
    print(f"\n{'ms':20}", *(f"{width:>12}" for width in alone))
    for name in alone[str(args.ffn)]:
        print(f"{name:20}", *(f"{row[name]:12.2f}" for row in alone.values()))
    known = json.loads(args.output.read_text()) if args.output.exists() else {}
    known[f"{args.threads} thread(s)"] = {
        "machine": machine(), "date": datetime.date.today().isoformat(), **sizes,
        "step": found, "passes": alone,
    }  # fmt: skip
    args.output.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
