"""RMSNorm, LayerNorm and L2 normalization of `[rows, width]` tensors, forward and backward.

With `w` the weight, or `1 + weight` when zero-centred, and `m = dy * w`:

    RMSNorm    y = x * rstd * w,  rstd = rsqrt(mean(x^2) + eps)
               dx = rstd * (m - x * rstd^2 * mean(m * x)),  dw = sum(dy * x * rstd)
    LayerNorm  y = h * w + b,  h = (x - mean) * rstd,  rstd = rsqrt(var + eps)
               dx = rstd * (m - mean(m) - h * mean(m * h)),  dw = sum(dy * h),  db = sum(dy)

dx has x's dtype, gradients of parameters the parameter's, rstd and mean fp32 and `[rows, 1]`. Rows
whose squares overflow fp32 are scaled before by a power of two, which changes no digit.

y has x's dtype, and is rounded once. With `normalized_dtype` h is rounded before the weight
multiplies it, then the product, then the sum, each as PyTorch's own ops do it: to x's dtype
("input"), or to the weight's where that has 16 bits ("weight"), and each result to the dtype to
which PyTorch promotes. dw is then the sum with the rounded h; what else is in a gradient is in
fp32. `zero_centered` is 0, 1 for `1 + weight` in fp32, or ROUNDED for a sum rounded to the weight's
dtype.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...guards.torch_private import recorded
from . import wide

ROUNDED = 2
"""What `zero_centered` is where `1 + weight` is rounded to the weight's dtype."""
ONCE = "once to "
"""What `normalized_dtype` begins with where nothing but y is rounded, to the dtype after it."""


class Dtypes(NamedTuple):
    """What the normalized value, its product with the weight, and y are rounded to."""

    normalized: torch.dtype | None
    """None: it is not rounded."""
    product: torch.dtype | None
    y: torch.dtype


@cache
def dtypes(
    x: torch.dtype, weight: torch.dtype | None, bias: torch.dtype | None,
    normalized_dtype: str | None,
) -> Dtypes:  # fmt: skip
    """How a norm rounds, by the dtypes of x and of the parameters that are there."""
    if normalized_dtype is None:
        return Dtypes(None, None, x)
    if normalized_dtype.startswith(ONCE):
        return Dtypes(None, None, getattr(torch, normalized_dtype.removeprefix(ONCE)))
    first: torch.dtype | None = x
    if normalized_dtype == "weight" and weight is not None:
        first = weight if weight.itemsize == 2 else None
        y = weight if x != torch.float64 else torch.promote_types(x, weight)
    else:
        y = x if weight is None else torch.promote_types(x, weight)
    product = y if first is not None else None
    return Dtypes(first, product, y if bias is None else torch.promote_types(y, bias))


def dtypes_of(
    x: Tensor | torch.dtype, weight: Tensor | None, bias: Tensor | None,
    normalized_dtype: str | None,
) -> Dtypes:  # fmt: skip
    """`dtypes` of tensors, and of x or its dtype."""
    first, second = (None if t is None else t.dtype for t in (weight, bias))
    read = x.dtype if isinstance(x, Tensor) else x
    return dtypes(read, first, second, normalized_dtype)


