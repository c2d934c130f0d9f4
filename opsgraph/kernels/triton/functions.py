"""Scalar functions of activations, and the table of kinds.

A function takes x in fp32, ALPHA (its constant), and the dtype of x in memory, for those that round
each step. It returns value, slope, and whether the gradient is 0 whatever it is multiplied with
(`x < x`: nowhere). In the forward the slope is not read, and the compiler drops it.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..reference.activations import form_of
from .ptx import rounded, sigmoid


@triton.jit
def _vanishing(factor, x):
    """The product, but 0 where the factor is: the limit at infinity."""
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def _swish(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    """x * sigmoid(alpha * x)"""
    s = sigmoid(x * ALPHA)
    value = _vanishing(s, x)
    return value, s + (1.0 - s) * tl.minimum(ALPHA * value, 3.0e38), x < x


@triton.jit
def _sigmoid(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    s = sigmoid(x)
    return s, s * (1.0 - s), x < x


@triton.jit
def _gelu(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    """0.5 * x * (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 * x^3)"""
    square = x * x
    s = sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
    outer = x * (1.5957691216057308 * (1.0 + 0.134145 * square))
    return _vanishing(s, x), s + _vanishing(s * (1.0 - s), outer), x < x


@triton.jit
def _gelu_erf(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    """x * Phi(x), Phi the normal distribution function"""
    phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
    density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return _vanishing(phi, x), phi + _vanishing(density, x), x < x


@triton.jit
def _relu(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0), x <= 0.0  # a NaN stays one


@triton.jit
def _srelu(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    positive = tl.where(x <= 0.0, 0.0, x)
    return positive * positive, 2.0 * positive, x <= 0.0


@triton.jit
def _tanh(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    t = _hyperbolic_tangent(x)
    return t, 1.0 - t * t, x < x


@triton.jit
def _hyperbolic_tangent(x):
    """Its power series near 0, where 2 * sigmoid(2x) - 1 would cancel."""
    square = x * x
    p = 3.59212804e-3 - 1.45583438e-3 * square
    p = p * square - 8.86323553e-3
    p = p * square + 2.18694885e-2
    p = p * square - 5.39682540e-2
    p = p * square + 1.33333333e-1
    p = p * square - 3.33333333e-1
    near = x * square * p + x
    return tl.where(tl.abs(x) < 0.4, near, 2.0 * sigmoid(2.0 * x) - 1.0)


@triton.jit
def _relu6(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    value = tl.where(x <= 0.0, 0.0, tl.where(x >= 6.0, 6.0, x))
    off = (x <= 0.0) | (x >= 6.0)
    return value, tl.where(off, 0.0, 1.0), off


@triton.jit
def _hardswish(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    """x * clamp(x + 3, 0, 6) / 6"""
    inside = tl.where(x <= -3.0, 0.0, tl.where(x >= 3.0, 6.0, x + 3.0))
    return (
        tl.where(x <= -3.0, 0.0, x * inside / 6.0),
        tl.where(x > 3.0, 1.0, x / 3.0 + 0.5),
        x <= -3.0,
    )


@triton.jit
def _mish(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    """x * tanh(log(1 + e^x)) = x * n / (n + 2), n = e^x * (e^x + 2)"""
    e = tl.exp(tl.where(x > 20.0, 20.0, x))
    n = e * (e + 2.0)
    t = n / (n + 2.0)
    inner = tl.where(x > 20.0, 20.0, x)
    slope = (4.0 * (n + 1.0) / (n + 2.0)) / (n + 2.0) * (e / (1.0 + e))
    return _vanishing(t, x), t + _vanishing(slope, inner), x < x


@triton.jit
def _leaky_relu(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    """ALPHA: the slope below 0."""
    return tl.where(x > 0.0, x, x * ALPHA), tl.where(x > 0.0, 1.0, ALPHA), x < x


@triton.jit
def _gelu_clipped(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    value, slope, _ = _gelu_erf(x, 1.0, DTYPE)
    inside = tl.where(value > ALPHA, ALPHA, tl.where(value < -ALPHA, -ALPHA, value))
    return inside, slope, tl.abs(value) > ALPHA


@triton.jit
def _gelu_as_pytorch(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    """By PyTorch's formula, which cancels far below 0: for gates that round as it does."""
    inner = tl.where(x < -10.0667, -10.0667, tl.where(x > 10.0379, 10.0379, x))
    u = 0.7978845608028654 * (inner + 0.044715 * (inner * inner * inner))
    above = tl.where(x < -10.0667, -10.0667, x)
    _, slope, off = _gelu(x, 1.0, DTYPE)
    return 0.5 * above * (1.0 + _hyperbolic_tangent(u)), slope, off


