"""FP8 quantizers of `[rows, cols]` tensors: by tensor, by row, by block, MXFP8; delayed scaling.

A quantizer takes fp32, bf16 or fp16 and returns `(data, scale)`, both contiguous and on x's device;
data is `[rows, cols]` of `dtype`, E4M3 (`float8_e4m3fn`, largest value 448) or E5M2 (57344):

    quantizer         scale                                          one scale covers
    quantize_tensor   fp32 []                                        the tensor
    quantize_rows     fp32 [rows, 1]                                 a row
    quantize_blocks   fp32 [ceil(rows / height), ceil(cols / 128)]   1 or 128 rows by 128 columns
    quantize_mxfp8    uint8 [rows, ceil(cols / 32)]                  32 columns of a row

Scales multiply: `data = cast(x * scale)`; only MXFP8's divides. The product is in fp32, is clamped
to the dtype's finite range, then rounded once, to nearest even. So finite x saturate; an infinite
one, like a NaN, is a NaN, the byte 0x7F, for an overflow has to show in what is made of it. amax is
the largest magnitude that a scale covers, NaN if one of them is, and

    scale = fp8_max / max(amax, eps), or 1 where that amax is 0, infinite or NaN

in fp32 (an infinite quotient becomes the largest fp32), rounded down to a power of two if asked.

Sizes need not divide: a block at the end is a short one, as if it were filled up with zeros, which
change no amax. data is never padded.

Scales run along rows. The copy that contracts over x's rows (a weight gradient's operand) is the
quantizer of `x.t()`: data `[cols, rows]`, with blocks of 128 x 1 or 32 x 1 of x, of which each has
its own scale. For `quantize_tensor`, and for blocks of 128 x 128, that is the transpose of the same
data and scale, bit for bit, so one quantization serves both: `data.t().contiguous(), scale.t()`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ...base.errors import OpsgraphError
from ...guards.validation import shown

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP8_MAX = {E4M3: 448.0, E5M2: 57344.0}
FP32_MAX = torch.finfo(torch.float32).max
BLOCK, MX_BLOCK = 128, 32

_INFINITY = 0x7F800000
_NOT_MANTISSA = -0x800000
_E4M3_IN_BF16 = -0x7810
"""The sign, as bf16 has it, and E4M3's seven other bits four places up."""
_BF16_NAN = 0x7FC0


def amax_of(x: Tensor, dim: int | None = None) -> Tensor:
    """The largest magnitude, fp32: of the tensor `[]`, or along `dim`, which is kept with size 1.

    NaN if there is one; 0 where there is nothing.
    """
    if dim is None:
        return x.abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)
    if x.size(dim) == 0:
        shape = [1 if axis == dim % x.dim() else size for axis, size in enumerate(x.shape)]
        return x.new_zeros(shape, dtype=torch.float32)
    return x.abs().amax(dim, keepdim=True).float()


def scale_of(
    amax: Tensor, dtype: torch.dtype, eps: float = 0.0, power_of_two: bool = False
) -> Tensor:
    """The multiplier of each amax, fp32 of any shape, by the formula of the module's docstring."""
    amax = amax.clamp_min(eps)
    scale = quotient(FP8_MAX[dtype], amax).clamp_max(FP32_MAX)
    scale = torch.where((amax > 0) & (amax < torch.inf), scale, 1.0)
    return (scale.view(torch.int32) & _NOT_MANTISSA).view(torch.float32) if power_of_two else scale


