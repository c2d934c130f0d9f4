"""xIELU and its gradients, each in one pass. Formulas: `kernels/reference/xielu.py`."""

from collections.abc import Collection
from math import expm1

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import FUSION, config
from .exponentials import power
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
    """max(a, 0) + log(1 + e^-|a|), and what the rounding of 1 + e^-|a| has lost."""
    a = tl.load(alpha).to(tl.float32)
    e = power(tl.where(tl.abs(a) > 87.0, -87.0, -tl.abs(a)), 1.0)
    more = 1.0 + e
    return tl.where(a < 0.0, 0.0, a) + (tl.log(more) + (e - (more - 1.0)) / more)


@triton.jit
def _series(u):
    """(e^u - 1 - u) / u^2 near 0, by the power series."""
    s = tl.fma(u, 2.48015873e-5, 1.98412698e-4)
    s = tl.fma(s, u, 1.38888889e-3)
    s = tl.fma(s, u, 8.33333333e-3)
    s = tl.fma(s, u, 4.16666667e-2)
    s = tl.fma(s, u, 1.66666667e-1)
    return tl.fma(s, u, 0.5)


@triton.jit
def _beyond_linear(u, DTYPE: tl.constexpr):
    """e^u - 1 - u: the power series near 0, where the difference would cancel."""
    return tl.where(u > -0.5, u * u * _series(u), _exponential(u, DTYPE) - 1.0 - u)


@triton.jit
def _exponential(u, DTYPE: tl.constexpr):
    """e^u of u up to 0."""
    if DTYPE == tl.float32:
        return power(tl.where(u < -87.0, -87.0, u), 1.0)
    else:
        return tl.exp(u)


@triton.jit
def _slope_below(x, rest, BETA: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """n * (e^x - 1) + BETA of n = BETA + rest, which is -rest from EPS to 0.

    Far from 0 it is n * e^x - rest: the sum for n is rounded, and 1 times that would not go again.
    """
    n, u = BETA + rest, tl.where(x < EPS, x, 0.0)
    e = _exponential(u, DTYPE)
    slope = tl.fma(e, n, -rest)
    if DTYPE == tl.float32:
        near = tl.fma(tl.fma(u * u, _series(u), u), n, BETA)
        slope = tl.where(u > -0.5, near, slope)
    return tl.where(x < EPS, slope, -rest)


@triton.jit
def _term(x, EDGE: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr):
    """What multiplies p above 0, and n elsewhere; EDGE: e^EPS - 1."""
    return tl.where(x > 0.0, x * x, tl.where(x > EPS, EDGE - x, _beyond_linear(x, DTYPE)))


@triton.jit
def _value(
    x, p, rest, BETA: tl.constexpr, EDGE: tl.constexpr, EPS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """No square of x, which may overflow before the value does; from EPS to 0 a line.

    rest: n - BETA, which a difference would round.
    """
    n = BETA + rest
    line = tl.fma(x, -rest, n * EDGE)
    below = tl.where(x > EPS, line, tl.fma(_beyond_linear(x, DTYPE), n, BETA * x))
    return tl.where(x > 0.0, x * tl.fma(x, p, BETA), below)


@triton.jit(do_not_specialize=["rows", "x_stride"])
def xielu_kernel(
    x, alpha_p, alpha_n, y, rows, x_stride,
    BETA: tl.constexpr, EDGE: tl.constexpr, EPS: tl.constexpr,
    UNIT: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = (row < rows) & (cols < WIDTH)
    value = tl.load(x + row * x_stride * UNIT + cols, mask, other=0.0).to(tl.float32)
    out = _value(value, _softplus(alpha_p), _softplus(alpha_n), BETA, EDGE, EPS, x.dtype.element_ty)
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
            BETA=beta, EDGE=expm1(min(eps, 0.0)), EPS=eps, UNIT=unit, WIDTH=width,
            **options, **FUSION,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["rows", "dy_stride", "x_stride"])
def xielu_backward_kernel(
    dy, x, alpha_p, alpha_n, dx, partials, rows, dy_stride, x_stride,
    BETA: tl.constexpr, EDGE: tl.constexpr, EPS: tl.constexpr, UNIT: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """A block of columns over a share of the rows; a row of two sums for each program."""
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    cols = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)[None, :]
    p, rest = _softplus(alpha_p), _softplus(alpha_n)
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
            below_zero = _slope_below(value, rest, BETA, EPS, x.dtype.element_ty)
            slope = tl.where(value > 0.0, tl.fma(value, 2.0 * p, BETA), below_zero)
            tl.store(dx + row * WIDTH + cols, (grad * slope).to(dx.dtype.element_ty), mask)
        if partials is not None:
            term = grad * _term(value, EDGE, EPS, x.dtype.element_ty)
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
                x.stride(0) // unit, BETA=beta, EDGE=expm1(min(eps, 0.0)), EPS=eps, UNIT=unit,
                WIDTH=width, **options, **FUSION,
            )  # fmt: skip
            sum_partials(partials, sums, None, None)
    if sums is None:
        return dx, None, None
    return dx, sums[:1].to(alpha_p.dtype), sums[1:].to(alpha_n.dtype)
