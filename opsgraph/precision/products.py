"""A linear layer's three products of quantized operands, emulated exactly.

fp32 sums of products of what the copies stand for, rounded once: what a scaled GEMM computes, up to
the order of its sums. Where both operands are bf16 numbers but for a factor (`Quantizer.factor`),
bf16 units multiply, and the factors go into the sums: on CUDA always, on a CPU that has such units
where the result is bf16, for its library does not hand out the sums. Otherwise fp32 units multiply
the dequantized copies. Where the result is fp64, all of it is.

With a `backward_override` the gradient is a plain tensor, and the backward multiplies the copies
that the forward read.
"""

from math import prod
from typing import Any

import torch
from torch import Tensor

from ..guards.torch_private import multiplies_bf16
from ..kernels.cpu.launch import direct
from ..kernels.lazy import Lazy
from .quantizers import Copy, Operand, Quantized

gemm, memory = Lazy("cpu.gemm"), Lazy("cpu.memory")

BF16 = torch.bfloat16
SMALL = 2**12
"""Multiplications up to which a CPU's bf16 products pass by the library that sums in fp32."""
LEAST, MOST = 2.0**-126, 2.0**127
"""Factors that fp32 holds in full."""


def product(a: Tensor | Copy, b: Tensor | Copy, dtype: torch.dtype, flip: bool = False) -> Tensor:
    """`a @ b.T`, or with flip `a @ b`, in dtype. a: `[rows, depth]`; b: `[cols, depth]`."""
    if dtype != torch.float64:
        units = _units(a if isinstance(a, Tensor) else a.data, dtype)
        if _factor(a) in units and _factor(b) in (units - {"rows"} if flip else units):
            y = _in_bf16(_operand(a), _operand(b), dtype, flip)
            if y is not None:
                return y
    left, right = _values(a, dtype), _values(b, dtype)
    return (left @ (right if flip else right.t())).to(dtype)


def forward(x: Quantized, weight: Quantized) -> Tensor:
    """`x @ weight.T`"""
    return product(_copy(x.row), _copy(weight.row), x.dtype)


def dgrad(dy: Any, weight: Quantized) -> Tensor:
    """`dy @ weight`"""
    if isinstance(dy, Quantized):
        return product(_copy(dy.row), _copy(weight.col), dy.dtype)
    return product(dy, _copy(weight.row), dy.dtype, flip=True)


def wgrad(dy: Any, x: Quantized, sums: bool = False) -> Tensor:
    """`dy.T @ x`; with sums before it is rounded to dy's dtype: fp32, or fp64 of fp64."""
    dtype = _wide(dy.dtype) if sums else dy.dtype
    if isinstance(dy, Quantized):
        return product(_copy(dy.col), _copy(x.col), dtype)
    return product(dy.t(), _copy(x.row), dtype, flip=True)


def _copy(copy: Copy | None) -> Copy:
    assert copy is not None
    return copy


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _values(operand: Tensor | Copy, like: torch.dtype) -> Tensor:
    """What an operand stands for, in the dtype of the arithmetic."""
    wide = _wide(like)
    return operand.to(wide) if isinstance(operand, Tensor) else operand.dequantize(wide)


def _factor(operand: Tensor | Copy) -> str | None:
    """`Quantizer.factor`; a plain tensor in bf16 is such numbers."""
    if isinstance(operand, Tensor):
        return "none" if operand.dtype == BF16 else None
    return operand.quantizer.factor


def _operand(operand: Tensor | Copy) -> Operand:
    if isinstance(operand, Tensor):
        return Operand(operand)
    return operand.quantizer.operand(operand)


def _units(data: Tensor, dtype: torch.dtype) -> set[str]:
    """Operands with which factors bf16 units multiply here."""
    if data.is_cuda:
        return {"none", "tensor", "rows"}
    if dtype == BF16 and data.device.type == "cpu" and direct(data) and multiplies_bf16():
        return {"none", "tensor"}
    return set()


def _in_bf16(a: Operand, b: Operand, dtype: torch.dtype, flip: bool) -> Tensor | None:
    """The product by bf16 units; None where they cannot give it in full."""
    first, second = a.values, b.values if flip else b.values.t()
    if first.is_cuda:
        return _on_cuda(first, second, a.factor, b.factor, dtype)
    if first.size(0) * first.size(1) * second.size(1) <= SMALL:
        return None
    factors = [factor.item() for factor in (a.factor, b.factor) if factor is not None]
    return _on_cpu(first, second, prod(factors)) if factors else _plain_product(first, second)


def _on_cuda(
    a: Tensor, b: Tensor, left: Tensor | None, right: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """`a @ b` times the factors of its rows and columns, the last one as the sums are rounded."""
    sums = torch.mm(a, b, out_dtype=torch.float32)
    if right is not None and right.dim():
        right = right.t()
    if left is not None and right is not None:
        if left.dim() and right.dim():
            sums.mul_(left)
        else:
            right = left * right
    last = left if right is None else right
    if last is None:
        return sums.to(dtype)
    return torch.mul(sums, last, out=torch.empty_like(sums, dtype=dtype))


def _on_cpu(a: Tensor, b: Tensor, factor: float) -> Tensor | None:
    """`factor * (a @ b)`; the library multiplies before it rounds."""
    if not LEAST <= factor <= MOST:
        return None
    y: Tensor = memory.empty((a.size(0), b.size(1)), BF16)
    return torch.addmm(y, a, b, beta=0, alpha=factor, out=y)


def _plain_product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b`, by the call that is fastest for the layouts of both."""
    if not b.is_contiguous():
        y: Tensor = gemm.linear(a, b.t())
    else:
        y = gemm.dgrad(a, b) if a.is_contiguous() else gemm.wgrad(a.t(), b)
    return y
