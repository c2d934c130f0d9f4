"""What `benchmarks.numerics` measures: each op, eager PyTorch beside it, and the exact result.

Exact values and slopes of activations are in fp64 by forms that do not cancel: sigmoid(-x) for
1 - sigmoid(x), erfc for 1 + erf. `size` is the sum of the magnitudes that a slope adds up; where
they cancel, the unit in the last place is that of the size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from opsgraph import ops

Leaves = Mapping[str, Tensor]
"""x, and parameters by name."""


class Exact(NamedTuple):
    """A function of one variable in fp64."""

    value: Tensor
    slope: Tensor
    size: Tensor
    """Of the slope."""


def _plain(value: Tensor, slope: Tensor | float) -> Exact:
    slope = torch.as_tensor(slope, dtype=value.dtype).expand_as(value)
    return Exact(value, slope, slope.abs())


def sigmoid(x: Tensor) -> Exact:
    """And s(x) * s(-x)."""
    s, other = torch.sigmoid(x), torch.sigmoid(-x)
    return _plain(s, s * other)


def _by_sigmoid(x: Tensor, u: Tensor, du: Tensor) -> Exact:
    """x * sigmoid(u); du: u's derivative."""
    s, other = torch.sigmoid(u), torch.sigmoid(-u)
    more = x * s * other * du
    return Exact(x * s, s + more, s + more.abs())


def swish(x: Tensor, alpha: float = 1.0) -> Exact:
    """x * sigmoid(alpha * x)"""
    return _by_sigmoid(x, alpha * x, torch.full_like(x, alpha))


def gelu(x: Tensor) -> Exact:
    """0.5 * x * (1 + tanh(u)) = x * sigmoid(2u)"""
    twice = 2 * math.sqrt(2 / math.pi)
    u = twice * (x + 0.044715 * x**3)
    return _by_sigmoid(x, u, twice * (1 + 3 * 0.044715 * x * x))


def gelu_erf(x: Tensor) -> Exact:
    """x * Phi(x)"""
    phi = 0.5 * torch.special.erfc(-x / math.sqrt(2))
    more = x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return Exact(x * phi, phi + more, phi + more.abs())


def tanh(x: Tensor) -> Exact:
    """And 4 * s(2x) * s(-2x)."""
    return _plain(torch.tanh(x), 4 * torch.sigmoid(2 * x) * torch.sigmoid(-2 * x))


def mish(x: Tensor) -> Exact:
    """x * n / (n + 2), n = e^x * (e^x + 2)"""
    e = torch.exp(x.clamp(max=100.0))
    n = e * (e + 2)
    t = torch.where(x > 100, 1.0, n / (n + 2))
    more = x.clamp(max=100.0) * 4 * (n + 1) / (n + 2) / (n + 2) * (e / (1 + e))
    return Exact(x * t, t + more, t + more.abs())


def relu(x: Tensor) -> Exact:
    return _plain(torch.where(x <= 0, 0.0, x), torch.where(x <= 0, 0.0, 1.0))


def srelu(x: Tensor) -> Exact:
    positive = torch.where(x <= 0, 0.0, x)
    return _plain(positive * positive, 2 * positive)


def relu6(x: Tensor) -> Exact:
    inside = (x > 0) & (x < 6)
    return _plain(x.clamp(0, 6), torch.where(inside, 1.0, 0.0))


def hardswish(x: Tensor) -> Exact:
    slope = torch.where(x > 3, 1.0, torch.where(x <= -3, 0.0, x / 3 + 0.5))
    size = torch.where((x <= 3) & (x > -3), x.abs() / 3 + 0.5, slope)
    return Exact(torch.where(x <= -3, 0.0, x * (x + 3).clamp(0, 6) / 6), slope, size)


def leaky_relu(x: Tensor, slope: float = 0.01) -> Exact:
    return _plain(torch.where(x > 0, x, slope * x), torch.where(x > 0, 1.0, slope))


def gelu_clipped(x: Tensor, limit: float = 10.0) -> Exact:
    inner = gelu_erf(x)
    off = inner.value.abs() > limit
    return Exact(
        inner.value.clamp(-limit, limit), *(torch.where(off, 0.0, part) for part in inner[1:])
    )


