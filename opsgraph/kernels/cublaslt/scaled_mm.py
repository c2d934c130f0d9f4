"""Scaled products `a @ b.T` by cuBLASLt, in the layouts that it reads.

An operand is `[rows, depth]`, stored by rows, with scales along rows as the quantizers of
`kernels.reference` return them. The library multiplies with its scales, so it gets `1 / scale`
of those with which the quantizer multiplied. What the calls ask of layouts: NVIDIA's cuBLAS manual,
"Narrow precision data types usage", and PyTorch's `torch.nn.functional.scaled_mm`.

FP8 on sm_89 and sm_90 goes through `product` (`fp8`), and blocks by squares through `blocks`, which
may have Triton multiply. All else goes through PyTorch (`multiply`), whose function and two enums
are new in PyTorch 2.10, and are looked up at their use.

    format   scale covers   on      the library reads
    tensor   all            sm_89   one fp32
    rows     a row          sm_90   fp32
    blocks   1 x 128        sm_90   fp32, stored by columns, their number a multiple of 4
    squares  128 x 128      sm_90   fp32, rows filled up to 4 scales
    mx       1 x 32         sm_100  E8M0, in tiles (`tiles`); depth filled up to 32
    nvfp4    1 x 16, all    sm_100  E4M3, in tiles, and an fp32; depth filled up to 32
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...base.backend import backends
from ..formats import FOUR, groups
from . import blocks
from . import library as lt
from .product import product

if TYPE_CHECKING:
    from torch.nn.functional import ScalingType, SwizzleType

TILE_ROWS, TILE_COLS = 128, 4
"""Scales of a tile."""
ROWS, TORCH_DEPTH = 16, 128
"""What the result's rows, and the depth of blocks, are multiples of in PyTorch's calls."""
DEPTH = 16
"""What FP8's depth is a multiple of."""


class Factors(NamedTuple):
    """FP8 `[rows, depth]` and what it is multiplied with. mode: what each covers, see `library`."""

    data: Tensor
    scale: Tensor
    mode: int


def of_tensor(data: Tensor, inverse: Tensor) -> Factors:
    """FP8 data with one scale, whose inverse is given."""
    return Factors(filled(data, 1, DEPTH), inverse, lt.TENSOR)


def of_rows(data: Tensor, scale: Tensor) -> Factors:
    """FP8 data with a scale `[rows, 1]`."""
    return Factors(filled(data, 1, DEPTH), inverse_of(scale.t(), data.size(0)), lt.ROW)


def of_blocks(
    data: Tensor, scale: Tensor, inverse: Tensor | None, rows: int, depth: int = DEPTH
) -> Factors:
    """FP8 data with a scale for 1 x 128, filled up to multiples of rows and of depth.

    inverse: `1 / scale` as `formats.inverse_shape` says, if it is there.
    """
    data = filled(data, rows, depth)
    if inverse is None or inverse.size(1) * FOUR != data.size(0):
        inverse = inverse_of(scale.t(), data.size(0))
    return Factors(data, inverse.flatten(1), lt.BLOCK)


def of_squares(
    data: Tensor, scale: Tensor, inverse: Tensor | None, rows: int = 1, depth: int = DEPTH
) -> Factors:
    """FP8 data with a scale for 128 x 128; else as `of_blocks`."""
    if inverse is None:
        inverse = inverse_of(scale, groups(scale.size(1), FOUR) * FOUR)
    return Factors(filled(data, rows, depth), inverse.flatten(1), lt.SQUARE)


def fp8(
    a: Factors, b: Factors, rows: int, dtype: torch.dtype, fast: bool, bias: Tensor | None
) -> Tensor:  # fmt: skip
    """The first rows of `a @ b.T (+ bias)`, `[rows, cols]`. Raises CublasError.

    fast: see `product`; the library has no such sums for blocks.
    """
    out = torch.empty(a.data.size(0), b.data.size(0), dtype=dtype, device=a.data.device)
    modes, whole = (a.mode, b.mode), a.mode in (lt.TENSOR, lt.ROW)
    if modes == blocks.MODES:
        blocks.multiply(out, a.data, b.data, a.scale, b.scale, bias)
    else:
        product(out, a.data, b.data.t(), (a.scale, b.scale), modes, bias, fast=fast and whole)
    return out if out.size(0) == rows else out[:rows]


class Scaled(NamedTuple):
    """An operand as the library takes it: scales as numbers to multiply with, one or two kinds."""

    data: Tensor
    scales: list[Tensor]
    scalings: "list[ScalingType]"
    swizzles: "list[SwizzleType]"


def multiply(a: Scaled, b: Scaled, rows: int, dtype: torch.dtype) -> Tensor:
    """The first rows of `a @ b.T`, `[rows, cols]`, bf16 or fp32."""
    y = F.scaled_mm(
        a.data, b.data.t(), a.scales, a.scalings, b.scales, b.scalings, a.swizzles, b.swizzles,
        output_dtype=dtype,
    )  # fmt: skip
    return y[:rows]


def of_factors(factors: Factors) -> Scaled:
    """FP8 with scales of blocks, for PyTorch's function."""
    data, scale, mode = factors
    kinds = {lt.BLOCK: F.ScalingType.BlockWise1x128, lt.SQUARE: F.ScalingType.BlockWise128x128}
    return Scaled(data, [scale.t()], [kinds[mode]], [F.SwizzleType.NO_SWIZZLE])


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


def inverse_of(scale: Tensor, cols: int) -> Tensor:
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
