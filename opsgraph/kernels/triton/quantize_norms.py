"""RMSNorm and LayerNorm whose output is quantized instead of stored, with a residual add before.

The output is rounded to x's dtype before it is quantized, so that the copies are those of
`norms.py`'s output, bit for bit. A row copy with a given scale, or with scales by rows, blocks or
MX, is written by the kernel that finds the statistics, in one reading of x. What needs more than a
row reads x again, the statistics being known: the column copy, a tensor's scale from its own
amax (which the first reading gives), blocks of 128 x 128, and rows wider than `norms.NARROW`.
"""

from collections.abc import Collection
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import BLOCKS, NVFP4, Copies, Format, Target, check
from .launch import ceil_div, launch, on_device_of, packed, row_major, stride_unit
from .norm_kernels import STRIDES, forward_wide_kernel, normalized
from .norms import FUSION, NARROW, forward_config
from .quantize import Output, constants, copies, new_output
from .quantize_kernels import store_amax, store_copies
from .source import Source


@triton.jit(do_not_specialize=STRIDES)
def norm_quantize_kernel(
    x, other, weight, bias, total, mean, rstd, data, scale, given, amax,
    rows, x_stride, other_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, NORM_EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    CENTER: tl.constexpr, C: tl.constexpr, R: tl.constexpr, SCALING: tl.constexpr,
    BLOCK: tl.constexpr, E5M2: tl.constexpr, EPS: tl.constexpr, POWER_OF_TWO: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """`norm_kernels.forward_kernel`, but for what becomes of its output."""
    cols = tl.arange(0, C)[None, :]
    first_row = tl.program_id(0) * R
    row = first_row.to(tl.int64) + tl.arange(0, R)[:, None]
    value = normalized(
        x, other, weight, bias, total, mean, rstd, row, rows, x_stride * UNIT, other_stride * UNIT,
        WIDTH, NORM_EPS, ZERO_CENTERED, CENTER, C,
    )  # fmt: skip
    mask = (row < rows) & (cols < WIDTH)
    value = tl.where(mask, value.to(x.dtype.element_ty).to(tl.float32), 0.0)
    if amax is not None:
        store_amax(value, amax + tl.program_id(0))
    store_copies(
        value, first_row, 0, rows, WIDTH, WIDTH, data, scale, None, None, given,
        R, C, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
    )  # fmt: skip


class _Norm(NamedTuple):
    """What both norms' functions are given."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    zero_centered: bool
    center: bool


class _Rows(NamedTuple):
    """What one reading of x gives."""

    total: Tensor | None
    mean: Tensor | None
    rstd: Tensor
    amax: Tensor | None


def _read(x: Tensor, other: Tensor | None, norm: _Norm, to: Format, output: Output) -> _Rows:
    """The statistics, and of rows up to NARROW the row copy of output and its amax."""
    rows, width = x.shape
    new = torch.empty if x.numel() else torch.zeros
    total = None if other is None else torch.empty(rows, width, dtype=x.dtype, device=x.device)
    mean, rstd = (new(rows, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    read = _Rows(total, mean if norm.center else None, rstd, None)
    if not x.numel():
        return read
    x, other = row_major(x), None if other is None else row_major(other)
    unit, config = stride_unit(x, other), forward_config(width, x.element_size())
    strides = x.stride(0) // unit, 0 if other is None else other.stride(0) // unit
    flags = dict(
        UNIT=unit, WIDTH=width, ZERO_CENTERED=norm.zero_centered, CENTER=norm.center, **FUSION
    )
    if width > NARROW:
        with on_device_of(x):
            launch(
                forward_wide_kernel, (rows,),
                x, other, None, None, None, *read[:3], rows, *strides, EPS=norm.eps, **flags,
                **config,
            )  # fmt: skip
        return read
    programs = ceil_div(rows, config["ROWS"])
    amax = torch.empty(programs, dtype=torch.float32, device=x.device) if output.amax else None
    whole = config["BLOCK"]
    with on_device_of(x):
        launch(
            norm_quantize_kernel, (programs,),
            x, other, packed(norm.weight), packed(norm.bias), *read[:3],
            *output.operands(None)[:2], output.given, amax, rows, *strides, NORM_EPS=norm.eps,
            C=whole, R=config["ROWS"],
            SCALING="blocks" if to.scaling == "rows" else to.scaling,
            BLOCK=whole if to.scaling == "rows" else min(BLOCKS[to.scaling], whole),
            num_warps=config["num_warps"], **constants(to, x.device), **flags,
        )  # fmt: skip
    return read._replace(amax=None if amax is None else amax.amax())


def norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, to: Target,
    zero_centered: bool = False, other: Tensor | None = None, center: bool = False,
    scale: Tensor | None = None, want: Collection[str] = ("row", "mean", "rstd"),
) -> tuple[Copies, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`quantize(y, to, scale, want)` of `y, mean, rstd, total = norm_forward(x, ...)`.

    Returns (copies of y, mean, rstd, total), as those two give them; y is never stored.
    """
    check(to, scale, want)
    norm = _Norm(weight, bias, eps, zero_centered, center)
    rows, width = x.shape
    narrow, wanted = width <= NARROW, set(want)
    first = Format("tensor") if isinstance(to, NVFP4) else to  # NVFP4 too needs the amax first
    output = Output(amax=narrow and first.scaling == "tensor" and (scale is None or "amax" in want))
    if narrow and (scale is not None or first.scaling in ("rows", "blocks", "mx")):
        output = new_output(rows, width, first, x, scale, wanted & {"row", "amax"}, None)
        wanted -= {"row"}
    read = _read(x, other, norm, first, output)
    source = Source(
        "norm", x if read.total is None else read.total, width, bias, weight, read.mean,
        read.rstd, zero_centered=zero_centered,
    )  # fmt: skip
    rest = copies(source, to, scale, wanted, read.amax)
    mean, rstd = read.mean if "mean" in want else None, read.rstd if "rstd" in want else None
    return rest._replace(row=output.row or rest.row), mean, rstd, read.total
