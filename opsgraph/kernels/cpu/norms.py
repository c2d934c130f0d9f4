"""RMSNorm and LayerNorm in one pass over the rows, with the residual add on either side.

Formulas: `kernels/reference/norms.py`. Arithmetic and sums are in fp32, over rows in an order that
depends on the number of rows alone, so results are the same bits for any number of threads. Tensors
are `[rows, width]`, fp32 or bf16, their rows at any stride; results are contiguous. zero_centered
and normalized_dtype: as the formulas have them.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from ..reference import norms as reference
from ..reference.scales import dtype_of
from .launch import DTYPES, Kernel, address, direct, lines, rows_of, vector, verify_length
from .memory import empty

_FIELDS = "11q 3P 3q 2P 2q 3P 4P d"  # struct Norm in source/norms.h
_forward_kernel = Kernel("opsgraph_norm_forward", _FIELDS, "norms")
_backward_kernel = Kernel("opsgraph_norm_backward", _FIELDS, "norms")
_FP32 = torch.float32


def _column(x: Tensor) -> Tensor:
    return empty((x.size(0), 1), _FP32)


def _rounding(to: reference.Dtypes) -> tuple[int, int, int] | None:
    """y's dtype and which values are rounded to bf16 before; None for what no kernel rounds to."""
    parts = [to.normalized, to.product, to.y]
    if not all(part in (None, *DTYPES) for part in parts):
        return None
    return DTYPES[to.y], *(part == torch.bfloat16 for part in parts[:2])  # type: ignore[return-value]


def norm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, zero_centered: int = 0,
    other: Tensor | None = None, center: bool = False, want: Collection[str] = ("mean", "rstd"),
    normalized_dtype: str | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """`y = c * rstd * w + bias` with `rstd = rsqrt(mean(c^2) + eps)` and `t = x`, or `x + other`.

    center: LayerNorm, `c = t - mean`, else RMSNorm, `c = t`. x, other, total: `[rows, width]`,
    total of the dtype to which PyTorch promotes; the sum is rounded to it before the norm reads it.
    weight, bias: `[width]` of any
    float dtype or None; `w = 1 + weight` when zero_centered. mean, rstd: fp32 `[rows, 1]`.
    Returns (y, mean, rstd, total), None for what is not in want, or not there.
    """
    dtype = x.dtype if other is None else dtype_of(x.dtype, other.dtype)
    to = reference.dtypes_of(dtype, weight, bias, normalized_dtype)
    rounding = _rounding(to)
    added = dtype if other is None else other.dtype
    known = rounding is not None and {x.dtype, added} <= DTYPES.keys()
    if rounding is None or not known or not direct(x, weight, bias, other):
        return _forward_by_formula(
            x, weight, bias, eps, zero_centered, other, center, want, normalized_dtype
        )
    shape, given = x.shape, (DTYPES[x.dtype], DTYPES[added])
    rows, width = shape
    y = empty(shape, to.y)
    total = None if other is None else empty(shape, dtype)
    mean = _column(x) if center and "mean" in want else None
    rstd = _column(x) if "rstd" in want else None
    if not rows or not width:
        zeros = [None if t is None else t.zero_() for t in (mean, rstd)]
        return y, zeros[0], zeros[1], total
    x, stride = lines(x)
    other, other_stride = (None, 0) if other is None else rows_of(other, shape, added)
    weight, weight_at, weight_dtype = vector(weight, width)
    bias, bias_at, bias_dtype = vector(bias, width)
    _forward_kernel(
        DTYPES[dtype], rounding[0], *given, *rounding[1:], center, zero_centered,
        torch.get_num_threads(), rows, width, x.data_ptr(), address(other), 0, stride,
        other_stride, 0,
        weight_at, bias_at, weight_dtype, bias_dtype,
        y.data_ptr(), address(total), 0, address(mean), address(rstd), 0, 0, eps,
    )  # fmt: skip
    return y, mean, rstd, total