def situ(x: Tensor, beta: float) -> Exact:
    """beta * tanh(x / beta) * sigmoid(x)"""
    t, s = tanh(x / beta), sigmoid(x)
    one, other = s.value * t.slope, beta * t.value * s.slope
    return Exact(beta * t.value * s.value, one + other, one.abs() + other.abs())


def soft_clip(x: Tensor, beta: float) -> Exact:
    """beta * tanh(x / beta)"""
    t = tanh(x / beta)
    return Exact(beta * t.value, *t[1:])


def clip(x: Tensor, limit: float, offset: float) -> Exact:
    slope = torch.where(x.abs() > limit, 0.0, 1.0)
    return Exact(x.clamp(-limit, limit) + offset, slope, slope)


def clamped_swish(x: Tensor, limit: float, alpha: float) -> Exact:
    inner = swish(x.clamp(max=limit), alpha)
    return Exact(inner.value, *(torch.where(x > limit, 0.0, part) for part in inner[1:]))


def line(x: Tensor) -> Exact:
    return _plain(x, 1.0)


class Elementwise(NamedTuple):
    """An activation. Gated: f(a) * g(b), else f(x)."""

    op: Callable[[], Any]
    f: Callable[[Tensor], Exact]
    eager: Callable[..., Tensor]
    """Of x, or of a and b."""
    g: Callable[[Tensor], Exact] | None = None


def _qgelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _clamped(a: Tensor, b: Tensor) -> Tensor:
    return _qgelu(a.clamp(max=7.0)) * (b.clamp(-7.0, 7.0) + 1)


def _situ(a: Tensor, b: Tensor) -> Tensor:
    return 4 * torch.tanh(a / 4) * torch.sigmoid(a) * (25 * torch.tanh(b / 25))


def _gate(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda a, b: function(a) * b


ELEMENTWISE: dict[str, Elementwise] = {
    "SiLU": Elementwise(ops.SiLU, swish, F.silu),
    "QGELU": Elementwise(ops.QGELU, lambda x: swish(x, 1.702), _qgelu),
    "GELU": Elementwise(ops.GELU, gelu, _tanh_gelu),
    "GELU, exact": Elementwise(lambda: ops.GELU("none"), gelu_erf, F.gelu),
    "ClippedGELU": Elementwise(
        ops.ClippedGELU, gelu_clipped, lambda x: F.gelu(x).clamp(-10.0, 10.0)
    ),
    "Mish": Elementwise(ops.Mish, mish, F.mish),
    "Sigmoid": Elementwise(ops.Sigmoid, sigmoid, torch.sigmoid),
    "Tanh": Elementwise(ops.Tanh, tanh, torch.tanh),
    "Hardswish": Elementwise(ops.Hardswish, hardswish, F.hardswish),
    "ReLU": Elementwise(ops.ReLU, relu, F.relu),
    "SReLU": Elementwise(ops.SReLU, srelu, lambda x: F.relu(x).square()),
    "ReLU6": Elementwise(ops.ReLU6, relu6, F.relu6),
    "LeakyReLU": Elementwise(ops.LeakyReLU, leaky_relu, F.leaky_relu),
    "ConstantScale": Elementwise(
        lambda: ops.ConstantScale(0.3), lambda x: _plain(0.3 * x, 0.3), lambda x: 0.3 * x
    ),
    "SwiGLU": Elementwise(ops.SwiGLU, swish, _gate(F.silu), line),
    "GEGLU": Elementwise(ops.GEGLU, gelu, _gate(_tanh_gelu), line),
    "GEGLU, exact": Elementwise(lambda: ops.GEGLU("none"), gelu_erf, _gate(F.gelu), line),
    "QGEGLU": Elementwise(ops.QGEGLU, lambda x: swish(x, 1.702), _gate(_qgelu), line),
    "GLU": Elementwise(ops.GLU, sigmoid, _gate(torch.sigmoid), line),
    "ReGLU": Elementwise(ops.ReGLU, relu, _gate(F.relu), line),
    "SReGLU": Elementwise(ops.SReGLU, srelu, _gate(lambda a: F.relu(a).square()), line),
    "ClampedSwiGLU": Elementwise(
        ops.ClampedSwiGLU, lambda a: clamped_swish(a, 7.0, 1.702), _clamped,
        lambda b: clip(b, 7.0, 1.0),
    ),
    "SiTUGLU": Elementwise(
        ops.SiTUGLU, lambda a: situ(a, 4.0), _situ, lambda b: soft_clip(b, 25.0)
    ),
}  # fmt: skip


class Rows(NamedTuple):
    """An op on rows, with parameters. exact: in fp64, differentiated by autograd."""

    op: Callable[[int], Any]
    eager: Callable[[Leaves], Tensor]
    exact: Callable[[Leaves], Tensor]


def _layernorm(t: Leaves) -> Tensor:
    centred = t["x"] - t["x"].mean(-1, keepdim=True)
    h = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + 1e-5)
    return h * t["weight"] + t["bias"]


