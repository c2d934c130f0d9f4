"""Dropout with a counter-based mask, and the bias and the residual add around it.

The mask is a hash of (seed, position), so that nothing is saved for the backward and no generator
state is touched: `opsgraph.kernels.reference.dropout.keep_mask` is the same function in plain
PyTorch, bit for bit, and says which hash it is.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import config
from .launch import ceil_div, launch, on_device_of, packed, row_major, stride_unit


@triton.jit
def _mix(h):
    """lowbias32; `h` is uint32."""
    h = (h ^ (h >> 16)) * 0x7FEB352D
    h = (h ^ (h >> 15)) * 0x846CA68B
    return h ^ (h >> 16)


@triton.jit
def random_bits(seed, index):
    """24 bits, as int32, that depend on the seed (int64) and the flat index alone."""
    value = tl.load(seed)
    first = _mix(value.to(tl.uint32))
    second = _mix((value >> 32).to(tl.uint32) ^ first)
    h = _mix(index.to(tl.uint32) ^ first)
    h = _mix(h ^ (index >> 32).to(tl.uint32) ^ second)
    return (h & 0xFFFFFF).to(tl.int32)


@triton.jit(do_not_specialize=["threshold", "scale", "rows", "x_stride", "residual_stride"])
def dropout_kernel(
    x, seed, bias, residual, y, threshold, scale, rows, x_stride, residual_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = (row < rows) & (cols < WIDTH)
    value = tl.load(x + row * x_stride * UNIT + cols, mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + cols, cols < WIDTH, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty).to(tl.float32)
    at = row * WIDTH + cols
    value = tl.where(random_bits(seed, at) >= threshold, value * scale, 0.0).to(x.dtype.element_ty)
    if residual is not None:
        added = tl.load(residual + row * residual_stride * UNIT + cols, mask, other=0.0)
        value = value.to(tl.float32) + added.to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask)


def dropout(
    x: Tensor, seed: Tensor, p: float, residual: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """`y = drop(x + bias) + residual`; drop zeroes with probability p, else scales by 1 / (1 - p).

    x, residual, y: `[rows, width]`, y of x's dtype; bias: `[width]`. Arithmetic is in fp32; the
    biased and the dropped value are rounded to x's dtype. seed: an int64 tensor of one element on
    x's device, read by the kernel alone, so that a CUDA graph can replay with a new one.
    The gradient by x and by bias's broadcast is `dropout(dy, seed, p)`. Raises ValueError for a p
    outside [0, 1] or a seed that is no such tensor.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability must be between 0 and 1, got {p}")
    if seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != x.device:
        raise ValueError(
            f"seed must be one int64 on {x.device}, "
            f"got {seed.numel()} of {seed.dtype} on {seed.device}"
        )
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x = row_major(x)
    residual = None if residual is None else row_major(residual)
    bias = packed(bias)
    unit = stride_unit(x, residual)
    options = config(width)
    grid = (ceil_div(rows, options["ROWS"]) * ceil_div(width, options["BLOCK"]),)
    with on_device_of(x):
        # Without fusion into multiply-adds, fp32 results equal the reference's bit for bit.
        launch(
            dropout_kernel, grid,
            x, seed, bias, residual, y, round(p * 2**24), 1.0 / (1.0 - p) if p < 1.0 else 0.0,
            rows, x.stride(0) // unit, 0 if residual is None else residual.stride(0) // unit,
            UNIT=unit, WIDTH=width, **options, enable_fp_fusion=False,
        )  # fmt: skip
    return y