def quotient(numerator: float, x: Tensor) -> Tensor:
    """`numerator / x`, rounded once: PyTorch itself multiplies by the reciprocal of x."""
    return torch.full_like(x, numerator) / x


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`x * scale` saturated and rounded to `dtype`, NaN where x is not finite; scale is fp32 and
    broadcasts."""
    limit = FP8_MAX[dtype]
    value = x.float()
    product = (value * scale).clamp(-limit, limit).masked_fill(value.isinf(), torch.nan)
    return product.nan_to_num(torch.nan).to(dtype).contiguous()  # a NaN loses its sign


def decode(data: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of FP8 data in fp32 or bf16, which both hold them; strided as data is.

    A CPU converts from FP8 one value at a time. Its bits, moved to where fp16 (E5M2) or bf16
    (E4M3) has them, are a number of that format, for E4M3 with an exponent that is 120 too small.
    """
    if data.device.type != "cpu":
        return data.to(dtype)
    bits = data.view(torch.int8).to(torch.int16)
    if data.dtype == E5M2:
        return bits.mul_(2**8).view(torch.float16).to(dtype)
    bits.mul_(2**4).bitwise_and_(_E4M3_IN_BF16)
    nan = ((bits & 0x7F0) + 0x10 >> 11).mul_(_BF16_NAN)  # where all seven bits are set
    value = bits.view(torch.bfloat16).mul_(2.0**120)
    return value.view(torch.int16).bitwise_or_(nan).view(torch.bfloat16).to(dtype)


