"""RMSNorm and LayerNorm, forward and backward, with the residual add on either side.

One kernel serves both norms: with `xc = x - mean` (or `x` for RMSNorm), `m = dy * weight`,
`rstd = rsqrt(mean(xc^2) + eps)` and `n = xc * rstd`,

    y  = n * weight + bias
    dx = rstd * (m + b * n + a),   b = -mean(m * n),   a = -mean(m) or 0
    dweight = sum(dy * n),   dbias = sum(dy)

Rows of up to `NARROW` columns (forward) or `NARROW` bytes (backward) are held in registers, each
read once. Wider ones are read twice, in column blocks, so that no width spills or raises. Row
counts are never compile-time constants. zero_centered and normalized_dtype, and with the latter y's
dtype: as the formulas in `kernels/reference/norms.py` have them.
"""

from collections.abc import Collection
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..configs import around, configured
from ..reference.norms import dtypes_of
from ..reference.scales import dtype_of
from .launch import (
    ceil_div,
    launch,
    multiprocessors,
    on_device_of,
    packed,
    row_major,
    shared_memory,
    stride_unit,
    sum_partials,
)
from .norm_kernels import (
    backward_kernel,
    backward_wide_dots_kernel,
    backward_wide_kernel,
    forward_kernel,
    forward_wide_kernel,
)

