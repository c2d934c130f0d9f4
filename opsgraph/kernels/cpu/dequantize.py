"""The values of FP8 copies in C++; formulas and results are `kernels.reference.quantize`'s.

A product that is emulated reads a copy as bf16 or fp32 numbers. On other devices, and where there
is no library, the formulas make them.
"""

import torch
from torch import Tensor

from ..reference import quantize as reference
from . import build
from .launch import DTYPES, Kernel, address, direct, lines
from .memory import empty

_FIELDS = "6q P q P 2q P"  # struct Dequantize in source/dequantize.h
_kernel = Kernel("opsgraph_dequantize", _FIELDS, "dequantize")


SCALES = {"divisors": 0, "e8m0": 1, "factors": 2}
"""What a grid of scales holds, with the codes in source/dequantize.h."""


def decode(
    data: Tensor, dtype: torch.dtype = torch.float32, factor: Tensor | None = None
) -> Tensor:  # fmt: skip
    """The values of FP8 data in fp32 or bf16, which both hold them; strided as data is.

    factor: fp32 `[]` or `[rows, 1]`, multiplies them in fp32 before they are rounded to dtype.
    """
    if not _takes(data, factor, dtype):
        if factor is None:
            return reference.decode(data, dtype)
        return (reference.decode(data) * factor).to(dtype)
    rows, width = data.shape
    height = 1 if factor is not None and factor.dim() else rows
    return _made(data, factor, height, width, dtype, "factors")


def dequantize(
    data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, exact: bool = False
) -> Tensor:
    """`data * (1 / scale)`, in fp32 and then rounded to `dtype`; see the reference."""
    if not _takes(data, scale, dtype):
        return reference.dequantize(data, scale, dtype, exact)
    rows, width = data.shape
    if not scale.dim():
        return _made(data, scale, rows, width, dtype)
    if scale.shape == (rows, 1):
        return _made(data, scale, 1, width, dtype)
    height = 1 if scale.size(0) == rows else reference.BLOCK
    return _made(data, scale, height, reference.BLOCK, dtype)


def dequantize_mxfp8(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`data * 2^(e - 127)`, rounded once, to `dtype`; NaN for a block with e = 0xFF."""
    if not _takes(data, scale, dtype):
        return reference.dequantize_mxfp8(data, scale, dtype)
    return _made(data, scale, 1, reference.MX_BLOCK, dtype, "e8m0")


def _takes(data: Tensor, scale: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether the kernel is here, and may read such a copy."""
    if torch.compiler.is_compiling() or data.device.type != "cpu" or dtype not in DTYPES:
        return False
    return (
        direct(data, scale)
        and data.dim() == 2
        and bool(data.numel())
        and not build.reason("dequantize")
    )


def _made(
    data: Tensor, scale: Tensor | None, height: int, side: int, dtype: torch.dtype,
    scales: str = "divisors",
) -> Tensor:  # fmt: skip
    """The values of data under scales of blocks of `height` rows and `side` columns."""
    whole = scale is None or not scale.dim()
    if data.stride(0) == 1 < data.stride(1) and (whole or height == side):  # grids that transpose
        scale = None if scale is None else scale.t()
        return _made(data.t(), scale, side, height, dtype, scales).t()
    rows, width = data.shape
    y = empty((rows, width), dtype)
    data, stride = lines(data)
    scale = None if scale is None else scale.contiguous()
    _kernel(
        DTYPES[dtype], data.dtype is reference.E5M2, SCALES[scales], torch.get_num_threads(), rows,
        width, data.data_ptr(), stride, address(scale), height, side, y.data_ptr(),
    )  # fmt: skip
    return y
