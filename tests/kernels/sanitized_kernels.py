"""What a process runs whose kernels are watched: by AddressSanitizer, see `test_sanitized.py`, and
on a GPU by compute-sanitizer.

Tensors begin at odd places, and their storages end where they do: what a kernel reads or writes
past an operand, its results or its own memory is reported.
`python sanitized_kernels.py SECONDS SEED [DEVICE]`; SECONDS "control" runs a kernel past its
operand. For CUDA: `PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python ...`.
"""

import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.kernels.cpu import build, launch, norms, product
from opsgraph.ops import (
    GEGLU,
    GELU,
    XIELU,
    AdaptiveLayerNorm,
    Add,
    BasicLinear,
    Bias,
    ClampedSwiGLU,
    ConstantScale,
    Dropout,
    GroupedLinear,
    L2Normalization,
    LayerNorm,
    LayerScale,
    Linear,
    LoRA,
    LoRALinear,
    RMSNorm,
    ScaledSwiGLU,
    SiLU,
    SReLU,
    SwiGLU,
    Tee,
)  # fmt: skip

WIDTHS = (1, 2, 3, 5, 7, 8, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 127, 130, 192, 257)
ROWS = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65)
RECIPES = (
    og.recipe.Float8CurrentScaling(), og.recipe.Float8CurrentScaling(row_wise=True),
    og.recipe.DelayedScaling(amax_history_len=3), og.recipe.Float8BlockScaling(),
    og.recipe.Float8BlockScaling(use_f32_scales=True), og.recipe.MXFP8BlockScaling(),
    og.recipe.NVFP4BlockScaling(),
)  # fmt: skip
NETS: dict[str, Callable[[int, int], list[nn.Module]]] = {
    "norms": lambda w, h: [LayerNorm(w), RMSNorm(w, zero_centered_gamma=True), L2Normalization()],
    "llama": lambda w, h: [RMSNorm(w), Linear(w, 2 * h, bias=False), SwiGLU(), Linear(h, w)],
    "gpt": lambda w, h: [LayerNorm(w), Linear(w, h), GELU(), Linear(h, w, bias=False)],
    "residual": lambda w, h: [Tee("r"), RMSNorm(w), Linear(w, h), SReLU(), Linear(h, w), Add("r")],
    "gated": lambda w, h: [BasicLinear(w, 2 * h), GEGLU("none"), Bias(h), SiLU()],
    "blocks": lambda w, h: [Linear(w, 8 * h), SwiGLU(4), ConstantScale(0.5), LayerScale(4 * h)],
    "clamped": lambda w, h: [Linear(w, 2 * h), ClampedSwiGLU(), Dropout(0.3), XIELU()],
    "adapted": lambda w, h: [LoRALinear(Linear(w, h), LoRA(w, h, 3), LoRA(w, h, 2)), GELU("none")],
    "adaptive": lambda w, h: [AdaptiveLayerNorm(w), Linear(w, h)],
    "grouped": lambda w, h: [GroupedLinear(3, w, 2 * h), ScaledSwiGLU(), GroupedLinear(3, h, w)],
}  # fmt: skip


device = "cpu"


def tight(shape: tuple[int, ...], dtype: torch.dtype, draw: random.Random) -> Tensor:
    """A tensor in a storage that begins with some elements more, and ends with the tensor."""
    offset = draw.choice((0, 0, 1, 3, 7))
    stride = shape[-1] + (draw.choice((0, 0, 1, 5)) if len(shape) == 2 else 0)
    rows = shape[0] if len(shape) == 2 else 1
    length = offset + (rows - 1) * stride + shape[-1] if rows and shape[-1] else offset
    memory = torch.empty(max(0, length), dtype=dtype, device=device)
    memory.copy_(torch.randn(memory.shape))
    if len(shape) == 1:
        return memory.as_strided(shape, (1,), offset)
    strides, sizes = (stride, 1), shape
    if draw.random() < 0.15 and stride == shape[-1]:  # as a transposed view
        strides, sizes = (1, max(1, shape[0])), shape
    return memory.as_strided(sizes, strides, offset)