def quantize_tensor(
    x: Tensor, dtype: torch.dtype, eps: float = 0.0, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Current scaling with one scale, fp32 `[]`."""
    scale = scale_of(amax_of(x), dtype, eps, power_of_two)
    return cast(x, scale, dtype), scale


def quantize_rows(
    x: Tensor, dtype: torch.dtype, eps: float = 0.0, power_of_two: bool = False
) -> tuple[Tensor, Tensor]:
    """Current scaling with one scale per row, fp32 `[rows, 1]`."""
    value = x.contiguous().float()
    scale = scale_of(amax_of(value, 1), dtype, eps, power_of_two)
    return cast(value, scale, dtype), scale


def quantize_blocks(
    x: Tensor, dtype: torch.dtype, height: int = 1, eps: float = 0.0, power_of_two: bool = True
) -> tuple[Tensor, Tensor]:
    """One scale per block of `height` (1 or 128) rows by 128 columns."""
    value = x.contiguous().float()
    scale = scale_of(block_amax(value, height, BLOCK), dtype, eps, power_of_two)
    return cast(value, spread(scale, x.shape, height, BLOCK), dtype), scale


def quantize_mxfp8(x: Tensor, dtype: torch.dtype = E4M3) -> tuple[Tensor, Tensor]:
    """Microscaling: one scale `2^(e - 127)` per 32 columns of a row, stored as the byte e (E8M0).

    The scale divides: `data = cast(x * 2^(127 - e))`. It is amax / fp8_max, rounded up to a power
    of two; e is 0 for an amax of 0 (and wherever 2^-127 is enough), 0xFE for an infinite one and
    0xFF, a NaN, for a NaN, which makes the block's data NaN.
    """
    value = x.contiguous().float()
    exponent = e8m0_of(block_amax(value, 1, MX_BLOCK), dtype)
    inverse = exp2(127 - exponent)
    inverse = torch.where(exponent == 255, torch.nan, inverse)
    data = cast(value, spread(inverse, x.shape, 1, MX_BLOCK), dtype)
    return data, exponent.to(torch.uint8)


def dequantize(
    data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32, exact: bool = False
) -> Tensor:
    """`data * (1 / scale)`, in fp32 and then rounded to `dtype`: what a scaled GEMM multiplies.

    scale: as `quantize_tensor`, `quantize_rows` or `quantize_blocks` returns it. exact: scales are
    powers of two, so bf16 holds the values too: they are computed in `dtype`, fp32 or bf16.
    """
    inverse, value = scale.reciprocal(), decode(data, dtype if exact else torch.float32)
    if scale.dim() < 2 or scale.shape == (data.size(0), 1):
        return (value * inverse.to(value.dtype)).to(dtype)
    height = 1 if scale.size(0) == data.size(0) else BLOCK
    return times(value, inverse.to(value.dtype), height, BLOCK).to(dtype)


def dequantize_mxfp8(data: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`data * 2^(e - 127)`, rounded once, to `dtype`; NaN for a block with e = 0xFF.

    bf16 holds all such values from 2^-126 up.
    """
    within = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    exponent = scale.int()
    factor = torch.where(exponent == 255, torch.nan, exp2(exponent - 127)).to(within)
    return times(decode(data, within), factor, 1, MX_BLOCK).to(dtype)


def delayed_update(
    history: Tensor, scale: Tensor, fp8_max: float, margin: float = 0.0,
    algorithm: str | Callable[[Tensor], Tensor] = "max",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Delayed scaling's step, on new tensors: returns (history, scale).

    history: fp32 `[length, ...]`, the latest amax in slot 0; scale: fp32 `[...]`. The amax is the
    history's largest ("max"), its slot 0 ("most_recent"), or `algorithm(history)`. The new scale is
    `(fp8_max / amax) / 2^margin`, the largest fp32 if that is infinite, and the old one where amax
    is 0, infinite or NaN. The history is rolled by -1 and its slot 0 is cleared.
    """
    if callable(algorithm):
        amax = algorithm(history)
        if not isinstance(amax, Tensor) or amax.shape != scale.shape:
            got = tuple(amax.shape) if isinstance(amax, Tensor) else shown(amax)
            expected = f"expected a tensor {tuple(scale.shape)}"
            raise OpsgraphError(f"DelayedScaling: amax_compute_algo returned {got}, {expected}")
    else:
        amax = history.amax(0) if algorithm == "max" else history[0]
    new = quotient(fp8_max, amax)
    new = (new * 2.0**-margin if margin else new).clamp_max(FP32_MAX)
    rolled = history.roll(-1, 0)
    rolled[0].zero_()
    return rolled, torch.where((amax > 0) & (amax < torch.inf), new, scale)


def new_scales(states: int, device: torch.device) -> Tensor:
    """Memory for scales of states, fp32 `[states, 3]`: 16 bytes apart, as kernels want operands."""
    return torch.empty_strided((states, 3), (12, 4), dtype=torch.float32, device=device)


def e8m0_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The int32 exponent byte of `amax / fp8_max` rounded up to a power of two.

    Both largest values are 1.75 times a power of two, so that the quotient's exponent is the
    difference of theirs, and one more where amax has a mantissa above 1.75: nothing is rounded.
    """
    bits = amax.view(torch.int32) & 0x7FFFFFFF  # the sign of a NaN is anyone's
    exponent = (bits >> 23) - (8 if dtype == E4M3 else 15)
    exponent = (exponent + ((bits & 0x7FFFFF) > 0x600000)).clamp_min(0)
    return torch.where(bits < _INFINITY, exponent, torch.where(bits > _INFINITY, 255, 254))


def exp2(exponent: Tensor) -> Tensor:
    """`2^exponent` in fp32, exactly, for int32 exponents from -127 (which is subnormal) to 127."""
    bits = (exponent + 127) << 23
    return torch.where(exponent == -127, 1 << 22, bits).int().view(torch.float32)


def block_amax(value: Tensor, height: int, width: int) -> Tensor:
    """The amax of each block of a contiguous fp32 `[rows, cols]`, fp32 in a grid of blocks."""
    rows, cols = value.shape
    down, across = -(-rows // height), -(-cols // width)
    padding = (0, across * width - cols, 0, down * height - rows)
    value = value.abs()
    if any(padding) and value.numel():  # PyTorch 2.9 pads no rows to no rows with an error
        value = torch.nn.functional.pad(value, padding)
    if height > 1:
        value = value.view(down, height, across * width).amax(1)
    return value.view(down, across, width).amax(2)


def spread(grid: Tensor, shape: torch.Size, height: int, width: int) -> Tensor:
    """Repeats each entry of a grid over its block and cuts the result to `shape`."""
    if height > 1:
        grid = grid.repeat_interleave(height, 0)
    return grid.repeat_interleave(width, 1)[: shape[0], : shape[1]]


def times(value: Tensor, grid: Tensor, height: int, width: int) -> Tensor:
    """`[rows, cols]` times the entry in the grid of its block, `height` rows by `width` columns."""
    if value.size(0) % height or value.size(1) % width:
        return value * spread(grid, value.shape, height, width)
    blocks: Tensor = value.unflatten(1, (-1, width))
    if height == 1:
        return (blocks * grid[:, :, None]).flatten(1)
    squares: Tensor = blocks.unflatten(0, (-1, height))
    return (squares * grid[:, None, :, None]).flatten(2).flatten(0, 1)
