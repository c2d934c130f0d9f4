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
def sigmoid(x):
    """1 / (1 + exp(-x)), which is 0 where it is below 2^-126.

    `tl.sigmoid` scales what its exponential and its division could not represent otherwise, in 11
    more instructions; here neither matters, for 1 is added and the divisor is 1 or more.
    """
    if PTX:
        power = tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], tl.float32, True, 1
        )
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [power + 1.0], tl.float32, True, 1
        )
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
