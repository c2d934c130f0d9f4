"""Pointwise kernels and casts, as shares of the bandwidth of a copy of as many bytes.

Bytes are those that have to be moved: each input read once and each output written once; a scale
that comes from the tensor's own amax takes one more reading. Before each call other data go through
the cache. A function's time is that of all its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import device_time
from benchmarks.calls import attempt
from benchmarks.gpu_parts import DEVICE, Case, Options, Task, synchronize

NORMS = ((8192, 1024), (8192, 2048), (8192, 4096), (8192, 8192), (16384, 8192))
ACTIVATIONS = ((8192, 3584), (8192, 14336))
CASTS = ((8192, 4096), (28672, 4096))
"""Rows and columns of what is quantized."""
SCALINGS = ("delayed", "current", "blocks", "square", "mx", "nvfp4")
FLUSH = 2**28
"""Bytes: more than a cache has."""


class Measured(NamedTuple):
    """A function, and the bytes that it has to move."""

    call: Callable[[], Any]
    moved: float


Functions = dict[str, Measured]


def normal(*shape: int) -> Tensor:
    """Random bf16 on the device."""
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def norms(rows: int, width: int) -> Functions:
    """Both norms, forward and backward."""
    from opsgraph.kernels.triton.norms import norm_backward, norm_forward

    x, dy, weight, bias = normal(rows, width), normal(rows, width), normal(width), normal(width)
    mean, rstd = (torch.rand(rows, 1, device=DEVICE) for _ in range(2))
    size = 2 * rows * width
    layer = partial(norm_forward, x, weight, bias, 1e-5, center=True)
    return {
        "RMSNorm forward": Measured(
            partial(norm_forward, x, weight, None, 1e-5, want=("rstd",)), 2 * size
        ),
        "RMSNorm backward": Measured(
            partial(norm_backward, dy, x, None, rstd, weight), 3 * size
        ),
        "LayerNorm forward": Measured(layer, 2 * size),
        "LayerNorm backward": Measured(
            partial(norm_backward, dy, x, mean, rstd, weight, bias), 3 * size
        ),
    }  # fmt: skip


def activations(rows: int, width: int) -> Functions:
    """SwiGLU and GELU, forward and backward."""
    from opsgraph.kernels.triton.activations import activation_backward, activation_forward

    gated, x, dy, bias = (
        normal(rows, 2 * width), normal(rows, width), normal(rows, width), normal(width)
    )  # fmt: skip
    size, swiglu = 2 * rows * width, partial(activation_backward, dy, gated, "swiglu")
    with_bias = partial(activation_backward, dy, x, "gelu", want=("x", "y", "bias"))
    return {
        "SwiGLU forward": Measured(partial(activation_forward, gated, "swiglu"), 3 * size),
        "SwiGLU backward": Measured(swiglu, 5 * size),
        "SwiGLU backward with y": Measured(partial(swiglu, want=("x", "y")), 6 * size),
        "GELU forward": Measured(partial(activation_forward, x, "gelu", (), bias), 2 * size),
        "GELU backward with y and bias": Measured(with_bias, 4 * size),
    }


def formats(scaling: str, gradient: bool) -> Any:
    """How the operand of a product is quantized."""
    from opsgraph.kernels.formats import E4M3, E5M2, NVFP4, Format

    if scaling == "nvfp4":
        return NVFP4()
    if scaling in ("delayed", "current"):
        return Format("tensor", E5M2 if gradient else E4M3)
    return Format(scaling, E4M3)


def casts(rows: int, width: int, scaling: str) -> Functions:
    """Casts of a tensor, a norm's output, an activation and its gradient, one copy and both."""
    from opsgraph.kernels.triton.quantize import activation_quantize, quantize
    from opsgraph.kernels.triton.quantize_backward import activation_backward_quantize
    from opsgraph.kernels.triton.quantize_norms import norm_quantize

    x, gated, dy, weight = (
        normal(rows, width), normal(rows, 2 * width), normal(rows, width), normal(width)
    )  # fmt: skip
    scale = torch.ones((), device=DEVICE) if scaling == "delayed" else None
    forward, backward = formats(scaling, False), formats(scaling, True)
    one = rows * width
    copy = one * {"nvfp4": 0.5 + 1 / 16, "mx": 1 + 1 / 32, "blocks": 1 + 1 / 32}.get(scaling, 1.0)
    again = 2 if scaling in ("current", "nvfp4") else 1  # an amax comes first
    both = ("row", "col")
    gradient = partial(activation_backward_quantize, dy, gated, "swiglu", backward)
    normed = partial(norm_quantize, x, weight, None, 1e-5, forward, scale=scale)
    activation = partial(activation_quantize, gated, "swiglu", forward, scale=scale)
    found = {
        "cast, one copy": Measured(partial(quantize, x, forward, scale), 2 * one * again + copy),
        "cast, both copies": Measured(
            partial(quantize, x, forward, scale, both), 2 * one * again + 2 * copy
        ),
        "RMSNorm and cast, both copies": Measured(
            partial(normed, want=(*both, "rstd")), 2 * one * again + 2 * copy
        ),
        "SwiGLU and cast, one copy": Measured(activation, 4 * one * again + copy),
        "SwiGLU and cast, both copies": Measured(
            partial(activation, want=both), 4 * one * again + 2 * copy
        ),
        "SwiGLU backward and cast, both copies, y by columns": Measured(
            partial(
                gradient, scale=scale, want=both, y_to=forward, y_scale=scale, y_want=("col",)
            ),
            6 * one * again + 5 * copy,
        ),
    }  # fmt: skip
    if scaling == "square":  # of weights alone
        return {name: each for name, each in found.items() if name.startswith("cast")}
    return found