def _rmsnorm(t: Leaves) -> Tensor:
    return t["x"] * torch.rsqrt(t["x"].square().mean(-1, keepdim=True) + 1e-5) * t["weight"]


def _l2(t: Leaves) -> Tensor:
    return t["x"] * torch.rsqrt(t["x"].square().sum(-1, keepdim=True) + 1e-6)


def _xielu(t: Leaves) -> Tensor:
    """transformers' formula."""
    x, p = t["x"], F.softplus(t["alpha_p"])
    n = 0.5 + F.softplus(t["alpha_n"])
    below = (torch.expm1(torch.clamp(x, max=-1e-6)) - x) * n + 0.5 * x
    return torch.where(x > 0, p * x * x + 0.5 * x, below)


ROWS: dict[str, Rows] = {
    "RMSNorm": Rows(
        ops.RMSNorm,
        lambda t: F.rms_norm(t["x"], t["x"].shape[-1:], t["weight"], 1e-5),
        _rmsnorm,
    ),
    "LayerNorm": Rows(
        ops.LayerNorm,
        lambda t: F.layer_norm(t["x"], t["x"].shape[-1:], t["weight"], t["bias"], 1e-5),
        _layernorm,
    ),
    "L2Normalization": Rows(lambda width: ops.L2Normalization(), _l2, _l2),
    "Linear": Rows(
        lambda width: ops.Linear(width, 24),
        lambda t: F.linear(t["x"], t["weight"], t["bias"]),
        lambda t: F.linear(t["x"], t["weight"], t["bias"]),
    ),
    "Bias": Rows(ops.Bias, lambda t: t["x"] + t["bias"], lambda t: t["x"] + t["bias"]),
    "LayerScale": Rows(
        ops.LayerScale, lambda t: t["x"] * t["weight"], lambda t: t["x"] * t["weight"]
    ),
    "XIELU": Rows(lambda width: ops.XIELU(), _xielu, _xielu),
}

COMPOSED = {
    "BasicLinear": "Linear",
    "GroupedLinear": "Linear",
    "LoRA": "Linear",
    "LoRALinear": "Linear",
    "TransposedGroupedLinear": "Linear",
    "TransposedLinear": "Linear",
    "AdaptiveLayerNorm": "LayerNorm",
    "AdaptiveRMSNorm": "RMSNorm",
    "Gated": "GLU",
    "ScaledClampedQGeGLU": "ClampedSwiGLU",
    "ScaledClampedSwiGLU": "ClampedSwiGLU",
    "ScaledGEGLU": "GEGLU",
    "ScaledQGEGLU": "QGEGLU",
    "ScaledReGLU": "ReGLU",
    "ScaledSReLU": "SReLU",
    "ScaledSiTUGLU": "SiTUGLU",
    "ScaledSwiGLU": "SwiGLU",
    "ScaledTanhSReLU": "Tanh",
    "WeightedAdd": "LayerScale",
}
"""Ops that are not measured, for they are made of one that is, and products or sums of PyTorch."""
MOVING = (
    "Add", "AddExtraInput", "AllGather", "AllReduce", "AllReduceGrad", "Dropout", "Identity",
    "MakeExtraOutput", "Modulate", "Quantize", "QuantizeGrad", "ReduceScatter", "Reshape",
    "Residual", "ScaledAdd", "Tee",
)  # fmt: skip
"""Ops that move values, add or multiply by PyTorch's ops, or whose bits are those of a formula."""
