"""Emulated products of quantized operands, beside those of bf16 and fp32 tensors.

For every recipe the forward product of a linear layer and its weight gradient, of operands that are
quantized already: by fp32 units, and by bf16 units where these will do on that device ("here").
Every case runs in alternation and is judged by medians.

    python -m benchmarks.emulated [--device cuda] [--rows 2048] [--hidden 1024] [--ffn 4096]
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.timing import alternate, machine
from opsgraph.precision import products as scaled_gemm
from opsgraph.precision import recipe as r

RECIPES = {
    "current": r.Float8CurrentScaling(),
    "rows": r.Float8CurrentScaling(row_wise=True),
    "rows, powers": r.Float8CurrentScaling(row_wise=True, use_power_2_scales=True),
    "blocks": r.Float8BlockScaling(),
    "f32 blocks": r.Float8BlockScaling(use_f32_scales=True),
    "mx": r.MXFP8BlockScaling(),
    "nvfp4": r.NVFP4BlockScaling(),
}
Calls = dict[str, Callable[[], Any]]


def on_fp32_units(call: Callable[[], Any]) -> Callable[[], Any]:
    """The same where bf16 units are taken to do for no operand."""
    known = scaled_gemm._units

    def run() -> None:
        scaled_gemm._units = lambda data, dtype: set()
        try:
            call()
        finally:
            scaled_gemm._units = known

    return run


def calls(rows: int, hidden: int, ffn: int, device: str) -> Calls:
    """Every case by its name."""
    torch.manual_seed(0)
    shapes = (rows, hidden), (ffn, hidden), (rows, ffn)
    x, weight, dy = (torch.randn(*shape, device=device) for shape in shapes)
    found: Calls = {}
    for dtype in (torch.float32, torch.bfloat16):
        plain = [tensor.to(dtype) for tensor in (x, weight, dy)]
        name = str(dtype).removeprefix("torch.")
        found[f"{name} forward"] = lambda p=plain: F.linear(p[0], p[1])  # type: ignore[misc]
        found[f"{name} wgrad"] = lambda p=plain: p[2].t() @ p[0]  # type: ignore[misc]
    for name, recipe in RECIPES.items():
        made = [
            recipe.quantizer(role)(tensor.bfloat16())
            for role, tensor in (("activation", x), ("weight", weight), ("gradient", dy))
        ]
        products: Calls = {
            "forward": lambda m=made: scaled_gemm.forward(m[0], m[1]),  # type: ignore[misc]
            "wgrad": lambda m=made: scaled_gemm.wgrad(m[2], m[0]),  # type: ignore[misc]
        }
        for product, call in products.items():
            found[f"{name} {product}, fp32 units"] = on_fp32_units(call)
            found[f"{name} {product}, here"] = call
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    for option, value in (("rows", 2048), ("hidden", 1024), ("ffn", 4096), ("repeats", 9)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    print(machine(), f"rows {args.rows}, hidden {args.hidden}, ffn {args.ffn}", sep="\n")
    cases = calls(args.rows, args.hidden, args.ffn, args.device)
    found = alternate(cases, args.repeats, 1, wait)
    for name, seconds in found.items():
        print(f"{name:32} {1e3 * seconds:8.2f} ms")


if __name__ == "__main__":
    main()
