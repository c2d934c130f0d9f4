"""Linear layers with an activation in the GEMM's epilogue, forward and backward.

    y    = f(x @ weight.T + bias)            gated: f(a) * b of the two halves of the columns
    dpre = f'(pre) * (dy @ weight)           the gradient by pre, in the next linear's dgrad

One program makes one tile. Products are summed in fp32 and the activation is computed in fp32; the
pre-activation is rounded to x's dtype before the activation reads it, so that the backward, which
reads the rounded one, differentiates the function that was computed. A gated tile takes its rows of
the weight from the two halves in turn, so that gate and value of a column lie in one thread.
"""

from collections.abc import Collection
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import interpreting
from .activations import (
    _backward,
    _gate,
    _gate_backward,
    activation_backward,
    activation_forward,
)
from .functions import constants
from .launch import (
    ceil_div,
    launch,
    on_device_of,
    packed,
    row_major,
    shared_memory,
    stride_unit,
    sum_partials,
)

# Columns of a part of an epilogue: 32 bytes of a row, and few enough registers for two programs on
# a multiprocessor, so that the epilogue of one runs beside the main loop of the other.
PART = tl.constexpr(16)


@triton.jit
def swizzled(tile, tiles_m, TILES_N: tl.constexpr, GROUP: tl.constexpr):
    """(row, column) of a tile: columns of `GROUP` tiles, so that neighbours in time share loads."""
    first = tile // (GROUP * TILES_N) * GROUP
    height = tl.minimum(tiles_m - first, GROUP)
    within = tile % (GROUP * TILES_N)
    return first + within % height, within // height


