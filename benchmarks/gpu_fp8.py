"""FP8 beside bf16 on a CUDA device: GEMMs, casts and whole MLP blocks; `benchmarks.gpu --fp8`.

GEMM: `x @ w.T` in bf16, and of operands that are quantized already. Cast: what one reading of x
costs as norm, norm and quantize, and quantize with both copies. Block: RMSNorm, Linear, SwiGLU,
Linear, forward and backward, in bf16 and under the FP8 recipes. Graph: the same as a CUDA graph,
which leaves out what the host takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import opsgraph as og
from benchmarks.calls import Captured
from benchmarks.timing import alternate
from opsgraph.fusers.cublaslt.products import scaled_mm
from opsgraph.kernels.formats import NVFP4, Format
from opsgraph.kernels.triton import norms, quantize, quantize_norms
from opsgraph.ops import Linear, RMSNorm, SwiGLU
from opsgraph.precision import recipe as recipes
from opsgraph.quantizers import TensorQuantizer

RECIPES = {
    "bf16": None,
    "current": recipes.Float8CurrentScaling(),
    "rows": recipes.Float8CurrentScaling(row_wise=True),
    "delayed": recipes.DelayedScaling(amax_history_len=16),
    "blocks": recipes.Float8BlockScaling(),
    "mx": recipes.MXFP8BlockScaling(),
    "nvfp4": recipes.NVFP4BlockScaling(),
}
Calls = dict[str, Callable[[], Any]]


def timed(calls: Calls, rounds: int, inner: int = 5) -> dict[str, float]:
    """Median milliseconds of each, in alternation."""
    found = alternate(calls, rounds, inner, torch.cuda.synchronize)
    return {name: 1e3 * seconds for name, seconds in found.items()}


def gemms(x: Tensor, weight: Tensor) -> Calls:
    """The forward product, plain and of quantized operands."""
    quantizer = TensorQuantizer(torch.float8_e4m3fn)
    a, b = quantizer(x, ("row",)).row, quantizer(weight, ("row",)).row
    return {
        "bf16": lambda: F.linear(x, weight),
        "fp8": lambda: scaled_mm(a, b, x.dtype, fast=True),
    }


def casts(x: Tensor, gamma: Tensor) -> Calls:
    """A norm, a norm whose output is quantized, and quantization alone, each from x."""
    scale = torch.ones((), device=x.device)
    to, both = Format("tensor"), ("row", "col")
    return {
        "copy": lambda: x.clone(),
        "norm": lambda: norms.norm_forward(x, gamma, None, 1e-5, want=("rstd",)),
        "norm+quantize (delayed)": lambda: quantize_norms.norm_quantize(
            x, gamma, None, 1e-5, to, scale=scale
        ),
        "norm+quantize (current)": lambda: quantize_norms.norm_quantize(x, gamma, None, 1e-5, to),
        "quantize, both copies (delayed)": lambda: quantize.quantize(x, to, scale, both),
        "quantize, both copies (current)": lambda: quantize.quantize(x, to, None, both),
        "quantize, both copies (mx)": lambda: quantize.quantize(x, Format("mx"), None, both),
        "quantize, both copies (nvfp4)": lambda: quantize.quantize(x, NVFP4(), None, both),
        "quantize, both copies (nvfp4, as gradients)": lambda: quantize.quantize(
            x, NVFP4(1, True, True), None, both
        ),
    }


def blocks(x: Tensor, ffn: int) -> tuple[Calls, dict[str, str]]:
    """A step of a block under each recipe, and their plans."""
    hidden, dy = x.shape[-1], torch.randn_like(x)
    place: dict[str, Any] = {"device": x.device, "dtype": x.dtype}
    module = og.Sequential(
        RMSNorm(hidden), Linear(hidden, 2 * ffn, False), SwiGLU(), Linear(ffn, hidden, False),
        **place,
    )  # fmt: skip
    leaf = x.detach().requires_grad_()

    def step(chosen: recipes.Recipe | None) -> None:
        module.zero_grad(set_to_none=True)
        leaf.grad = None
        with og.autocast(chosen is not None, chosen):
            y = module(leaf)
        y.backward(dy)

    plans = {}
    for name, chosen in RECIPES.items():
        with og.autocast(chosen is not None, chosen):
            plans[name] = str(module.plan())
    return {name: (lambda c=c: step(c)) for name, c in RECIPES.items()}, plans  # type: ignore[misc]


def measure(rows: int, hidden: int, ffn: int, rounds: int) -> dict[str, Any]:
    """All figures for one size, in milliseconds; printed as they come."""
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
    weight, gamma = torch.randn(2 * ffn, hidden).to(x), torch.ones(hidden).to(x)
    calls, plans = blocks(x, ffn)
    parts = {
        "gemm": gemms(x, weight),
        "cast": casts(x, gamma),
        "block": calls,
        "graph": {name: Captured(call) for name, call in calls.items()},
    }
    result: dict[str, Any] = {"rows": rows, "hidden": hidden, "ffn": ffn, "plans": plans}
    for part, candidates in parts.items():
        result[part] = timed(candidates, rounds)
        first = next(iter(result[part]))
        for name, found in result[part].items():
            ratio = found / result[part][first]
            print(f"{rows:6} {hidden:5} {ffn:6}  {part:6} {name:34} {found:9.3f} ms {ratio:6.2f}")
    return result
