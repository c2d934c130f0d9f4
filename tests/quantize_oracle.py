"""Quantizers written from their definitions, in numpy and fp64, sharing nothing with the package.

A small format is the list of all values its codes have, and rounding is a search in that list: the
nearest value, and of two that are equally near the one with the even code. fp32 results are fp64
results rounded again: a product of two fp32 numbers is exact in fp64, and so is, for rounding
to fp32, a quotient (53 bits are more than twice 24). Blocks are cut out one at a time.

Functions take fp32 arrays `[rows, cols]` and return bytes and scales as numpy arrays.
"""

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating]
Bytes = NDArray[np.uint8]
FP32_MAX = float(np.finfo(np.float32).max)


class Small(NamedTuple):
    """A format: its non-negative finite values by code, the sign bit, and the code of NaN."""

    values: NDArray[np.float64]
    sign: int
    nan: int

    @property
    def largest(self) -> float:
        return float(self.values[-1])


def _values(count: int, mantissa: int, bias: int) -> NDArray[np.float64]:
    """The values of the codes 0 to count - 1, of which the first 2^mantissa are subnormal."""
    found = []
    for code in range(count):
        exponent, fraction = divmod(code, 2**mantissa)
        whole = 1 if exponent else 0
        power = Fraction(2) ** (max(exponent, 1) - bias)
        found.append(float((whole + Fraction(fraction, 2**mantissa)) * power))
    return np.array(found)


E4M3 = Small(_values(0x7F, 3, 7), 0x80, 0x7F)
E5M2 = Small(_values(0x7C, 2, 15), 0x80, 0x7F)
E2M1 = Small(_values(8, 1, 1), 0x8, 0x7)
"""E2M1 has no NaN: hardware makes one the largest value."""


def rounded(value: Array, small: Small) -> Bytes:
    """The codes nearest to fp64 values, saturated."""
    magnitude = np.minimum(np.abs(value), small.largest)
    above = np.searchsorted(small.values, magnitude)
    above = np.clip(above, 1, len(small.values) - 1)
    up = small.values[above] - magnitude
    down = magnitude - small.values[above - 1]
    take_above = (up < down) | ((up == down) & (above % 2 == 0))
    code = np.where(take_above, above, above - 1) + small.sign * np.signbit(value)
    return np.where(np.isnan(value), small.nan, code).astype(np.uint8)


def decoded(codes: Bytes, small: Small) -> NDArray[np.float64]:
    magnitude = (codes & (small.sign - 1)).astype(int)
    known = magnitude < len(small.values)
    value = np.where(known, small.values[np.where(known, magnitude, 0)], np.nan)
    return np.where(codes & small.sign, -value, value)


def fp32(value: Array | float) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(value, np.float64).astype(np.float32).astype(np.float64)


def times(x: Array, scale: float) -> Array:
    """The fp32 product, to be rounded and saturated; NaN where x is not finite."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(np.isinf(x), np.nan, fp32(x.astype(np.float64) * scale))


def largest(x: Array) -> float:
    """The amax, NaN if there is one."""
    return max((abs(float(v)) for v in x.flat), key=_order, default=0.0)


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else min(value, FP32_MAX * 2)


def scale_of(amax: float, small: Small, eps: float = 0.0, power_of_two: bool = False) -> float:
    if amax < eps:
        amax = float(fp32(eps))
    if amax == 0 or math.isinf(amax) or math.isnan(amax):
        return 1.0
    scale = min(float(fp32(small.largest / amax)), FP32_MAX)
    return 2.0 ** (math.frexp(scale)[1] - 1) if power_of_two else scale


def blocks(x: Array, height: int, width: int) -> Iterator[tuple[int, int, tuple[slice, slice]]]:
    """Each block's place in the grid, and where it lies in x."""
    for i, top in enumerate(range(0, x.shape[0], height)):
        for j, left in enumerate(range(0, x.shape[1], width)):
            yield i, j, (slice(top, top + height), slice(left, left + width))