def tighten(module: nn.Module, dtype: torch.dtype, draw: random.Random) -> None:
    """Have the parameters end where their storages do."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None and parameter.dim() <= 2:
                value = tight(tuple(parameter.shape), dtype, draw)
                with torch.no_grad():
                    value.copy_(parameter)
                setattr(part, name, nn.Parameter(value))


def extras_of(name: str, rows: int, width: int, inner: int, draw: random.Random) -> list[Any]:
    if name == "adaptive":
        return [tight((1, width), torch.float32, draw), tight((1, width), torch.float32, draw)]
    if name != "grouped":
        return []
    first, second = sorted(draw.randint(0, rows) for _ in range(2))
    sizes = [first, second - first, rows - second]
    return [sizes, tight((rows,), torch.float32, draw), sizes]


def case(draw: random.Random) -> str:
    """One module in a life of a few steps."""
    name = draw.choice(list(NETS))
    dtype = draw.choice((torch.float32, torch.bfloat16))
    recipe = draw.choice(RECIPES) if draw.random() < 0.4 else None
    width, inner = draw.choice(WIDTHS), draw.choice(WIDTHS)
    if recipe is not None:
        width, inner = 32 * draw.choice((1, 2, 3, 4, 5)), 32 * draw.choice((1, 2, 4))
    options = {"checkpoint": draw.random() < 0.2, "planner": draw.choice(("greedy", "optimal"))}
    module = og.Sequential(*NETS[name](width, inner), device=device, **options)
    tighten(module, dtype, draw)
    lengths = [draw.choice(ROWS) for _ in range(2)]
    said = f"{name} {width} {inner} {lengths} {dtype} {recipe} {options}"
    for rows in (*lengths, lengths[0], lengths[0]):
        if name == "adaptive" and not rows:
            continue
        context = nullcontext() if recipe is None else og.autocast(recipe=recipe)
        x = tight((rows, width), dtype, draw).requires_grad_()
        given = extras_of(name, rows, width, inner, draw)
        with context:
            y = module(x, *given)
            with torch.no_grad():
                module(x.detach(), *given)
        y.backward(tight(tuple(y.shape), y.dtype, draw))
    return said


def products(draw: random.Random) -> None:
    """Products of bf16 by each unit, among them sizes at the edge of a task's memory."""
    sizes = [(1092, 480, 2048), (1100, 655, 800), (520, 1040, 97)]
    sizes += [tuple(draw.randint(1, 700) for _ in range(3)) for _ in range(12)]  # type: ignore[misc]
    for unit in product.UNITS:
        if not product.room(unit, 1):
            continue
        for m, n, k in sizes:
            a, b = (tight(shape, torch.bfloat16, draw) for shape in ((m, k), (k, n)))
            out = torch.empty(m, n, dtype=torch.bfloat16)
            product.multiply(unit, a if a.stride(1) == 1 else a.contiguous(), b, out)
            if unit == product.TRANSPOSES:
                product.multiply(unit, tight((k, m), torch.bfloat16, draw).t(), b, out)


def control() -> None:
    """Reads a weight of 8 elements as if it had 64."""
    launch.verify_length = lambda *arguments: None  # type: ignore[assignment]
    norms.verify_length = launch.verify_length  # type: ignore[attr-defined]
    weight = torch.ones(8)
    norms.norm_forward(torch.randn(2, 64), weight, None, 1e-5, center=False, zero_centered=False)


def main(seconds: str, seed: int, place: str = "cpu") -> None:
    global device
    device = place
    torch.set_num_threads(1)
    names = sorted(path.stem for path in build.SOURCES.glob("*.cpp"))
    with ThreadPoolExecutor(2) as pool:  # compiled side by side
        absent = [*filter(None, pool.map(build.reason, names))]
    assert device != "cpu" or not absent, absent
    if seconds == "control":
        control()
        return
    draw, end, count = random.Random(seed), time.monotonic() + float(seconds), 0
    torch.manual_seed(seed)
    if device == "cpu":
        products(draw)
    while time.monotonic() < end or (device == "cpu" and count < 20):
        print(count, end=" ", flush=True, file=sys.stderr)
        print(case(draw), flush=True, file=sys.stderr)
        count += 1
    print(f"{count} modules")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
