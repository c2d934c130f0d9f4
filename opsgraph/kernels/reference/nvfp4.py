"""NVFP4 of `[rows, cols]` tensors: four-bit E2M1 data, E4M3 block scales, one amax per tensor.

With A the tensor's amax (`quantize.amax_of`, perhaps reduced over ranks) and a a block's, in fp32:

    S = 448 * 6 / A, or 1 where A is 0, infinite or NaN     the tensor's multiplier
    d = e4m3(min(a * S / 6, 448))              the block's scale; NaN if a is infinite or NaN
    q = e2m1(clamp(x * min(S / d, FP32_MAX), -6, 6))        the data
    x ~ q * (d * (1 / S))                                   dequantized

Blocks are 1 x 16 (16 columns of a row) or, for weights, 16 x 16. A block at the end may be short,
as if it were filled up with zeros. E2M1 has the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 (codes 0 to
7; bit 3 is the sign); rounding is to nearest even, or stochastic. It has no NaN: in a block whose
scale is NaN all is 6. Two codes make a byte, the even column's in its low half; the last byte of an
odd width has a zero in its high half.

Scales run along rows. The copy that contracts over x's rows is the quantizer of `x.t()`. With
16 x 16 blocks it holds the same codes (packed along the other dimension) and the transposed scales.
"""

import torch
from torch import Tensor

from .dropout import MASK, mix
from .quantize import E4M3, FP8_MAX, FP32_MAX, block_amax, cast, decode, quotient, spread, times

BLOCK = 16
E2M1_MAX = 6.0
MINUS = 0x243F
"""Where the random Hadamard transform's signs are minus: the first 16 bits of pi's fraction."""


def quantize_nvfp4(
    x: Tensor, amax: Tensor, height: int = 1, seed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns (data uint8 `[rows, ceil(cols / 2)]`, scale E4M3 of a block grid).

    x: fp32, bf16 or fp16; amax: fp32 `[]`, the tensor's; height: 1 or 16, the rows of a block, so
    that scale is `[ceil(rows / height), ceil(cols / 16)]`. seed, an int64 of one element, asks for
    stochastic rounding (see `e2m1`).
    """
    multiplier = tensor_multiplier(amax)
    value = x.contiguous().float()
    product = block_amax(value, height, BLOCK) * multiplier
    six = torch.full_like(amax, E2M1_MAX)  # a number would make CUDA multiply by its reciprocal
    scale = cast(product / six, torch.ones_like(amax), E4M3)
    factor = (multiplier / scale.float()).clamp_max(FP32_MAX)
    return pack(e2m1(value * spread(factor, x.shape, height, BLOCK), seed)), scale


def dequantize_nvfp4(
    data: Tensor, scale: Tensor, amax: Tensor, cols: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`q * (d * (1 / S))`, in fp32 and then rounded to `dtype`: `[rows, cols]`."""
    factor = scale.float() * tensor_multiplier(amax).reciprocal()
    return block_values(data, factor, cols).to(dtype)


def block_values(data: Tensor, factor: Tensor, cols: int) -> Tensor:
    """`q * factor`, the entry of q's block, in factor's dtype.

    With the block scales d for factors fp32 and bf16 hold them: two significant bits by four.
    """
    value = from_e2m1(unpack(data, cols), factor.dtype)
    return times(value, factor, 1 if factor.size(0) == value.size(0) else BLOCK, BLOCK)


def tensor_multiplier(amax: Tensor) -> Tensor:
    """S of the module's formula, fp32."""
    multiplier = quotient(FP8_MAX[E4M3] * E2M1_MAX, amax).clamp_max(FP32_MAX)
    return torch.where((amax > 0) & (amax < torch.inf), multiplier, 1.0)


def e2m1(value: Tensor, seed: Tensor | None = None) -> Tensor:
    """The uint8 codes of an fp32 `[rows, cols]`, saturated and rounded.

    To nearest even, or, with a seed, stochastically: between neighbours `low <= |value| < high` it
    is `high` where `u < (|value| - low) / (high - low)`, with u uniform in [0, 1): a multiple of
    2^-24 that depends on the seed and on the element's flat index alone.
    """
    value = value.nan_to_num(E2M1_MAX)
    magnitude = value.abs().clamp_max(E2M1_MAX)
    # Codes are 0.5 apart below 2, then 1, then 2: the exponent of fp32 says which.
    exponent = (magnitude.view(torch.int32) >> 23).clamp_min(127)
    steps = magnitude * ((255 - exponent) << 23).view(torch.float32)
    if seed is None:
        whole = steps.round()
    else:
        whole = steps.floor()
        whole = whole + (uniform(seed, *value.shape) < steps - whole)
    code = whole.int() + 2 * (exponent - 127)
    return (code | ((value.view(torch.int32) >> 28) & 8)).to(torch.uint8)


def from_e2m1(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of four-bit codes, fp32 or bf16: E4M3 has the same bits for a 64th of each."""
    return decode(((codes & 8) << 4 | (codes & 7) << 2).view(E4M3), dtype) * 64.0


def pack(codes: Tensor) -> Tensor:
    """Two codes of a row in a byte, the first in the low half."""
    codes = torch.nn.functional.pad(codes, (0, codes.size(1) % 2))
    return (codes[:, ::2] | (codes[:, 1::2] << 4)).contiguous()


def unpack(data: Tensor, cols: int) -> Tensor:
    """The uint8 codes `[rows, cols]` of packed data."""
    return torch.stack((data & 15, data >> 4), 2).flatten(1)[:, :cols]


def uniform(seed: Tensor, rows: int, cols: int) -> Tensor:
    """fp32 multiples of 2^-24 in [0, 1): the hash of (seed, flat index) that `dropout` uses."""
    first = mix(seed.reshape(()) & MASK)
    second = mix(((seed.reshape(()) >> 32) & MASK) ^ first)
    index = torch.arange(rows * cols, device=seed.device)
    h = mix((index & MASK) ^ first)
    h = mix(h ^ (index >> 32) ^ second)
    return ((h & 0xFFFFFF).float() * 2.0**-24).view(rows, cols)


def _signs(device: torch.device) -> Tensor:
    """1 or -1 for each of 16 columns; made there, for a CUDA graph cannot copy from the host."""
    bits = MINUS >> torch.arange(BLOCK - 1, -1, -1, device=device) & 1
    return (1 - 2 * bits).float()


def hadamard(x: Tensor) -> Tensor:
    """The random Hadamard transform of each 16 columns: `(x * signs) @ H / 4`, H Sylvester's.

    x: `[rows, cols]`; returns fp32 `[rows, 16 * ceil(cols / 16)]`, columns past the end counting as
    zeros: the transform spreads a block over all its 16 columns. It is orthogonal, so that a GEMM
    which contracts over two transformed operands gives the product of the plain ones. Computed as
    four butterflies in fp32, columns 8 apart first, then 4, 2 and 1.
    """
    value = torch.nn.functional.pad(x.float(), (0, -x.size(1) % BLOCK))
    signs = _signs(x.device)
    return _butterflies(value.view(-1, BLOCK) * signs).view(value.shape)


def _butterflies(blocks: Tensor) -> Tensor:
    for distance in (8, 4, 2, 1):
        pairs = blocks.view(-1, BLOCK // (2 * distance), 2, distance)
        first, second = pairs[:, :, 0], pairs[:, :, 1]
        blocks = torch.stack((first + second, first - second), 2).view(-1, BLOCK)
    return blocks * 0.25