def by_blocks(
    x: Array, small: Small, height: int, width: int, scale: Callable[[float], tuple[float, float]]
) -> tuple[Bytes, NDArray[np.float64]]:
    """scale: from a block's amax, what is stored and what the block is multiplied by."""
    data = np.zeros(x.shape, np.uint8)
    grid = np.zeros((-(-x.shape[0] // height), -(-x.shape[1] // width)))
    for i, j, place in blocks(x, height, width):
        grid[i, j], multiplier = scale(largest(x[place]))
        data[place] = rounded(times(x[place], multiplier), small)
    return data, grid


def scaled(
    x: Array, small: Small, height: int, width: int, eps: float = 0.0, power_of_two: bool = False
) -> tuple[Bytes, NDArray[np.float64]]:
    """fp32 scales of blocks; a tensor and a row are blocks too."""

    def scale(amax: float) -> tuple[float, float]:
        found = scale_of(amax, small, eps, power_of_two)
        return found, found

    return by_blocks(x, small, height, width, scale)


def mxfp8(x: Array, small: Small) -> tuple[Bytes, NDArray[np.float64]]:
    def scale(amax: float) -> tuple[float, float]:
        if math.isnan(amax):
            return 255, math.nan
        if math.isinf(amax):
            return 254, 2.0**-127
        exponent = next(e for e in range(255) if small.largest * 2.0 ** (e - 127) >= amax)
        return exponent, 2.0 ** (127 - exponent)

    return by_blocks(x, small, 1, 32, scale)


def nvfp4(
    x: Array, amax: float, height: int, seed: int | None = None
) -> tuple[Bytes, Bytes, NDArray[np.float64]]:
    """(codes, one a byte; scales; the dequantized values)"""
    multiplier = 1.0
    if amax > 0 and math.isfinite(amax):
        multiplier = min(float(fp32(448 * 6 / amax)), FP32_MAX)
    codes = np.zeros(x.shape, np.uint8)
    value = np.zeros(x.shape)
    scales = np.zeros((-(-x.shape[0] // height), -(-x.shape[1] // 16)), np.uint8)
    draws = None if seed is None else uniform(seed, x.size).reshape(x.shape)
    for i, j, place in blocks(x, height, 16):
        block = fp32(times(np.array([largest(x[place])]), multiplier) / 6)
        scales[i, j] = rounded(block, E4M3)[0]
        d = float(decoded(scales[i : i + 1, j], E4M3)[0])
        factor = min(float(fp32(multiplier / d)), FP32_MAX) if d else FP32_MAX
        product = times(x[place], math.nan if math.isnan(d) else factor)
        codes[place] = (
            rounded(product, E2M1) if draws is None else drawn(product, draws[place], E2M1)
        )
        back = float(fp32(d * float(fp32(1 / multiplier))))
        value[place] = fp32(decoded(codes[place], E2M1) * back)
    return codes, scales, value


def drawn(value: Array, draws: NDArray[np.int64], small: Small) -> Bytes:
    """Stochastic rounding: up where draw / 2^24 is below the distance from the value beneath."""
    codes = np.zeros(value.shape, np.uint8)
    for at, one in np.ndenumerate(value):
        if math.isnan(one):
            codes[at] = small.nan
            continue
        magnitude = min(abs(float(one)), small.largest)
        code = int(np.searchsorted(small.values, magnitude, side="right")) - 1
        if code + 1 < len(small.values):
            low, high = (Fraction(float(v)) for v in small.values[code : code + 2])
            code += Fraction(int(draws[at]), 2**24) < (Fraction(magnitude) - low) / (high - low)
        codes[at] = code + small.sign * bool(np.signbit(one))
    return codes


def uniform(seed: int, count: int) -> NDArray[np.int64]:
    """24 bits for each index: lowbias32 of the index's halves, keyed by those of the seed."""
    word = 2**32

    def mix(h: int) -> int:
        h = (h ^ h >> 16) * 0x7FEB352D % word
        h = (h ^ h >> 15) * 0x846CA68B % word
        return h ^ h >> 16

    low, high = seed % 2**64 % word, seed % 2**64 // word
    first = mix(low)
    second = mix(high ^ first)
    found = [mix(mix(i % word ^ first) ^ i // word ^ second) % 2**24 for i in range(count)]
    return np.array(found, np.int64)


def hadamard(x: Array, signs: list[float]) -> NDArray[np.float64]:
    """As a matrix: the entry (i, j) is minus where i and j share an odd number of bits."""
    matrix = np.array([[(-1) ** bin(i & j).count("1") for j in range(16)] for i in range(16)]) / 4
    x = np.pad(x, ((0, 0), (0, -x.shape[1] % 16))).astype(np.float64)
    return ((x.reshape(-1, 16) * signs) @ matrix).reshape(x.shape)
