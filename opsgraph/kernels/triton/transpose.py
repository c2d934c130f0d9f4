"""The transpose of quantized bytes.

Where the row and the column copy have the same codes, the kernel that reads the source writes one
of them, in long pieces, and this one turns it: it reads one byte a value and computes nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import ceil_div, launch, on_device_of

CONFIG = {"R": 64, "C": 64, "num_warps": 4}


@triton.jit(do_not_specialize=["rows"])
def transpose_kernel(
    data, out, rows, ROW_UNIT: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, C: tl.constexpr
):
    rows = rows * ROW_UNIT
    across: tl.constexpr = (WIDTH + C - 1) // C
    row = (tl.program_id(0) // across) * R + tl.arange(0, R)
    col = (tl.program_id(0) % across) * C + tl.arange(0, C)
    inside = (row < rows)[:, None] & (col < WIDTH)[None, :]
    tile = tl.load(data + row.to(tl.int64)[:, None] * WIDTH + col[None, :], inside, other=0)
    at = col.to(tl.int64)[:, None] * rows + row[None, :]
    tl.store(out + at, tl.trans(tile), tl.trans(inside))


def transposed(data: Tensor) -> Tensor:
    """`data.t()` of a dense matrix of bytes (FP8 or uint8), dense."""
    rows, width = data.shape
    out = torch.empty(width, rows, dtype=data.dtype, device=data.device)
    if not data.numel():
        return out
    unit = 16 if rows % 16 == 0 else 1
    with on_device_of(data):
        launch(
            transpose_kernel, (ceil_div(rows, CONFIG["R"]) * ceil_div(width, CONFIG["C"]),),
            data.view(torch.uint8), out.view(torch.uint8), rows // unit,
            ROW_UNIT=unit, WIDTH=width, **CONFIG,
        )  # fmt: skip
    return out