@triton.jit
def multiply(
    a, b, a_in, b_in, a_step, b_step, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The fp32 tile `[BLOCK_M, BLOCK_N]` of a product over `depth`.

    a, b: pointers to the first `[BLOCK_M, BLOCK_K]` and `[BLOCK_K, BLOCK_N]`; a_in, b_in: masks
    that broadcast to them; a_step, b_step: elements to the next ones. EVEN: BLOCK_K divides depth.
    depth is no constexpr: ptxas (seen in Triton 3.6's) unrolls a short loop of known length whole,
    and then loses products where b is stored by rows, as in the backward.
    """
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    k = tl.arange(0, BLOCK_K)
    for start in tl.range(0, depth, BLOCK_K):
        a_mask, b_mask = a_in, b_in
        if not EVEN:
            a_mask = a_in & (k < depth - start)[None, :]
            b_mask = b_in & (k < depth - start)[:, None]
        one, other = tl.load(a, a_mask, other=0.0), tl.load(b, b_mask, other=0.0)
        if PRECISION == "widened":
            total = tl.dot(one.to(tl.float32), other.to(tl.float32), total, input_precision="ieee")
        else:
            total = tl.dot(one, other, total, input_precision=PRECISION)
        a += a_step
        b += b_step
    return total


@triton.jit
def _pre_activation(total, bias, pre, y, at, cols, mask, TOTAL: tl.constexpr):
    """Adds the bias, rounds, and stores where asked."""
    if bias is not None:
        total += tl.load(bias + cols, cols < TOTAL, other=0.0).to(tl.float32)
    rounded = total.to(y.dtype.element_ty)
    if pre is not None:
        tl.store(pre + at, rounded, mask)
    return rounded.to(tl.float32)


@triton.jit(do_not_specialize=["rows", "x_stride", "weight_stride"])
def linear_activation_kernel(
    x, weight, bias, y, pre, rows, depth, x_stride, weight_stride,
    UNIT: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    halves: tl.constexpr = 2 if GATED else 1
    columns: tl.constexpr = BLOCK_N // halves
    tile_m, tile_n = swizzled(
        tl.program_id(0), tl.cdiv(rows, BLOCK_M), (WIDTH + columns - 1) // columns, GROUP
    )
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    n = tl.arange(0, BLOCK_N)
    # Rows and columns past the end repeat the last one: no mask, and nothing of them is stored.
    source = tl.minimum(tile_n * columns + n // halves, WIDTH - 1) + n % halves * WIDTH
    everywhere = tl.full([1, 1], True, tl.int1)
    total = multiply(
        x + tl.minimum(row, rows - 1)[:, None] * x_stride * UNIT + k[None, :],
        weight + source.to(tl.int64)[None, :] * weight_stride * UNIT + k[:, None],
        everywhere, everywhere, BLOCK_K, BLOCK_K, depth,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION,
    )  # fmt: skip
    cols = (tile_n * columns + tl.arange(0, columns))[None, :]
    mask = (row < rows)[:, None] & (cols < WIDTH)
    at = row[:, None] * (WIDTH * halves) + cols
    dtype: tl.constexpr = y.dtype.element_ty
    if GATED:
        a, b = tl.split(tl.reshape(total, [BLOCK_M, columns, 2]))
        a = _pre_activation(a, bias, pre, y, at, cols, mask, WIDTH)
        b = _pre_activation(b, bias, pre, y, at + WIDTH, cols + WIDTH, mask, WIDTH * 2)
        out = _gate(a, b, dtype, FUNCTION, GATED, ALPHA, LIMIT, OFFSET)
    else:
        total = _pre_activation(total, bias, pre, y, at, cols, mask, WIDTH)
        out, _, _ = FUNCTION(total, ALPHA, dtype)
    tl.store(y + row[:, None] * WIDTH + cols, out.to(y.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "dy_stride", "weight_stride", "pre_stride"])
def linear_activation_backward_kernel(
    dy, weight, pre, dpre, y, dbias, rows, depth, dy_stride, weight_stride, pre_stride,
    UNIT: tl.constexpr, EVEN: tl.constexpr, WIDTH: tl.constexpr,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    whole: tl.constexpr = WIDTH * 2 if GATED else WIDTH
    tile_m, tile_n = swizzled(
        tl.program_id(0), tl.cdiv(rows, BLOCK_M), (WIDTH + BLOCK_N - 1) // BLOCK_N, GROUP
    )
    row = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    k = tl.arange(0, BLOCK_K)
    step = weight_stride.to(tl.int64) * UNIT
    grad = multiply(
        dy + tl.minimum(row, rows - 1)[:, None] * dy_stride * UNIT + k[None, :],
        weight + k[:, None] * step + cols,
        tl.full([1, 1], True, tl.int1), cols < WIDTH, BLOCK_K, BLOCK_K * step, depth,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN, PRECISION,
    )  # fmt: skip
    _gradient(
        grad, pre, dpre, y, dbias, row, rows, tile_m, tile_n * BLOCK_N, pre_stride, UNIT,
        BLOCK_M, BLOCK_N, WIDTH, whole, FUNCTION, GATED, ALPHA, LIMIT, OFFSET,
    )  # fmt: skip


@triton.jit
def _gradient(
    grad, pre, dpre, y, dbias, row, rows, tile_m, first, pre_stride, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, WHOLE: tl.constexpr,
    FUNCTION: tl.constexpr, GATED: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
):  # fmt: skip
    """The epilogue of a tile, in parts that leave the registers to the accumulators."""
    if COLUMNS > PART:
        half: tl.constexpr = COLUMNS // 2
        parts = tl.split(tl.permute(tl.reshape(grad, [BLOCK_M, 2, half]), (0, 2, 1)))
        for i in tl.static_range(2):
            _gradient(
                parts[i], pre, dpre, y, dbias, row, rows, tile_m, first + i * half, pre_stride,
                UNIT, BLOCK_M, half, WIDTH, WHOLE, FUNCTION, GATED, ALPHA, LIMIT, OFFSET,
            )  # fmt: skip
    else:
        cols = (first + tl.arange(0, COLUMNS))[None, :]
        mask = (row < rows)[:, None] & (cols < WIDTH)
        grad = tl.where(mask, grad, 0.0)  # the bias's sums count no row twice
        at = row[:, None] * pre_stride * UNIT + cols
        dtype: tl.constexpr = pre.dtype.element_ty
        a = tl.load(pre + at, mask, other=0.0).to(tl.float32)
        if GATED:
            b = tl.load(pre + at + WIDTH, mask, other=0.0).to(tl.float32)
            value, da, db = _gate_backward(
                grad, a, b, dtype, FUNCTION, GATED, ALPHA, LIMIT, OFFSET
            )  # fmt: skip
            _store_gradient(db, dpre, dbias, row, tile_m, cols, mask, WIDTH, WIDTH, WHOLE)
        else:
            value, da = _backward(grad, a, dtype, FUNCTION, ALPHA)
        _store_gradient(da, dpre, dbias, row, tile_m, cols, mask, WIDTH, 0, WHOLE)
        if y is not None:
            tl.store(y + row[:, None] * WIDTH + cols, value.to(y.dtype.element_ty), mask)


@triton.jit
def _store_gradient(
    grad, dpre, dbias, row, tile_m, cols, mask,
    WIDTH: tl.constexpr, SHIFT: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """A tile of dpre and its column sums, each where asked; the sums are one row per row block."""
    if dpre is not None:
        tl.store(dpre + row[:, None] * WHOLE + SHIFT + cols, grad.to(dpre.dtype.element_ty), mask)
    if dbias is not None:
        partial = dbias + tile_m.to(tl.int64) * WHOLE + SHIFT + cols
        tl.store(partial, tl.sum(grad, 0, keep_dims=True), cols < WIDTH)


def precision(dtype: torch.dtype) -> str:
    """How `multiply` does it: fp32 in "tf32" where torch.backends allows that, all else "ieee".

    bf16 is "widened" to fp32 in Triton's interpreter, which (as of 3.9) multiplies its bits.
    """
    if dtype == torch.bfloat16 and interpreting():
        return "widened"
    allowed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed and dtype == torch.float32 else "ieee"


@cache
def config(
    rows: int, columns: int, depth: int, itemsize: int, fast: bool, room: int
) -> dict[str, int]:
    """Compile options of a product `[rows, depth] @ [depth, columns]`; rows is a `row_class`.

    fast: it runs on tensor cores; fp32 in full precision does not. room: bytes of shared memory.
    """
    if not fast:
        tile = (32 if rows <= 32 else 64, 64, 16, 4, 3)
    elif rows <= 16:
        tile = (16, 64, 256 // itemsize, 4, 4)
    elif rows <= 64:
        tile = (64, 128, 128 // itemsize, 4, 4)
    else:
        # Wide tiles need Hopper's shared memory to keep the tensor cores busy, and a long main loop
        # to hide an epilogue that runs beside nothing.
        wide = depth > 2048 and columns >= 2048 and room >= 227 * 1024
        tile = (128, 256 if wide else 128, 128 // itemsize, 8, 4 if wide else 3)
    block_m, block_n, block_k, warps, stages = tile
    while stages > 2 and (block_m + block_n) * block_k * itemsize * stages > room - 2048:
        stages -= 1
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": 8,
        "num_warps": warps, "num_stages": stages,
    }  # fmt: skip


def row_class(rows: int) -> int:
    """The rows that `config` distinguishes: 16, 64, or more."""
    return 16 if rows <= 16 else 64 if rows <= 64 else 128


def product_options(rows: int, columns: int, x: Tensor, depth: int) -> dict[str, Any]:
    """`config` for a product of x, with the precision and how multiply-adds outside of it round."""
    mode = precision(x.dtype)
    fast = x.dtype != torch.float32 or mode == "tf32"
    room = shared_memory(x.device)
    options = config(row_class(rows), columns, depth, x.element_size(), fast, room)
    # As in activations.FUSION; but without tensor cores the product itself is multiply-adds.
    return options | {"PRECISION": mode, "enable_fp_fusion": not fast}


def _check(name: str, x: Tensor, weight: Tensor, depth: int) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.size(1) != depth:
        raise ValueError(f"{name} got shapes {list(x.shape)} and {list(weight.shape)}")
    if x.dtype != weight.dtype or x.device != weight.device:
        raise ValueError(
            f"{name} got {x.dtype} on {x.device} and {weight.dtype} on {weight.device}, "
            "expected one dtype and one device"
        )


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, params: tuple[float, ...] = (),
    want: Collection[str] = (),
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`y = f(x @ weight.T + bias)`, or `f(a) * b` with a, b the halves of the columns.

    x: `[rows, depth]`, fp32, fp16 or bf16; weight: `[width, depth]`, `[2 * width, depth]` for gated
    kinds, of x's dtype; bias: one per row of weight, of any dtype, or None. kind, params: as in
    `activation_forward`. Returns (y `[rows, width]`, pre), of x's dtype: pre is the pre-activation
    `[rows, width or 2 * width]` if "pre" is in want, else None. Raises ValueError for what does not
    fit.
    """
    flags = constants(kind, params)
    total, depth = weight.shape
    _check("linear_activation", x, weight, depth)
    if flags["GATED"] and total % 2:
        raise ValueError(f"{kind} halves its input's width, which is odd: {total}")
    if bias is not None and bias.shape != (total,):
        raise ValueError(f"linear_activation got bias {list(bias.shape)}, expected {[total]}")
    rows, width = x.size(0), total // 2 if flags["GATED"] else total
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    pre = torch.empty(rows, total, dtype=x.dtype, device=x.device) if "pre" in want else None
    if not y.numel():
        return y, pre
    x, weight = row_major(x), row_major(weight)
    bias = packed(bias)
    unit = stride_unit(x, weight)
    options = product_options(rows, total, x, depth)
    tiles = ceil_div(rows, options["BLOCK_M"]) * ceil_div(
        width, options["BLOCK_N"] // (total // width)
    )
    with on_device_of(x):
        launch(
            linear_activation_kernel, (tiles,),
            x, weight, bias, y, pre, rows, depth, x.stride(0) // unit, weight.stride(0) // unit,
            UNIT=unit, EVEN=depth % options["BLOCK_K"] == 0, WIDTH=width, **flags, **options,
        )  # fmt: skip
    return y, pre


def linear_activation_backward(
    dy: Tensor, weight: Tensor, pre: Tensor, kind: str, params: tuple[float, ...] = (),
    want: Collection[str] = ("x",), bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradient of `f(pre) @ weight.T` by pre: `f'(pre) * (dy @ weight)`, the product in fp32.

    dy: `[rows, depth]`; weight: `[depth, width]`, of dy's dtype; pre: `[rows, width]`, for gated
    kinds `[rows, 2 * width]`. want, bias_dtype and the result (dpre, y, dbias) are those of
    `activation_backward`: y is f(pre), dbias the column sums of the unrounded dpre, in an order
    that shapes, dtypes and want fix. Raises ValueError for what does not fit.
    """
    flags = constants(kind, params)
    depth, width = weight.shape
    _check("linear_activation_backward", dy, weight, depth)
    rows, total = dy.size(0), width * 2 if flags["GATED"] else width
    if pre.shape != (rows, total):
        raise ValueError(f"got a pre-activation {list(pre.shape)}, expected {[rows, total]}")
    if "x" not in want and "bias" not in want:
        y = activation_forward(pre, kind, params) if "y" in want else None
        return None, y, None
    if not pre.numel() or not depth:
        grad = torch.zeros(rows, width, dtype=dy.dtype, device=dy.device)
        return activation_backward(grad, pre, kind, params, want, bias_dtype)
    dpre = torch.empty(rows, total, dtype=pre.dtype, device=pre.device) if "x" in want else None
    y = torch.empty(rows, width, dtype=pre.dtype, device=pre.device) if "y" in want else None
    dy, weight, pre = row_major(dy), row_major(weight), row_major(pre)
    unit = stride_unit(dy, weight, pre)
    options = product_options(rows, width, dy, depth)
    blocks = ceil_div(rows, options["BLOCK_M"])
    dbias = partials = None
    if "bias" in want:
        dbias = torch.empty(total, dtype=bias_dtype or pre.dtype, device=pre.device)
        partials = torch.empty(blocks, total, dtype=torch.float32, device=pre.device)
    with on_device_of(dy):
        launch(
            linear_activation_backward_kernel, (blocks * ceil_div(width, options["BLOCK_N"]),),
            dy, weight, pre, dpre, y, partials, rows, depth,
            dy.stride(0) // unit, weight.stride(0) // unit, pre.stride(0) // unit,
            UNIT=unit, EVEN=depth % options["BLOCK_K"] == 0, WIDTH=width, **flags, **options,
        )  # fmt: skip
        sum_partials(partials, dbias, None, None)
    return dpre, y, dbias