def _forward_by_formula(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, zero_centered: int,
    other: Tensor | None, center: bool, want: Collection[str], normalized_dtype: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    total = None if other is None else x + other
    x, mean = x if total is None else total, None
    if center:
        y, mean, rstd = reference.layernorm_forward(
            x, weight, bias, eps, zero_centered, normalized_dtype
        )
    else:
        y, rstd = reference.rmsnorm_forward(x, weight, eps, zero_centered, normalized_dtype)
    return y, mean if "mean" in want else None, rstd if "rstd" in want else None, total


def norm_backward(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None = None, zero_centered: int = 0, dother: Tensor | None = None,
    want: Collection[str] = ("x", "weight", "bias"), out: Tensor | None = None,
    normalized_dtype: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of `norm_forward`: with `m = dy * w` and `h = (x - mean) * rstd`,
    `dx = rstd * (m - mean(m) - h * mean(m * h)) + dother`; without mean(m) for RMSNorm.

    dy, x, dother: `[rows, width]`; x is what the norm read (the total, where there was one). mean:
    None for RMSNorm. Returns (dx in x's dtype, dweight in weight's, dbias in bias's, y computed
    again), None for what is not in want ("x", "weight", "bias", "y") or has no parameter. out:
    contiguous, of x's dtype, gets dx; it may be dy itself.
    """
    to = reference.dtypes_of(x, weight, bias, normalized_dtype)
    rounding = _rounding(to)
    if rounding is None or not direct(dy, x, mean, rstd, weight, bias, dother):
        return _backward_by_formula(
            dy, x, mean, rstd, weight, bias, zero_centered, dother, want, out, normalized_dtype
        )
    shape, dtype = x.shape, x.dtype
    rows, width = shape
    dx = None
    if "x" in want:
        dx = empty(shape, dtype) if out is None else out
    y = empty(shape, to.y) if "y" in want else None
    dweight = dbias = None
    if "weight" in want and weight is not None:
        dweight = empty((width,), _FP32)
    if "bias" in want and bias is not None:
        dbias = empty((width,), _FP32)
    if rows and width:
        dy, dy_stride = rows_of(dy, shape, to.y)
        x, stride = lines(x)
        dother, other_stride = (None, 0) if dother is None else rows_of(dother, shape, dtype)
        for statistic in (rstd, mean):
            if statistic is not None:
                verify_length(statistic, rows, "row")
        mean = mean if mean is None else mean.contiguous()  # hooks of saved tensors may restride
        rstd = rstd.contiguous()
        factor, weight_at, weight_dtype = vector(weight, width)
        shift, bias_at, bias_dtype = vector(bias, width)
        _backward_kernel(
            DTYPES[dtype], rounding[0], 0, 0, *rounding[1:], mean is not None, zero_centered,
            torch.get_num_threads(), rows, width,
            x.data_ptr(), address(dother), dy.data_ptr(), stride, other_stride, dy_stride,
            weight_at, bias_at, weight_dtype, bias_dtype,
            address(y), 0, address(dx), address(mean), rstd.data_ptr(),
            address(dweight), address(dbias), 0.0,
        )  # fmt: skip
        del factor, shift  # were read until here
    else:
        for sums in (dweight, dbias):
            if sums is not None:
                sums.zero_()
    return dx, _like(dweight, weight), _like(dbias, bias), y


def _like(gradient: Tensor | None, parameter: Tensor | None) -> Tensor | None:
    """A parameter's gradient, summed in fp32, in its dtype."""
    if gradient is None or parameter is None or parameter.dtype == _FP32:
        return gradient
    return gradient.to(parameter.dtype)


def _backward_by_formula(
    dy: Tensor, x: Tensor, mean: Tensor | None, rstd: Tensor, weight: Tensor | None,
    bias: Tensor | None, zero_centered: int, dother: Tensor | None, want: Collection[str],
    out: Tensor | None, normalized_dtype: str | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    dbias = y = None
    if mean is None:
        wanted = "x" in want, "weight" in want, "y" in want
        dx, dweight, y = reference.rmsnorm_backward(
            dy, x, rstd, weight, zero_centered, *wanted, normalized_dtype
        )
    else:
        wanted = "x" in want, "weight" in want, "bias" in want
        dx, dweight, dbias = reference.layernorm_backward(
            dy, x, mean, rstd, weight, bias, zero_centered, wanted, normalized_dtype
        )
        if "y" in want:
            to = reference.dtypes_of(x, weight, bias, normalized_dtype)
            y = reference.affine((x.float() - mean) * rstd, weight, bias, zero_centered, to)
    dx = dx if dx is None or dother is None else dx + dother
    return dx if dx is None or out is None else out.copy_(dx), dweight, dbias, y
