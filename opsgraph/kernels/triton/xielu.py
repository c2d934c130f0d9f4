"""xIELU and its gradients, each in one pass. Formulas: `kernels/reference/xielu.py`."""

from collections.abc import Collection

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import FUSION, config
from .launch import (
    ceil_div,
    launch,
    multiprocessors,
    on_device_of,
    row_major,
    stride_unit,
    sum_partials,
)


@triton.jit
def _softplus(alpha):
    a = tl.load(alpha).to(tl.float32)
    return tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.where(a > 20.0, 0.0, a))))


@triton.jit
def _beyond_linear(u):
    """e^u - 1 - u: the power series near 0, where the difference would cancel."""
    s = u * 2.48015873e-5 + 1.98412698e-4
    s = s * u + 1.38888889e-3
    s = s * u + 8.33333333e-3
    s = s * u + 4.16666667e-2
    s = s * u + 1.66666667e-1
    s = s * u + 0.5
    return tl.where(u > -0.5, u * u * s, tl.exp(u) - 1.0 - u)


@triton.jit
def _term(x, EPS: tl.constexpr):
    """What multiplies p above 0, and n elsewhere."""
    u = tl.where(x > EPS, EPS, x)
    return tl.where(x > 0.0, x * x, _beyond_linear(u) + (u - x))


@triton.jit
def _value(x, p, n, BETA: tl.constexpr, EPS: tl.constexpr):
    """No square of x, which may overflow before the value does."""
    return tl.where(x > 0.0, x * (p * x + BETA), _term(x, EPS) * n + BETA * x)


@triton.jit(do_not_specialize=["rows", "x_stride"])
def xielu_kernel(
    x, alpha_p, alpha_n, y, rows, x_stride, BETA: tl.constexpr, EPS: tl.constexpr,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = (row < rows) & (cols < WIDTH)
    value = tl.load(x + row * x_stride * UNIT + cols, mask, other=0.0).to(tl.float32)
    p, n = _softplus(alpha_p), BETA + _softplus(alpha_n)
    out = _value(value, p, n, BETA, EPS)
    tl.store(y + row * WIDTH + cols, out.to(y.dtype.element_ty), mask)


def xielu_forward(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float) -> Tensor:
    """y of x's dtype; alpha_p, alpha_n: `[1]`, of any float dtypes, read on the device."""
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x = row_major(x)
    unit, options = stride_unit(x), config(width)
    grid = (ceil_div(rows, options["ROWS"]) * ceil_div(width, options["BLOCK"]),)
    with on_device_of(x):
        launch(
            xielu_kernel, grid, x, alpha_p, alpha_n, y, rows, x.stride(0) // unit,
            BETA=beta, EPS=eps, UNIT=unit, WIDTH=width, **options, **FUSION,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows", "dy_stride", "x_stride"])
def xielu_backward_kernel(
    dy, x, alpha_p, alpha_n, dx, partials, rows, dy_stride, x_stride, BETA: tl.constexpr,
    EPS: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """A block of columns over a share of the rows; a row of two sums for each program."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    p, n = _softplus(alpha_p), BETA + _softplus(alpha_n)
    above = tl.zeros([ROWS, BLOCK], tl.float32)
    below = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in tl.range(
        tl.program_id(0) // blocks, tl.cdiv(rows, ROWS), tl.num_programs(0) // blocks
    ):
        row = tl.arange(0, ROWS)[:, None].to(tl.int64) + tile * ROWS
        mask = (row < rows) & (cols < WIDTH)
        grad = tl.load(dy + row * dy_stride * UNIT + cols, mask, other=0.0).to(tl.float32)
        value = tl.load(x + row * x_stride * UNIT + cols, mask, other=0.0).to(tl.float32)
        if dx is not None:
            under = tl.where(value < EPS, tl.exp(tl.where(value < EPS, value, 0.0)), 0.0) - 1.0
            slope = tl.where(value > 0.0, 2.0 * p * value, n * under)
            tl.store(dx + row * WIDTH + cols, (grad * (slope + BETA)).to(dx.dtype.element_ty), mask)
        if partials is not None:
            term = grad * _term(value, EPS)
            above += tl.where(value > 0.0, term, 0.0)
            below += tl.where(value > 0.0, 0.0, term)
    if partials is not None:
        to = partials + tl.program_id(0).to(tl.int64) * 2
        tl.store(to, tl.sum(tl.sum(above, 1), 0) * tl.sigmoid(tl.load(alpha_p).to(tl.float32)))
        tl.store(to + 1, tl.sum(tl.sum(below, 1), 0) * tl.sigmoid(tl.load(alpha_n).to(tl.float32)))


def xielu_backward(
    dy: Tensor, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float,
    want: Collection[str] = ("x", "alpha_p", "alpha_n"),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx and the sums dalpha_p, dalpha_n, each of its tensor's dtype; both sums or none."""
    rows, width = x.shape
    dx = torch.empty(rows, width, dtype=x.dtype, device=x.device) if "x" in want else None
    sums = partials = None
    if {"alpha_p", "alpha_n"}.intersection(want):
        new = torch.empty if x.numel() else torch.zeros
        sums = new(2, dtype=torch.float32, device=x.device)
    if x.numel() and (dx is not None or sums is not None):
        dy, x = row_major(dy), row_major(x)
        unit, options = stride_unit(dy, x), config(width)
        blocks, shares = ceil_div(width, options["BLOCK"]), ceil_div(rows, options["ROWS"])
        if sums is not None:
            shares = min(shares, max(1, multiprocessors(x.device) * 8 // blocks))
            partials = torch.empty(shares * blocks, 2, dtype=torch.float32, device=x.device)
        with on_device_of(x):
            launch(
                xielu_backward_kernel, (shares * blocks,),
                dy, x, alpha_p, alpha_n, dx, partials, rows, dy.stride(0) // unit,
                x.stride(0) // unit, BETA=beta, EPS=eps, UNIT=unit, WIDTH=width, **options,
                **FUSION,
            )  # fmt: skip
            sum_partials(partials, sums, None, None)
    if sums is None:
        return dx, None, None
    return dx, sums[:1].to(alpha_p.dtype), sums[1:].to(alpha_n.dtype)
