"""Steps for which the compiler takes more instructions than the chip needs.

Kernels that quantize read and write so little for what they compute that instructions, not memory,
set their time, the more so where matrix products before them have lowered the chip's clock. What
is NVIDIA's assembler here is plain Triton for other chips and for the interpreter.
"""

import torch
import triton
import triton.language as tl

from . import interpreting

PTX = tl.constexpr(torch.version.hip is None and not interpreting())
"""Whether kernels are compiled for NVIDIA's chips."""


@triton.jit
def power_of_two(x):
    """2^x, within 2 units in the last place; 0 where it is below 2^-126."""
    if PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        return tl.exp2(x)


@triton.jit
def reciprocal(x):
    """1 / x, within a unit in the last place; 0 where it is below 2^-126."""
    if PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1
        )
    else:
        return 1.0 / x


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) to the digits of 16-bit results, down to 2^-128, where exp(-x) is infinite.

    `tl.sigmoid` scales what its exponential and its division could not represent otherwise, in 11
    more instructions; here 1 is added to the one, and the other is that of 2^-24 times the divisor.
    `exponentials` has the one with all digits of fp32: here x * log2(e) is rounded.
    """
    if PTX:
        divisor = tl.fma(
            power_of_two(x * -1.4426950408889634), 5.9604644775390625e-8, 5.9604644775390625e-8
        )
        return reciprocal(divisor) * 5.9604644775390625e-8
    else:
        return tl.sigmoid(x)


@triton.jit
def widened(x):
    """fp32 of fp16, bf16 or fp32; two bf16 at a time are a shift and a mask."""
    if PTX and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], tl.float32, True, 2
        )
    else:
        return x.to(tl.float32)


@triton.jit
def rounded(value, dtype: tl.constexpr):
    """fp32 rounded to another dtype, if there is one, as fp32.

    The compiler converts one bf16 at a time, slowly.
    """
    if dtype is None:
        return value
    elif PTX and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "{.reg .b32 pair; cvt.rn.bf16x2.f32 pair, $3, $2; shl.b32 $0, pair, 16; "
            "and.b32 $1, pair, 0xffff0000;}",
            "=r,=r,f,f", [value], tl.float32, True, 2,
        )  # fmt: skip
    else:
        return value.to(dtype).to(tl.float32)
