"""RMSNorm and LayerNorm whose output is quantized instead of stored, with a residual add before.

The output is rounded to x's dtype before it is quantized, so that the copies are those of
`norms.py`'s output, bit for bit. A row copy with a given scale, or with scales by rows, blocks or
MX, is written by the kernel that finds the statistics, in one reading of x; with a given scale the
column copy is the transpose of its bytes. What needs more than a row reads x again, the statistics
being known: other column copies, a tensor's scale from its own amax (which the first reading
gives), blocks of 128 x 128, and rows wider than `norms.NARROW`.
"""

from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..formats import BLOCKS, NVFP4, Copies, Format, Target, check
from .launch import (
    ceil_div,
    launch,
    on_device_of,
    packed,
    row_major,
    stride_unit,
)
from .norm_kernels import STRIDES, columns_of, forward_wide_kernel, normalized
from .norms import FUSION, NARROW, forward_config
from .quantize import Output, constants, copies, new_output
from .quantize_kernels import (
    current_scale,
    encode,
    scaled,
    store_amax,
    store_copies,
    store_tensor_scale,
)
from .source import Source
from .transpose import transposed


@triton.jit(do_not_specialize=STRIDES)
def norm_quantize_kernel(
    x, other, weight, bias, total, mean, rstd, data, scale, inverse, given, amax,
    rows, x_stride, other_stride,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, NORM_EPS: tl.constexpr, ZERO_CENTERED: tl.constexpr,
    CENTER: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    SCALING: tl.constexpr, BLOCK: tl.constexpr, E5M2: tl.constexpr, EPS: tl.constexpr,
    POWER_OF_TWO: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """`norm_kernels.forward_kernel`, but for what becomes of its output."""
    cols, there = columns_of(WIDTH, CHUNKS, COLS)
    first_row = tl.program_id(0) * ROWS
    row = first_row.to(tl.int64) + tl.arange(0, ROWS)[None, :, None]
    multiplier = current_scale(given, scale, SCALING, E5M2, EPS, POWER_OF_TWO)
    value = normalized(
        x, other, weight, bias, total, mean, rstd, row, rows, x_stride.to(tl.int64) * UNIT,
        other_stride.to(tl.int64) * UNIT, WIDTH, NORM_EPS, ZERO_CENTERED, CENTER, CHUNKS, COLS,
    )  # fmt: skip
    mask = (row < rows) & there
    value = tl.where(mask, value.to(x.dtype.element_ty).to(tl.float32), 0.0)
    if amax is not None:
        store_amax(value, amax + tl.program_id(0))
    if data is not None and SCALING == "tensor":
        codes = encode(scaled(value, multiplier), E5M2, NATIVE)
        # With 16 bytes a thread, which coalescing prefers, the codes would go through memory.
        at = tl.max_contiguous(row * WIDTH + cols, [1, 1, 8])
        tl.store(data + at, codes, mask)
    elif data is not None:
        tile = tl.reshape(tl.permute(value, 1, 0, 2), [ROWS, CHUNKS * COLS])
        store_copies(
            tile, multiplier, first_row, 0, rows, WIDTH, WIDTH, data, scale, None, inverse, given,
            ROWS, CHUNKS * COLS, SCALING, BLOCK, E5M2, EPS, POWER_OF_TWO, NATIVE,
        )  # fmt: skip
    store_tensor_scale(multiplier, scale, inverse, SCALING)


def _read(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, zero_centered: int,
    other: Tensor | None, center: bool, to: Format, output: Output,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:  # fmt: skip
    """The sum, mean and rstd; of rows up to NARROW the row copy of output, and its amax as well."""
    rows, width = x.shape
    new = torch.empty if x.numel() else torch.zeros
    total = None if other is None else torch.empty(rows, width, dtype=x.dtype, device=x.device)
    mean, rstd = (new(rows, 1, dtype=torch.float32, device=x.device) for _ in range(2))
    read = total, mean if center else None, rstd
    if not x.numel():
        return *read, None
    x, other = row_major(x), None if other is None else row_major(other)
    unit, config = stride_unit(x, other), forward_config(width, x.element_size())
    strides = x.stride(0) // unit, 0 if other is None else other.stride(0) // unit
    flags = dict(UNIT=unit, WIDTH=width, ZERO_CENTERED=int(zero_centered), CENTER=center, **FUSION)
    if width > NARROW:
        with on_device_of(x):
            launch(
                forward_wide_kernel, (rows,),
                x, other, None, None, None, *read, rows, *strides, EPS=eps, **flags, **config,
            )  # fmt: skip
        return *read, None
    # As norm_forward has it: another order of sums would now and then round y to another value.
    whole = config["CHUNKS"] * config["COLS"]
    block = whole if to.scaling == "rows" else min(BLOCKS[to.scaling], whole)
    programs = ceil_div(rows, config["ROWS"])
    amax = torch.empty(programs, dtype=torch.float32, device=x.device) if output.amax else None
    data, data_scale, _, inverse, given, _ = output.operands(None)
    with on_device_of(x):
        launch(
            norm_quantize_kernel, (programs,),
            x, other, packed(weight), packed(bias), *read,
            data, data_scale, inverse, given, amax, rows, *strides, NORM_EPS=eps,
            SCALING="blocks" if to.scaling == "rows" else to.scaling, BLOCK=block,
            **config, **constants(to, x.device), **flags,
        )  # fmt: skip
        return *read, output.found(amax)


def norm_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, to: Target,
    zero_centered: int = 0, other: Tensor | None = None, center: bool = False,
    scale: Tensor | None = None, want: Collection[str] = ("row", "mean", "rstd"),
) -> tuple[Copies, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`quantize(y, to, scale, want)` of `y, mean, rstd, total = norm_forward(x, ...)`.

    Returns (copies of y, mean, rstd, total), as those two give them; y is never stored.
    """
    check(to, scale, want)
    rows, width = x.shape
    narrow, wanted = width <= NARROW, set(want)
    first = Format("tensor") if isinstance(to, NVFP4) else to  # NVFP4 too needs the amax first
    finds = scale is None or "amax" in want
    output = Output(amax=narrow and first.scaling == "tensor" and finds)
    if narrow and (scale is not None or first.scaling in ("rows", "blocks", "mx")):
        output = new_output(rows, width, first, x, scale, wanted & {"row", "amax", "amaxes"}, None)
        wanted -= {"row"}
    total, mean, rstd, amax = _read(
        x, weight, bias, eps, zero_centered, other, center, first, output
    )
    col = None
    if narrow and scale is not None and "col" in wanted and output.row is not None:
        col = transposed(output.row[0]), scale  # the codes are the row copy's
        wanted -= {"col"}
    summed = x if total is None else total
    rest = norm_quantize_again(
        summed, mean, rstd, weight, bias, to, zero_centered, scale, wanted, amax
    )
    statistics = mean if "mean" in want else None, rstd if "rstd" in want else None
    inverse = output.inverse if rest.inverse is None else rest.inverse
    done = rest._replace(row=output.row or rest.row, col=col or rest.col, inverse=inverse)
    return done, *statistics, total


def norm_quantize_again(
    x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    to: Target, zero_centered: int, scale: Tensor | None, want: Collection[str],
    amax: Tensor | None = None,
) -> Copies:  # fmt: skip
    """The copies of `norm_quantize` from its statistics; x with `other` added. amax: if known."""
    source = Source("norm", x, x.size(1), bias, weight, mean, rstd, zero_centered=zero_centered)
    return copies(source, to, scale, want, amax)
