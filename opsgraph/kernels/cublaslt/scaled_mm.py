"""Scaled products `a @ b.T` by cuBLASLt, for blocks of scales, in the layouts that it reads.

An operand is `[rows, depth]`, stored by rows, with scales along rows as the quantizers of
`kernels.reference` return them. The library multiplies with its scales, so it gets `1 / scale`
of those with which the quantizer multiplied. What the calls ask of layouts: NVIDIA's cuBLAS manual,
"Narrow precision data types usage", and PyTorch's `torch.nn.functional.scaled_mm`. That function
and its two enums are new in PyTorch 2.10, and are looked up at their use: `filled` serves older
versions too. Replays know the older `torch._scaled_mm` alone, so it is called where it tells by the
scales' shapes and strides what they cover (`told`).

    format   scale covers   on      the library reads                  depth is filled up to
    blocks   1 x 128        sm_90   fp32, stored by columns            128
    squares  128 x 128      sm_90   fp32, rows filled up to 4 scales   128
    mx       1 x 32         sm_100  E8M0, in tiles (`tiles`)           32
    nvfp4    1 x 16, all    sm_100  E4M3, in tiles, and an fp32        32
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.backend import backends

if TYPE_CHECKING:
    from torch.nn.functional import ScalingType, SwizzleType

TILE_ROWS, TILE_COLS = 128, 4
"""Scales of a tile."""
ROWS = 16
"""What the result's rows are a multiple of; 4 would do for scales stored by columns."""


class Scaled(NamedTuple):
    """An operand as the library takes it: scales as numbers to multiply with, one or two kinds."""

    data: Tensor
    scales: list[Tensor]
    scalings: "list[ScalingType]"
    swizzles: "list[SwizzleType]"
    told: Tensor | None = None
    """The scales as `torch._scaled_mm` takes them, where it can tell what they cover."""


def multiply(a: Scaled, b: Scaled, rows: int, dtype: torch.dtype) -> Tensor:
    """The first rows of `a @ b.T`, `[rows, cols]`, bf16 or fp32.

    PyTorch's two calls make the same one of the library. Replays know the first.
    """
    if a.told is not None and b.told is not None:
        y = torch._scaled_mm(a.data, b.data.t(), a.told, b.told.t(), out_dtype=dtype)
    else:
        y = F.scaled_mm(
            a.data, b.data.t(), a.scales, a.scalings, b.scales, b.scalings, a.swizzles, b.swizzles,
            output_dtype=dtype,
        )  # fmt: skip
    return y[:rows]


def blocks(data: Tensor, scale: Tensor) -> Scaled:
    """FP8 `[rows, depth]` with an fp32 scale for 128 columns of a row.

    `torch._scaled_mm` takes one such scale of a row for the row's own.
    """
    data = filled(data, ROWS, 128)
    inverse = _inverse(scale.t(), data.size(0)).t()
    scaling, swizzle = F.ScalingType.BlockWise1x128, F.SwizzleType.NO_SWIZZLE
    return Scaled(data, [inverse], [scaling], [swizzle], inverse if inverse.size(1) > 1 else None)


def squares(data: Tensor, scale: Tensor) -> Scaled:
    """FP8 `[rows, depth]` with an fp32 scale for 128 x 128.

    `torch._scaled_mm` wants rows of scales that are filled up in some versions, and that are not in
    others.
    """
    across = -(-scale.size(1) // 4) * 4
    inverse = _inverse(scale, across)
    data, scaling = filled(data, 128, 128), F.ScalingType.BlockWise128x128
    told = inverse if across == scale.size(1) else None
    return Scaled(data, [inverse.t()], [scaling], [F.SwizzleType.NO_SWIZZLE], told)


def mx(data: Tensor, scale: Tensor) -> Scaled:
    """FP8 `[rows, depth]` with an E8M0 byte, which divides already, for 32 columns of a row."""
    data = filled(data, ROWS, 32)
    scales = tiles(scale).view(torch.float8_e8m0fnu)
    return Scaled(data, [scales], [F.ScalingType.BlockWise1x32], [F.SwizzleType.SWIZZLE_32_4_4])


def nvfp4(data: Tensor, scale: Tensor, factor: Tensor) -> Scaled:
    """E2M1 bytes `[rows, depth / 2]` with an E4M3 scale for 16 columns of 1 or 16 rows, and what
    all values are to be multiplied with, fp32 `[]`."""
    if scale.size(0) != data.size(0):
        scale = scale.view(torch.uint8).repeat_interleave(16, 0)[: data.size(0)]
    data = filled(data, ROWS, 16).view(torch.float4_e2m1fn_x2)
    scales = tiles(scale.view(torch.uint8)).view(torch.float8_e4m3fn)
    scalings = [F.ScalingType.BlockWise1x16, F.ScalingType.TensorWise]
    swizzles = [F.SwizzleType.SWIZZLE_32_4_4, F.SwizzleType.NO_SWIZZLE]
    return Scaled(data, [scales, factor], scalings, swizzles)


def _inverse(scale: Tensor, cols: int) -> Tensor:
    """`1 / scale` by rows, filled up with ones to `cols` columns."""
    if scale.numel() and backends()["triton"].why_not_on(scale.device) is None:
        from ..triton.inverse import inverse as by_kernel  # only where there is Triton

        return by_kernel(scale, cols)
    new = torch.empty if cols == scale.size(1) else torch.ones
    inverse = new(scale.size(0), cols, dtype=torch.float32, device=scale.device)
    torch.reciprocal(scale, out=inverse[:, : scale.size(1)])
    return inverse


def filled(data: Tensor, rows: int, cols: int) -> Tensor:
    """One-byte data by rows, filled up with zeros to multiples of rows and columns."""
    more = (0, -data.size(1) % cols, 0, -data.size(0) % rows)
    if any(more):
        return F.pad(data.view(torch.uint8), more).view(data.dtype)
    return data.contiguous()


def tiles(scale: Tensor) -> Tensor:
    """One-byte scales in tiles of 128 x 4, which lie row by row, filled up with zeros; flat.

    In a tile the scale of row r and column c is at `16 * (r % 32) + 4 * (r // 32) + c`.
    """
    scale = filled(scale, TILE_ROWS, TILE_COLS)
    split = scale.view(scale.size(0) // TILE_ROWS, 4, 32, scale.size(1) // TILE_COLS, TILE_COLS)
    return split.permute(0, 3, 2, 1, 4).contiguous().flatten()
