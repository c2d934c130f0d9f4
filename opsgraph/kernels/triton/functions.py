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
from .exponentials import between, gate, logistic, outside, power
from .ptx import reciprocal, rounded, sigmoid


@triton.jit
def _vanishing(factor, x):
    """The product, but 0 where the factor is: the limit at infinity."""
    return tl.where(factor == 0.0, 0.0, factor * x)


@triton.jit
def _swish(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    """x * sigmoid(alpha * x)"""
    if DTYPE == tl.float32 and ALPHA > 0.0:
        inner = between(x, -89.0 / ALPHA, 86.0 / ALPHA)
        u = inner * ALPHA
        value, slope = gate(inner, power(inner, -ALPHA, -2), u, u)
        return outside(x, inner, value, 0.0, x), outside(x, inner, slope, 0.0, 1.0), x < x
    else:
        s = sigmoid(x * ALPHA)
        value = _vanishing(s, x)
        return value, s + (1.0 - s) * tl.minimum(ALPHA * value, 3.0e38), x < x


@triton.jit
def _sigmoid(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    if DTYPE == tl.float32:
        inner = between(x, -89.0, 86.0)
        e = power(inner, -1.0, -2)
        s, _, _, _ = logistic(e)
        slope = tl.where(inner < 1.0, tl.fma(-s, s, s), s * (e * s * 4.0))
        return outside(x, inner, s, 0.0, 1.0), outside(x, inner, slope, 0.0, 0.0), x < x
    else:
        s = sigmoid(x)
        return s, s * (1.0 - s), x < x


@triton.jit
def _gelu(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    """0.5 * x * (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 * x^3)"""
    if DTYPE == tl.float32:
        inner = between(x, -10.0731, 9.94)  # where 2u is -89 and 86
        square = inner * inner
        u = inner * tl.fma(square, 0.07135481282052521, 1.5957691216057308)
        steep = inner * tl.fma(square, 0.21406443846157563, 1.5957691216057308)
        value, slope = gate(inner, power(-u, 1.0, -2), u, steep)
        return outside(x, inner, value, 0.0, x), outside(x, inner, slope, 0.0, 1.0), x < x
    else:
        square = x * x
        s = sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        outer = x * (1.5957691216057308 * (1.0 + 0.134145 * square))
        return _vanishing(s, x), s + _vanishing(s * (1.0 - s), outer), x < x


@triton.jit
def _gelu_erf(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    """x * Phi(x), Phi the normal distribution function"""
    if DTYPE == tl.float32:
        inner = between(x, -13.2665, 13.2665)  # where e^(-x^2 / 2) counts as 0
        phi, e, near = _normal(inner)
        slope = phi + inner * 0.3989422804014327 * e
        value = tl.where(tl.abs(x) < 1.0, near, inner * phi)
        return outside(x, inner, value, 0.0, x), outside(x, inner, slope, 0.0, 1.0), x < x
    else:
        phi = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return _vanishing(phi, x), phi + _vanishing(density, x), x < x


@triton.jit
def _normal(x):
    """Phi(x), e^(-x^2 / 2), and for x from -1 to 1 x * Phi(x); x from -13.2665 to 13.2665.

    1 + erf would cancel. By `GeluErf` of `cpu/source/activations.h`, whose polynomials these are;
    the third has back what its steps round away.
    """
    size, square = tl.abs(x), x * x
    d = tl.fma(size, 0.35, 1.0)
    t = reciprocal(d)
    t = tl.fma(tl.fma(-d, t, 1.0), t, t)
    p = tl.fma(t, -2.915957015e-2, 1.440392480e-1)
    p = tl.fma(p, t, -2.558565116e-1)
    p = tl.fma(p, t, 1.593400730e-1)
    p = tl.fma(p, t, -2.322667073e-2)
    p = tl.fma(p, t, 1.055586986e-1)
    p = tl.fma(p, t, 1.198196804e-1)
    p = tl.fma(p, t, 1.398637431e-1)
    p = tl.fma(p, t, 1.396212934e-1)
    e = power(square, -0.5)
    low = tl.fma(x, x, -square)
    e = tl.fma(-0.5 * low, e, e)
    r = tl.fma(square, -7.654208275e-6, 1.134863705e-4)
    r = tl.fma(r, square, -1.186329988e-3)
    r = tl.fma(r, square, 9.973322973e-3)
    r = tl.fma(r, square, -6.649035960e-2)
    q = tl.fma(r, square, 3.989422917e-1)
    lost = tl.fma(low, q, square * tl.fma(r, square, 3.989422917e-1 - q))
    tail = p * t * e
    phi = tl.where(size < 1.0, tl.fma(x, q, 0.5), tl.where(x < 0.0, tail, 1.0 - tail))
    return phi, e, tl.fma(square, q, 0.5 * x) + lost


@triton.jit
def _relu(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0), x <= 0.0  # a NaN stays one


@triton.jit
def _srelu(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    positive = tl.where(x <= 0.0, 0.0, x)
    return positive * positive, 2.0 * positive, x <= 0.0


@triton.jit
def _tanh(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    value, slope = _hyperbolic(x, DTYPE)
    return value, slope, x < x


@triton.jit
def _hyperbolic(x, DTYPE: tl.constexpr):
    """tanh and its slope. In fp32 up to 1 by x + x^3 * p(x^2), where 1 - 2 / (e^2x + 1) would

    cancel, and by the slope of the latter beyond 0.75, where 1 - tanh^2 would; in 16 bits from 0.4.
    """
    if DTYPE == tl.float32:
        size, square = tl.abs(x), x * x
        s, _, _, _ = logistic(power(tl.where(size > 44.5, 44.5, size), 2.0, -2))
        p = tl.fma(square, 1.214704243e-4, -8.411360322e-4)
        p = tl.fma(p, square, 3.078592243e-3)
        p = tl.fma(p, square, -8.595112711e-3)
        p = tl.fma(p, square, 2.178473026e-2)
        p = tl.fma(p, square, -5.395310000e-2)
        p = tl.fma(p, square, 1.333319992e-1)
        p = tl.fma(p, square, -3.333332837e-1)
        far = 1.0 - 2.0 * s
        value = tl.where(size < 1.0, tl.fma(x * square, p, x), tl.where(x < 0.0, -far, far))
        flat = tl.fma(-value, value, 1.0)
        return value, tl.where(size < 0.75, flat, 4.0 * s * (1.0 - s))
    else:
        s = sigmoid(-2.0 * tl.abs(x))
        near, far = _tanh_near_zero(x), 1.0 - 2.0 * s
        small = tl.abs(x) < 0.4
        value = tl.where(small, near, tl.where(x < 0.0, -far, far))
        return value, tl.where(small, 1.0 - near * near, 4.0 * s * (1.0 - s))


@triton.jit
def _tanh_near_zero(x):
    """To the digits of 16 bits, up to 0.4: its power series, where 1 - 2 * sigmoid(-2x) cancels."""
    square = x * x
    p = 3.59212804e-3 - 1.45583438e-3 * square
    p = p * square - 8.86323553e-3
    p = p * square + 2.18694885e-2
    p = p * square - 5.39682540e-2
    p = p * square + 1.33333333e-1
    p = p * square - 3.33333333e-1
    return x * square * p + x


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
    if DTYPE == tl.float32:  # as `Mish` of cpu/source/activations.h
        above = tl.where(x < -104.0, -104.0, x)
        inner = tl.where(above > 20.0, 20.0, above)
        e = power(inner, 1.0, 64) * 5.421010862427522e-20  # 2^-64: down to the smallest numbers
        h = tl.fma(0.5 * e, e, e)
        d = 1.0 + h
        i = reciprocal(d)
        t = h * i
        off = tl.fma(-d, i, 1.0) - i * (h - (d - 1.0))
        rest = tl.fma(t, off, tl.fma(h, i, -t))
        a, b = inner * i, tl.fma(e, e, e) * i
        slope = t + tl.fma(a, b, tl.fma(a * b, 2.0 * off, rest))
        return tl.fma(above, t, inner * rest), slope, x < x
    else:
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
    t, _ = _hyperbolic(u, DTYPE)
    return 0.5 * above * (1.0 + t), slope, off


# Values as transformers composes them of PyTorch's operations, each of which rounds; their slopes
# are those of the functions.


@triton.jit
def _gelu_steps(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    cube = rounded(rounded(x * x, DTYPE) * x, DTYPE)
    inner = rounded(x + rounded(0.044715 * cube, DTYPE), DTYPE)
    t, _ = _hyperbolic(rounded(0.7978845608028654 * inner, DTYPE), DTYPE)
    t = rounded(t, DTYPE)
    _, slope, off = _gelu(x, 1.0, DTYPE)
    return rounded(0.5 * x, DTYPE) * rounded(1.0 + t, DTYPE), slope, off


@triton.jit
def _gelu_fast_steps(x, ALPHA: tl.constexpr, DTYPE: tl.constexpr):
    inner = rounded(1.0 + rounded(rounded(0.044715 * x, DTYPE) * x, DTYPE), DTYPE)
    u = rounded(rounded(x * 0.7978845608, DTYPE) * inner, DTYPE)
    t, _ = _hyperbolic(u, DTYPE)
    t = rounded(t, DTYPE)
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
    s, _, _ = _sigmoid(rounded(x * ALPHA, DTYPE), 1.0, DTYPE)
    return x * rounded(s, DTYPE), slope, off


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