NARROW = 32768
DOTS_CONFIG = {"BLOCK": 4096, "num_warps": 8}
# Said outright: Triton's own default changes from fused to separate multiply-adds in 3.10.
FUSION = {"enable_fp_fusion": True}
ROUNDED = {None: None, torch.float32: None, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
"""What kernels round an fp32 value to, by the dtype."""


def forward_config(width: int, itemsize: int = 2) -> dict[str, int]:
    """Compile options of the forward kernel for rows of `width` columns."""
    return configured("norm_forward", (width, itemsize), _forward_configs)


def backward_config(width: int, itemsize: int = 2, both: bool = False) -> dict[str, int]:
    """Compile options of the backward kernel; both: it sums two parameter gradients."""
    return configured("norm_backward", (width, itemsize, both), _backward_configs)


@cache
def _forward_configs(width: int, itemsize: int) -> tuple[dict[str, int], ...]:
    return around(_forward(width, itemsize), ROWS=(1, 64), num_warps=(2, 16))


@cache
def _backward_configs(width: int, itemsize: int, both: bool) -> tuple[dict[str, int], ...]:
    return around(_backward(width, itemsize, both), ROWS=(1, 32), num_warps=(2, 16))


def _forward(width: int, itemsize: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    if width > NARROW:
        return {"BLOCK": 16384 if itemsize == 2 else 8192, "num_warps": 16}
    if block < 2048:
        return {"CHUNKS": 1, "ROWS": min(32, 2048 // block), "COLS": block, "num_warps": 4}
    warps = 4 if block <= 4096 else 8 if block <= 8192 else 16
    return {"CHUNKS": block // (warps * 256), "ROWS": 1, "COLS": warps * 256, "num_warps": warps}


def _backward(width: int, itemsize: int, both: bool) -> dict[str, int]:
    """With two sums the widest rows fill the registers, so x and dy are loaded again for dx: on an
    H100 5% to 11% faster than spilling (for one sum, slower)."""
    block = triton.next_power_of_2(width)
    if width * itemsize > NARROW:
        return {"BLOCK": 1024, "ROWS": 2, "num_warps": 4 if itemsize == 2 else 8}
    # Measured on an H200. The next rows, and the weight, wait in registers where there is room.
    held = both and itemsize == 2 and block <= 8192
    warps = 4 if block <= (1024 if held else 2048) else 8 if block <= 4096 else 16
    cols = block if block > 8192 else min(block, warps * 256)
    return {
        "CHUNKS": block // cols, "ROWS": max(1, min(16, (512 * warps if held else 1024) // block)),
        "COLS": cols, "HOIST": held or (both and block <= 1024),
        "AHEAD": held or (itemsize == 2 and block <= 4096 and not both),
        "AGAIN": both and block > 8192, "num_warps": warps,
    }  # fmt: skip


def _stages(config: dict[str, int], dy: Tensor, x: Tensor, *others: Tensor | None) -> int:
    """2 for the widest rows, to load the next ones ahead into shared memory, if they fit in it."""
    columns = config["CHUNKS"] * config["COLS"]
    if columns <= 8192:
        return 1
    loaded = (dy, x, dy, x, *others) if config["AGAIN"] else (dy, x, *others)
    size = columns * sum(0 if t is None else t.element_size() for t in loaded)
    return 2 if size + 1024 <= shared_memory(x.device) else 1


def _programs_per_multiprocessor(width: int, itemsize: int, both: bool) -> int:
    """As many as fit in its registers."""
    for limit, one, two, held in (
        (1024, 6, 8, 4),
        (2048, 5, 4, 2),
        (4096, 2, 2, 2),
        (8192, 2, 1, 1),
    ):
        if width <= limit:
            return one if not both else held if itemsize == 2 else two
    return 1


def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, zero_centered: int = 0,
    other: Tensor | None = None, center: bool = False, want: Collection[str] = ("mean", "rstd"),
    normalized_dtype: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """y by the formula at the top of this file, of x or of `x + other`.

    center: LayerNorm, else RMSNorm. x, other, total: `[rows, width]`, total of the dtype to which
    PyTorch promotes; the sum is rounded to it before the norm reads it. weight, bias: `[width]` of
    any float dtype or None; `1 + weight` counts when zero_centered. mean, rstd: fp32 `[rows, 1]`,
    the mean of centred values alone. Returns (y, mean, rstd, total), None for what is not in want,
    or not there.
    """
    rows, width = x.shape
    read = x.dtype if other is None else dtype_of(x.dtype, other.dtype)
    to = dtypes_of(read, weight, bias, normalized_dtype)
    y = torch.empty(rows, width, dtype=to.y, device=x.device)
    total = None if other is None else torch.empty(rows, width, dtype=read, device=x.device)
    new = torch.empty if y.numel() else torch.zeros
    mean, rstd = (
        new(rows, 1, dtype=torch.float32, device=x.device) if there and name in want else None
        for name, there in (("mean", center), ("rstd", True))
    )
    if not y.numel():
        return y, mean, rstd, total
    x = row_major(x)
    other = None if other is None else row_major(other)
    weight, bias = packed(weight), packed(bias)
    unit = stride_unit(x, other)
    config = forward_config(width, read.itemsize)
    kernel = forward_wide_kernel if width > NARROW else forward_kernel
    grid = (ceil_div(rows, config.get("ROWS", 1)),)
    with on_device_of(x):
        launch(
            kernel, grid,
            x, other, weight, bias, y, total, mean, rstd,
            rows, x.stride(0) // unit, 0 if other is None else other.stride(0) // unit,
            UNIT=unit, WIDTH=width, EPS=eps, ZERO_CENTERED=int(zero_centered), CENTER=center,
            NORMALIZED=ROUNDED[to.normalized], PRODUCT=ROUNDED[to.product], **config,
            # A fused multiply-add of bf16 would lose the rounding between the weight and the bias.
            enable_fp_fusion=to.product is None,
        )  # fmt: skip
    return y, mean, rstd, total


def norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None = None, zero_centered: int = 0, dother: Tensor | None = None,
    want: Collection[str] = ("x", "weight", "bias"), normalized_dtype: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of `norm_forward`, by the formula at the top of this file, plus dother in dx.

    dy, x, dother: `[rows, width]`; x is what the norm read (the total, where there was one). mean:
    None for RMSNorm, which has no bias. Returns (dx in x's dtype, dweight in weight's, dbias in
    bias's, without one in weight's or x's), None for what is not in want; the last two are
    `[width]`, summed in fp32 and in a fixed order.
    """
    rows, width = x.shape
    new = torch.empty if x.numel() else torch.zeros
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device) if "x" in want else None
    dweight = dbias = None
    if "weight" in want and weight is not None:
        dweight = new(width, dtype=weight.dtype, device=x.device)
    if "bias" in want and mean is not None:
        like = next(t for t in (bias, weight, x) if t is not None)
        dbias = new(width, dtype=like.dtype, device=x.device)
    if not x.numel() or (dx is None and dweight is None and dbias is None):
        return dx, dweight, dbias
    dy, x, rstd = row_major(dy), row_major(x), rstd.contiguous()
    mean, weight = packed(mean), packed(weight)
    dother = None if dother is None else row_major(dother)
    unit = stride_unit(dy, x, dother)
    strides = dy.stride(0) // unit, x.stride(0) // unit
    last = 0 if dother is None else dother.stride(0) // unit
    both = dweight is not None and dbias is not None
    config = backward_config(width, x.element_size(), both)
    narrow = "CHUNKS" in config
    if narrow:
        most = multiprocessors(x.device) * _programs_per_multiprocessor(
            width, x.element_size(), both
        )
    else:
        blocks = ceil_div(width, config["BLOCK"])
        most = max(1, multiprocessors(x.device) * 8 // blocks)
    programs = min(ceil_div(rows, config["ROWS"]), most)
    into = [
        None if made is None else torch.empty(programs, width, dtype=torch.float32, device=x.device)
        for made in (dweight, dbias)
    ]
    flags = {"UNIT": unit, "WIDTH": width, "ZERO_CENTERED": int(zero_centered)}
    normalized = ROUNDED[dtypes_of(x, weight, bias, normalized_dtype).normalized]
    with on_device_of(x):
        if narrow:
            launch(
                backward_kernel, (programs,),
                dy, x, mean, rstd, weight, dother, dx, *into, rows, *strides, last,
                NORMALIZED=normalized, **flags, **config, **FUSION,
                STAGES=_stages(config, dy, x, weight, dother),
            )  # fmt: skip
        else:
            dots = torch.empty(rows, 2, dtype=torch.float32, device=x.device)
            if dx is not None:
                launch(
                    backward_wide_dots_kernel, (rows,),
                    dy, x, mean, rstd, weight, dots, *strides, **flags, **DOTS_CONFIG, **FUSION,
                )  # fmt: skip
            launch(
                backward_wide_kernel, (blocks, programs),
                dy, x, mean, rstd, weight, dother, dx, *into, dots, rows, *strides, last,
                NORMALIZED=normalized, **flags, **config, **FUSION,
            )  # fmt: skip
        sum_partials(into[0], dweight, into[1], dbias)
    return dx, dweight, dbias
