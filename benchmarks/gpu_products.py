"""A step's six products: as PyTorch computes them, by opsgraph, and by all algorithms there are.

cublasLt names several algorithms for a product, the one that it expects to be fastest first, and
PyTorch takes that. Here all of them take turns, on the same operands, in bf16 and, with a scale per
tensor, in FP8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import device_time
from benchmarks.calls import attempt
from benchmarks.gpu_parts import DEVICE, Case, Options, Size, Task
from opsgraph.kernels.cublaslt import product as engine

NAMES = ("forward FC1", "forward FC2", "dgrad FC1", "dgrad FC2", "wgrad FC1", "wgrad FC2")
PYTORCH, OURS, BEST = "PyTorch", "opsgraph", "best algorithm"
DTYPES = ("bf16", "fp8")
ALIGNMENT = 16
Operands = tuple[Tensor, Tensor]


def shapes(size: Size) -> dict[str, tuple[int, int, int]]:
    """m, k and n of `[m, k] @ [k, n]`."""
    rows, hidden, ffn = size
    found = (
        (rows, hidden, 2 * ffn), (rows, ffn, hidden), (rows, 2 * ffn, hidden), (rows, hidden, ffn),
        (2 * ffn, rows, hidden), (hidden, rows, ffn),
    )  # fmt: skip
    return dict(zip(NAMES, found, strict=True))


def operands(name: str, shape: tuple[int, int, int]) -> Operands:
    """bf16 operands with the strides that a step has them in."""
    m, k, n = shape
    new = partial(torch.randn, device=DEVICE, dtype=torch.bfloat16)
    if name.startswith("forward"):
        return new(m, k), new(n, k).t()
    if name.startswith("dgrad"):
        return new(m, k), new(k, n)
    return new(k, m).t(), new(k, n)


def quantized(shape: tuple[int, int, int]) -> Operands:
    """E4M3 operands; the units for it take both along k alone."""
    m, k, n = shape
    a, b = (torch.randn(rows, k, device=DEVICE).to(torch.float8_e4m3fn) for rows in (m, n))
    return a, b.t()


def pytorch(a: Tensor, b: Tensor, scale: Tensor | None) -> Callable[[], Any]:
    """PyTorch's product."""
    if scale is None:
        return partial(torch.mm, a, b)
    return partial(
        torch._scaled_mm, a, b, scale, scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def ours(a: Tensor, b: Tensor, scale: Tensor | None) -> Callable[[], Any]:
    """opsgraph's product by the algorithm that it measures at its first call, which is here."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.bfloat16, device=a.device)
    scales = None if scale is None else (scale, scale)
    call = partial(engine.product, out, a, b, scales=scales, fast=scale is not None)
    call()
    return call


def algorithms(a: Tensor, b: Tensor, scale: Tensor | None) -> dict[str, Callable[[], Any]]:
    """By every algorithm that the library names and that runs, in its order."""
    out = torch.empty(a.shape[0], b.shape[1], dtype=torch.bfloat16, device=a.device)
    found: dict[str, Callable[[], Any]] = {}
    for number, call in enumerate(_runs(out, a, b, scale)):
        _, reason = attempt(call)
        if reason is None:
            found[f"algorithm {number}"] = call
    return found


def _runs(out: Tensor, a: Tensor, b: Tensor, scale: Tensor | None) -> list[Callable[[], Any]]:
    names, pointers = engine.lt, {}
    if scale is not None:
        pointers = dict.fromkeys((names.SCALE_A, names.SCALE_B), scale.data_ptr())
    made = engine.Product(
        out, a, b, (names.TENSOR, names.TENSOR), pointers, None, scale is not None, names.PLAIN,
        None, ALIGNMENT, 1.0,
    )  # fmt: skip
    operands = a.data_ptr(), b.data_ptr(), out.data_ptr(), list(pointers.values())
    held = (a, b, scale)  # they live as long as the call

    def run(number: int, held: Any = held) -> None:
        made.run(out, *operands, by=number)

    return [partial(run, number) for number in range(len(made.algorithms))]


class Product(NamedTuple):
    """One of the six: what multiplies it, and why others do not."""

    calls: dict[str, Callable[[], Any]]
    refused: dict[str, str]


def prepare(name: str, shape: tuple[int, int, int], dtype: str) -> Product:
    """All that can multiply one product, warm."""
    plain = dtype == "bf16"
    a, b = operands(name, shape) if plain else quantized(shape)
    scale = None if plain else torch.ones((), device=DEVICE)
    calls, refused = {PYTORCH: pytorch(a, b, scale)}, {}
    call, reason = attempt(partial(ours, a, b, scale))
    if reason is None:
        calls[OURS] = call
    else:
        refused[OURS] = reason
    found, reason = attempt(partial(algorithms, a, b, scale))
    if reason is None:
        calls |= found
    else:
        refused[BEST] = reason
    for each in calls.values():
        each()
    return Product(calls, refused)


def record_of(name: str, refused: dict[str, str], summaries: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of one product, and ratios over PyTorch's."""
    times = {key: each["device_ms"]["median"] for key, each in summaries.items()}
    numbered = [times[key] for key in times if key.startswith("algorithm")]
    if numbered:
        times[BEST] = min(numbered)
    return {
        "name": name, "ms": times, "refused": refused,
        "ratios": {key: each / times[PYTORCH] for key, each in times.items()},
        "kernels": {key: each["kernels"][0]["name"] for key, each in summaries.items()},
    }  # fmt: skip


def measure(size: Size, dtype: str, repeats: int) -> dict[str, Any]:
    """The six products of a step, and their sums."""
    made = {name: prepare(name, shape, dtype) for name, shape in shapes(size).items()}
    calls = {
        (name, key): call for name, product in made.items() for key, call in product.calls.items()
    }
    samples = device_time.measure(calls, repeats, calls)
    found = []
    for name, product in made.items():
        summaries = {key: device_time.summary(samples[name, key], 1) for key in product.calls}
        found.append(record_of(name, product.refused, summaries))
    sums = {
        key: sum(each["ms"][key] for each in found)
        for key in (PYTORCH, OURS, BEST)
        if all(key in each["ms"] for each in found)
    }
    rows, hidden, ffn = size
    return {
        "rows": rows, "hidden": hidden, "ffn": ffn, "dtype": dtype, "products": found,
        "sums_ms": sums, "ratios": {key: each / sums[PYTORCH] for key, each in sums.items()},
    }  # fmt: skip


def cases(options: Options) -> Iterator[Case]:
    """One for each size and dtype."""
    for size in options.sizes:
        rows, hidden, ffn = size
        step = rows * hidden * ffn * 18 / 7e14
        for dtype in DTYPES:
            seconds = 1 + 20 * options.repeats * step * (1 if dtype == "bf16" else 0.2)
            name = f"{'x'.join(map(str, size))} {dtype}"
            yield Case(name, seconds, partial(measure, size, dtype, options.repeats))


def tasks(options: Options) -> Iterator[Task]:
    """Nothing is compiled."""
    yield from ()
