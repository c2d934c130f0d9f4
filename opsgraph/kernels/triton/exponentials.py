"""Exponentials, and what is made of them, to the last digits of fp32: for tensors in fp32.

16-bit results have fewer digits and less time: theirs are of `ptx`. The chip has approximate
instructions for a power of two, a reciprocal and the reciprocal of a root. Here a polynomial takes
the place of the first: Hopper starts eight multiply-adds in the time of one such instruction. Sums
and products after the others put back what is lost, by steps of T. J. Dekker (Numerische
Mathematik 18, 1971) and of Newton. Multiply-adds are fused where `tl.fma` says so; Triton's
interpreter rounds them twice.
"""

import triton
import triton.language as tl

from .ptx import reciprocal


@triton.jit
def between(x, LOW: tl.constexpr, HIGH: tl.constexpr):
    """x clamped; a NaN stays one."""
    above = tl.where(x < LOW, LOW, x)
    return tl.where(above > HIGH, HIGH, above)


@triton.jit
def outside(x, inner, value, BELOW: tl.constexpr, above):
    """value where x is inner, else the limit on that side."""
    return tl.where(x < inner, BELOW, tl.where(x > inner, above, value))


@triton.jit
def power(x, A: tl.constexpr, LIFT: tl.constexpr = 0):
    """e^(A * x) * 2^LIFT where that is a normal number, LIFT an integer.

    Not of the product A * x, which would round: log(2) / A is taken from x, n times, in two parts
    of which the first has 16 bits and is exact in n * part (W. J. Cody and W. Waite, Software
    Manual for the Elementary Functions, 1980).
    """
    each: tl.constexpr = 0.6931471805599453 / A
    large: tl.constexpr = each * 137438953473.0  # 2^37 + 1
    whole: tl.constexpr = large - (large - each)
    rest: tl.constexpr = whole - each
    magic: tl.constexpr = 12582912.0  # 1.5 * 2^23: adding it leaves n in the lowest bits
    shifted = tl.fma(x, 1.4426950408889634 * A, magic)
    n = shifted - magic
    t = tl.fma(n, rest, tl.fma(n, -whole, x)) * A  # up to log(2) / 2
    p = tl.fma(t, 1.38144998e-3, 8.36874545e-3)
    p = tl.fma(p, t, 4.16683890e-2)
    p = tl.fma(p, t, 1.66665203e-1)
    p = tl.fma(p, t, 4.99999932e-1)
    p = tl.fma(p, t, 1.0)
    field = (shifted.to(tl.uint32, bitcast=True) << 23) + ((127 + LIFT) << 23)
    return tl.fma(p, t, 1.0) * field.to(tl.float32, bitcast=True)


@triton.jit
def inverse_root(x):
    """1 / sqrt(x); 0 of infinity, infinity of 0."""
    r = tl.rsqrt(x)
    better = tl.fma(0.5 * r, tl.fma(-x * r, r, 1.0), r)
    return tl.where((r > 0.0) & (r < float("inf")), better, r)


@triton.jit
def logistic(e):
    """sigmoid(u) of e = e^-u / 4, from 2^-126 to 2^126.5; the quarter of 1 + e^-u, d; what the
    rounding of d has lost; the reciprocal of d, r, a normal number down to sigmoids of 2^-128.
    """
    d = e + 0.25
    lost = e - (d - 0.25)
    r = reciprocal(d)
    off = tl.fma(-lost, r, tl.fma(-d, r, 1.0))
    s = r * 0.25
    return tl.fma(s, off, s), d, lost, r


@triton.jit
def gate(x, e, u, steep):
    """x * sigmoid(u) and its slope. e: as `logistic` takes it; steep: x times u's slope."""
    s, d, lost, r = logistic(e)
    first = x * s
    rest = tl.fma(-lost, first, tl.fma(-d, first, x * 0.25))
    other = tl.where(u < 1.0, 1.0 - s, e * s * 4.0)
    return tl.fma(rest, r, first), tl.fma(steep * other, s, s)