# Values as transformers composes them of PyTorch's operations, each of which rounds; their slopes
# are those of the functions.


@triton.jit
def _gelu_steps(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    cube = rounded(rounded(x * x, DTYPE) * x, DTYPE)
    inner = rounded(x + rounded(0.044715 * cube, DTYPE), DTYPE)
    t = rounded(_hyperbolic_tangent(rounded(0.7978845608028654 * inner, DTYPE)), DTYPE)
    _, slope, off = _gelu(x, 1.0, DTYPE)
    return rounded(0.5 * x, DTYPE) * rounded(1.0 + t, DTYPE), slope, off


@triton.jit
def _gelu_fast_steps(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    inner = rounded(1.0 + rounded(rounded(0.044715 * x, DTYPE) * x, DTYPE), DTYPE)
    u = rounded(rounded(x * 0.7978845608, DTYPE) * inner, DTYPE)
    t = rounded(_hyperbolic_tangent(u), DTYPE)
    _, slope, off = _gelu(x, 1.0, DTYPE)
    return rounded(0.5 * x, DTYPE) * rounded(1.0 + t, DTYPE), slope, off


@triton.jit
def _gelu_erf_steps(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    e = rounded(tl.erf(rounded(x * 0.7071067811865476, DTYPE)), DTYPE)
    _, slope, off = _gelu_erf(x, 1.0, DTYPE)
    return rounded(x * 0.5, DTYPE) * rounded(1.0 + e, DTYPE), slope, off


@triton.jit
def _swish_steps(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    _, slope, off = _swish(x, ALPHA, DTYPE)
    return x * rounded(sigmoid(rounded(x * ALPHA, DTYPE)), DTYPE), slope, off


class Kind(NamedTuple):
    """One row of the table; the names are the kernels' compile-time arguments."""

    FUNCTION: Any
    GATED: int
    ALPHA: float = 1.0
    LIMIT: float | None = None
    OFFSET: float = 0.0


KINDS = {
    "gelu": Kind(_gelu, False),
    "gelu_erf": Kind(_gelu_erf, False),
    "qgelu": Kind(_swish, False, 1.702),
    "relu": Kind(_relu, False),
    "srelu": Kind(_srelu, False),
    "silu": Kind(_swish, False),
    "geglu": Kind(_gelu, True),
    "geglu_erf": Kind(_gelu_erf, True),
    "qgeglu": Kind(_swish, True, 1.702),
    "reglu": Kind(_relu, True),
    "sreglu": Kind(_srelu, True),
    "swiglu": Kind(_swish, True),
    "glu": Kind(_sigmoid, True),
    "clamped_swiglu": Kind(_swish, True, 1.702, 7.0, 1.0),
    "gelu_fast": Kind(_gelu, False),
    "sigmoid": Kind(_sigmoid, False),
    "tanh": Kind(_tanh, False),
    "relu6": Kind(_relu6, False),
    "hardswish": Kind(_hardswish, False),
    "mish": Kind(_mish, False),
    "leaky_relu": Kind(_leaky_relu, False, 0.01),
    "gelu_clipped": Kind(_gelu_clipped, False, 10.0),
}
PARAMS = {
    "clamped_swiglu": ("LIMIT", "ALPHA", "OFFSET"), "leaky_relu": ("ALPHA",),
    "gelu_clipped": ("ALPHA",),
}  # fmt: skip
"""What a kind's params are."""
STEPS = {_gelu: _gelu_steps, _gelu_erf: _gelu_erf_steps, _swish: _swish_steps}


@lru_cache(maxsize=256)
def constants(kind: str, params: tuple[float, ...] = ()) -> dict[str, Any]:
    """The kernels' compile-time arguments for a kind; params as in `activation_forward`."""
    form = form_of(kind)
    name = form.name
    if name not in KINDS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(KINDS)}")
    row, names = KINDS[name], PARAMS.get(name, ())
    if params:
        if len(params) != len(names):
            expected = f"({', '.join(names).lower()})" if names else "none"
            raise ValueError(f"activation {name!r} got params {params}, expected {expected}")
        given: dict[str, Any] = dict(zip(names, map(float, params), strict=True))
        row = row._replace(**given)
    if form.steps:
        steps = _gelu_fast_steps if name == "gelu_fast" else STEPS[row.FUNCTION]
        row = row._replace(FUNCTION=steps)
    elif form.rounded and row.FUNCTION is _gelu:
        row = row._replace(FUNCTION=_gelu_as_pytorch)
    if row.GATED or form.gated:
        row = row._replace(GATED=1 + 2 * form.rounded + 4 * form.second + 8 * form.after)
    return row._asdict()