def _rounded(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The value rounded to a dtype, in the dtype that it has."""
    return value if dtype in (None, value.dtype) else value.to(dtype).to(value.dtype)


def gamma(weight: Tensor | None, zero_centered: int, x: Tensor) -> Tensor | None:
    """The factor that a norm's weight stands for, in the dtype of `x`."""
    if weight is None:
        return None
    if zero_centered == ROUNDED:
        return (weight + 1).to(x.dtype)
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    return weight + 1 if zero_centered else weight


def shrunk(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x for arithmetic, rows with values above 2^50 times a power of two, to about 2^44.

    Returns the powers too, fp32 `[rows, 1]`, or None where x is fp16 or fp64, which need none, and
    where torch.jit.trace or torch.export records. The
    differences within such a row are either zero, or so large that eps does not count beside their
    squares.
    """
    h = wide(x)
    if x.dtype in (torch.float16, torch.float64):
        return h, None
    # What is recorded for other runtimes has ops that these know: ONNX has no frexp.
    if recorded() or not x.numel():
        return h, None
    largest = h.abs().amax(-1, keepdim=True)
    # Not by its bits: vmap knows no view of another dtype up to PyTorch 2.11.
    exponent = torch.frexp(largest.detach().clamp(max=torch.finfo(h.dtype).max)).exponent
    power = torch.where(largest > 2.0**50, torch.exp2(45.0 - exponent), 1.0)
    return h * power, power


def affine(
    hat: Tensor, weight: Tensor | None, bias: Tensor | None, zero_centered: int, to: Dtypes
) -> Tensor:
    """y of the normalized value, rounded on the way as `to` says."""
    y, factor = _rounded(hat, to.normalized), gamma(weight, zero_centered, hat)
    if factor is not None:
        y = _rounded(y * factor, to.product)
    return (y if bias is None else y + bias.to(y.dtype)).to(to.y)


def _finite(rstd: Tensor, h: Tensor) -> Tensor:
    """rstd; 0 of rows without elements, where PyTorch's is NaN."""
    if torch.jit.is_tracing() or h.shape[-1]:  # type: ignore[attr-defined,no-untyped-call]
        return rstd
    return torch.zeros_like(rstd)


def rmsnorm_forward(
    x: Tensor, weight: Tensor | None, eps: float, zero_centered: int,
    normalized_dtype: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Returns y and rstd."""
    h, power = shrunk(x)
    factor = None if normalized_dtype else gamma(weight, zero_centered, h)
    fused: Any = torch._fused_rms_norm
    if torch.compiler.is_compiling():  # Dynamo traces the op, but not its Python binding
        fused = torch.ops.aten._fused_rms_norm.default
    y, rstd = fused(h, (h.shape[-1],), factor, eps)
    rstd = _finite(rstd, h)
    if normalized_dtype:
        y = affine(y, weight, None, zero_centered, dtypes_of(x, weight, None, normalized_dtype))
    else:
        y = y if y.dtype == x.dtype else y.to(x.dtype)
    return y, rstd if power is None else rstd * power


def rmsnorm_again(
    x: Tensor, rstd: Tensor, weight: Tensor | None, zero_centered: int,
    normalized_dtype: str | None = None,
) -> Tensor:  # fmt: skip
    """y again, bit for bit, from the saved rstd."""
    h = wide(x)
    y = h * rstd
    if normalized_dtype:
        to = dtypes_of(x, weight, None, normalized_dtype)
        return affine(y, weight, None, zero_centered, to)
    if weight is not None:
        y = y.mul_(gamma(weight, zero_centered, h))  # type: ignore[arg-type]
    return y if y.dtype == x.dtype else y.to(x.dtype)


def rmsnorm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, zero_centered: int, want_x: bool,
    want_weight: bool, want_y: bool = False, normalized_dtype: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns dx, dweight and y computed again, None for each that is not wanted."""
    g, hat = wide(dy), wide(x) * rstd
    to = dtypes_of(x, weight, None, normalized_dtype)
    y = affine(hat, weight, None, zero_centered, to) if want_y else None
    factor = gamma(weight, zero_centered, hat)
    wanted = want_x, want_weight
    dx, dweight = _gradients(g, hat, rstd, factor, False, wanted, to.normalized)
    dx = dx if dx is None or dx.dtype == x.dtype else dx.to(x.dtype)
    return dx, dweight if dweight is None or weight is None else dweight.to(weight.dtype), y


def _gradients(
    g: Tensor, hat: Tensor, rstd: Tensor, factor: Tensor | None, center: bool,
    want: Sequence[bool], normalized: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx and dweight from the normalized rows, which `normalized` says how to round for dweight."""
    product, count = g * hat, max(1, g.shape[-1])
    dx = dweight = None
    if want[1] and factor is not None:
        exact = normalized in (None, hat.dtype)
        dweight = (product if exact else g * _rounded(hat, normalized)).sum(0)
    if want[0]:
        if factor is None:
            dot = product.sum(-1, keepdim=True)
        else:
            dot = torch.mv(product, factor).unsqueeze(-1)
            g = g * factor
        dx = torch.addcmul(g, hat, dot, value=-1 / count)
        dx = (dx.sub_(g.mean(-1, keepdim=True)) if center else dx).mul_(rstd)
    return dx, dweight


def layernorm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, zero_centered: int,
    normalized_dtype: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns y, mean and rstd."""
    h, power = shrunk(x)
    shift = factor = None
    if normalized_dtype is None:
        shift = bias if bias is None or bias.dtype == h.dtype else bias.to(h.dtype)
        factor = gamma(weight, zero_centered, h)
    y, mean, rstd = torch.native_layer_norm(h, [h.shape[-1]], factor, shift, eps)
    rstd = _finite(rstd, h)
    if power is not None:  # equal values have no variance, however large they are
        mean, rstd = mean / power, torch.where(rstd.square() * eps > 0.5, rstd, rstd * power)
    if normalized_dtype:
        to = dtypes_of(x, weight, bias, normalized_dtype)
        return affine(y, weight, bias, zero_centered, to), mean, rstd
    return y if y.dtype == x.dtype else y.to(x.dtype), mean, rstd


def layernorm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    zero_centered: int, want: tuple[bool, bool, bool], normalized_dtype: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns dx, dweight and dbias, None for those of the three that are not wanted."""
    first = dtypes_of(x, weight, bias, normalized_dtype).normalized
    g, h = wide(dy), wide(x)
    factor = gamma(weight, zero_centered, h)
    mask = [want[0], want[1] and weight is not None, want[2] and bias is not None]
    dx = dweight = dbias = None
    if not any(mask[:2]):
        pass
    elif x.device.type == "cpu" or first not in (None, h.dtype):
        # PyTorch's takes differences of products, which cancel, on a CPU.
        hat = (h - mean).mul_(rstd)
        dx, dweight = _gradients(g, hat, rstd, factor, True, mask, first)
    else:
        shift = factor if bias is None or factor is not None else torch.zeros_like(h[0])
        dx, dweight, _ = torch.ops.aten.native_layer_norm_backward(
            g, h, [h.shape[-1]], mean, rstd, factor, shift, [mask[0], mask[1], False]
        )
    if mask[2] and bias is not None:
        dbias = g.sum(0).to(bias.dtype)
    dx = dx if dx is None or dx.dtype == x.dtype else dx.to(x.dtype)
    dweight = dweight if dweight is None or weight is None else dweight.to(weight.dtype)
    return (dx if mask[0] else None, dweight if mask[1] else None, dbias if mask[2] else None)


def l2norm_forward(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`y = x * rsqrt(sum(x^2) + eps)`; returns y and the factor."""
    h, power = shrunk(x)
    scale = torch.rsqrt(h.square().sum(-1, keepdim=True) + eps)
    return (h * scale).to(x.dtype), scale if power is None else scale * power


def l2norm_backward(dy: Tensor, x: Tensor, scale: Tensor) -> Tensor:
    """`dx = scale * (dy - h * sum(dy * h))` with `h = x * scale`."""
    g, h = wide(dy), wide(x) * scale
    return ((g - h * (g * h).sum(-1, keepdim=True)) * scale).to(x.dtype)
