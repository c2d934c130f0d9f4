"""What scaled products multiply with: `1 / scale`, laid out as the library reads it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, launch, on_device_of

CONFIG = {"R": 8, "C": 128, "num_warps": 4}


@triton.jit
def inverse_kernel(
    scale, out, rows, cols, width, row_stride, col_stride, R: tl.constexpr, C: tl.constexpr
):
    across = tl.cdiv(width, C)
    row = (tl.program_id(0) // across).to(tl.int64) * R + tl.arange(0, R)[:, None]
    col = (tl.program_id(0) % across).to(tl.int64) * C + tl.arange(0, C)[None, :]
    mask = (row < rows) & (col < cols)
    value = tl.load(scale + row * row_stride + col * col_stride, mask, other=1.0)
    one = tl.full([R, C], 1.0, tl.float32)
    tl.store(out + row * width + col, tl.div_rn(one, value), (row < rows) & (col < width))


def inverse(scale: Tensor, width: int) -> Tensor:
    """`1 / scale` rounded to nearest, fp32 `[rows, width]` by rows; ones fill it up to width.

    scale: fp32 `[rows, cols]`, of any strides, with cols at most width.
    """
    rows, cols = scale.shape
    out = torch.empty(rows, width, dtype=torch.float32, device=scale.device)
    grid = (ceil_div(rows, CONFIG["R"]) * ceil_div(width, CONFIG["C"]),)
    with on_device_of(scale):
        launch(inverse_kernel, grid, scale, out, rows, cols, width, *scale.stride(), **CONFIG)
    return out