def copy_of(moved: float) -> Callable[[], Any]:
    """A copy that moves as many bytes."""
    source = torch.empty(int(moved / 2), dtype=torch.uint8, device=DEVICE)
    return partial(torch.empty_like(source).copy_, source)


def measure(
    make: Callable[[], Functions], facts: Mapping[str, Any], repeats: int
) -> dict[str, Any]:
    """Milliseconds, bytes, TB/s, and the share of the copy's."""
    functions, refused = make(), {}
    ready = {}
    for name, each in functions.items():
        _, reason = attempt(each.call)
        if reason is None:
            ready[name] = each
        else:
            refused[name] = reason
    sizes = {round(each.moved / 2**21): each.moved for each in ready.values()}
    copies = {f"copy {size}": copy_of(moved) for size, moved in sizes.items()}
    whole = torch.empty(FLUSH, dtype=torch.uint8, device=DEVICE)
    calls = {name: each.call for name, each in ready.items()} | copies
    samples = device_time.measure(calls, repeats, whole.zero_)
    found = {name: device_time.summary(each) for name, each in samples.items()}
    rates = {f"copy {size}": moved / _ms(found[f"copy {size}"]) for size, moved in sizes.items()}
    records = {}
    for name, each in ready.items():
        rate = each.moved / _ms(found[name])
        share = rate / rates[f"copy {round(each.moved / 2**21)}"]
        records[name] = found[name] | {"bytes": each.moved, "TB/s": rate * 1e-9, "share": share}
    fastest = max(rates.values(), default=0.0) * 1e-9
    return {**facts, "functions": records, "copy_TB/s": fastest, "refused": refused}


def _ms(summary: Mapping[str, Any]) -> float:
    median: float = summary["device_ms"]["median"]
    return median


def groups() -> Iterator[tuple[str, Callable[[], Functions], dict[str, Any]]]:
    """Functions that take turns: of one shape, and of one scaling."""
    for kind, make, shapes in (("norms", norms, NORMS), ("activations", activations, ACTIVATIONS)):
        for shape in shapes:
            facts = {"group": kind, "rows": shape[0], "width": shape[1]}
            yield f"{kind} {shape[0]}x{shape[1]}", partial(make, *shape), facts
    for scaling in SCALINGS:
        for shape in CASTS:
            facts = {"group": "casts", "rows": shape[0], "width": shape[1], "scaling": scaling}
            yield f"{scaling} {shape[0]}x{shape[1]}", partial(casts, *shape, scaling), facts


def cases(options: Options) -> Iterator[Case]:
    """One for each group."""
    for name, make, facts in groups():
        yield Case(name, 0.5, partial(measure, make, facts, options.repeats))


def call_all(make: Callable[[], Functions]) -> None:
    """Compile what a group needs, by calling it; what fails is told by the measurement."""
    for each in make().values():
        attempt(each.call)
    synchronize()


def tasks(options: Options) -> Iterator[Task]:
    """All groups."""
    for name, make, _ in groups():
        yield Task(name, call_all, (make,))
