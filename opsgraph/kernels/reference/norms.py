"""RMSNorm, LayerNorm and L2 normalization of `[rows, width]` tensors, forward and backward.

With `w` the weight, or `1 + weight` when zero-centred, and `m = dy * w`:

    RMSNorm    y = x * rstd * w,  rstd = rsqrt(mean(x^2) + eps)
               dx = rstd * (m - x * rstd^2 * mean(m * x)),  dw = sum(dy * x * rstd)
    LayerNorm  y = h * w + b,  h = (x - mean) * rstd,  rstd = rsqrt(var + eps)
               dx = rstd * (m - mean(m) - h * mean(m * h)),  dw = sum(dy * h),  db = sum(dy)

Results have x's dtype, gradients of parameters the parameter's, rstd and mean fp32 and `[rows, 1]`.
Rows whose squares overflow fp32 are scaled before by a power of two, which changes no digit.
"""

from typing import Any

import torch
from torch import Tensor

from . import wide


def gamma(weight: Tensor | None, zero_centered: bool, x: Tensor) -> Tensor | None:
    """The factor that a norm's weight stands for, in the dtype of `x`."""
    if weight is None:
        return None
    weight = weight if weight.dtype == x.dtype else weight.to(x.dtype)
    return weight + 1 if zero_centered else weight


def shrunk(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """x for arithmetic, rows with values above 2^50 times a power of two, to about 2^44.

    Returns the powers too, fp32 `[rows, 1]`, or None where x is fp16 or fp64, which need none. The
    differences within such a row are either zero, or so large that eps does not count beside their
    squares.
    """
    h = wide(x)
    if x.dtype in (torch.float16, torch.float64):
        return h, None
    # torch.jit.trace records no view of another dtype.
    if torch.jit.is_tracing() or not x.numel():  # type: ignore[attr-defined,no-untyped-call]
        return h, None
    largest = h.abs().amax(-1, keepdim=True)
    # Not by its bits: vmap knows no view of another dtype up to PyTorch 2.11.
    exponent = torch.frexp(largest.detach().clamp(max=torch.finfo(h.dtype).max)).exponent
    power = torch.where(largest > 2.0**50, torch.exp2(45.0 - exponent), 1.0)
    return h * power, power


def rmsnorm_forward(
    x: Tensor, weight: Tensor | None, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor]:
    """Returns y and rstd."""
    h, power = shrunk(x)
    factor = gamma(weight, zero_centered, h)
    fused: Any = torch._fused_rms_norm
    if torch.compiler.is_compiling():  # Dynamo traces the op, but not its Python binding
        fused = torch.ops.aten._fused_rms_norm.default
    y, rstd = fused(h, (h.shape[-1],), factor, eps)
    return y if y.dtype == x.dtype else y.to(x.dtype), rstd if power is None else rstd * power


def rmsnorm_again(x: Tensor, rstd: Tensor, weight: Tensor | None, zero_centered: bool) -> Tensor:
    """y again, bit for bit, from the saved rstd."""
    h = wide(x)
    y = h * rstd
    if weight is not None:
        y = y.mul_(gamma(weight, zero_centered, h))  # type: ignore[arg-type]
    return y if y.dtype == x.dtype else y.to(x.dtype)


def rmsnorm_backward(
    dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None, zero_centered: bool, want_x: bool,
    want_weight: bool, want_y: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns dx, dweight and y computed again, None for each that is not wanted."""
    g, hat = wide(dy), wide(x) * rstd
    factor = gamma(weight, zero_centered, hat)
    y = None
    if want_y:
        y = hat if factor is None else hat * factor
        y = y if y.dtype == x.dtype else y.to(x.dtype)
    dx, dweight = _gradients(g, hat, rstd, factor, False, want_x, want_weight)
    dx = dx if dx is None or dx.dtype == x.dtype else dx.to(x.dtype)
    return dx, dweight if dweight is None or weight is None else dweight.to(weight.dtype), y


def _gradients(
    g: Tensor, hat: Tensor, rstd: Tensor, factor: Tensor | None, center: bool, want_x: bool,
    want_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dx and dweight from the normalized rows."""
    product, count = g * hat, max(1, g.shape[-1])
    dx = dweight = None
    if want_weight and factor is not None:
        dweight = product.sum(0)
    if want_x:
        if factor is None:
            dot = product.sum(-1, keepdim=True)
        else:
            dot = torch.mv(product, factor).unsqueeze(-1)
            g = g * factor
        dx = torch.addcmul(g, hat, dot, value=-1 / count)
        dx = (dx.sub_(g.mean(-1, keepdim=True)) if center else dx).mul_(rstd)
    return dx, dweight


def layernorm_forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, zero_centered: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y, mean and rstd."""
    h, power = shrunk(x)
    shift = bias if bias is None or bias.dtype == h.dtype else bias.to(h.dtype)
    factor = gamma(weight, zero_centered, h)
    y, mean, rstd = torch.native_layer_norm(h, [h.shape[-1]], factor, shift, eps)
    if power is not None:  # equal values have no variance, however large they are
        mean, rstd = mean / power, torch.where(rstd.square() * eps > 0.5, rstd, rstd * power)
    return y if y.dtype == x.dtype else y.to(x.dtype), mean, rstd


def layernorm_backward(
    dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    zero_centered: bool, want: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Returns dx, dweight and dbias, None for those of the three that are not wanted."""
    g, h = wide(dy), wide(x)
    factor = gamma(weight, zero_centered, h)
    mask = [want[0], want[1] and weight is not None, want[2] and bias is not None]
    dx = dweight = dbias = None
    if not any(mask[:2]):
        pass
    elif x.device.type == "cpu":  # PyTorch's takes differences of products, which cancel, there
        hat = (h - mean).mul_(rstd)
        dx, dweight = _gradients(g, hat, rstd, factor, True, mask[0], mask[1])
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
