"""A linear layer's three products of quantized operands, emulated exactly.

Each operand is dequantized and the product computed in fp32, then rounded once: what a scaled GEMM
does up to the order of its sums. With a `backward_override` the gradient is a plain tensor, and the
backward multiplies the copies that the forward read.
"""

from typing import Any

import torch
from torch import Tensor

from ..quantizers import Copy, Quantized


def values(operand: Tensor | Copy | None, like: torch.dtype) -> Tensor:
    """What an operand stands for, in the dtype of the arithmetic: fp64 for fp64, else fp32."""
    assert operand is not None
    wide = torch.float64 if like == torch.float64 else torch.float32
    return operand.to(wide) if isinstance(operand, Tensor) else operand.dequantize(wide)


def forward(x: Quantized, weight: Quantized) -> Tensor:
    """`x @ weight.T`"""
    return (values(x.row, x.dtype) @ values(weight.row, x.dtype).t()).to(x.dtype)


def dgrad(dy: Any, weight: Quantized) -> Tensor:
    """`dy @ weight`"""
    if isinstance(dy, Quantized):
        return (values(dy.row, dy.dtype) @ values(weight.col, dy.dtype).t()).to(dy.dtype)
    return (values(dy, dy.dtype) @ values(weight.row, dy.dtype)).to(dy.dtype)


def wgrad_operands(dy: Any, x: Quantized) -> tuple[Tensor, Tensor]:
    """`[out, rows]` and `[rows, in]`, of which `wgrad` is the product."""
    if isinstance(dy, Quantized):
        left, right = values(dy.col, dy.dtype), values(x.col, dy.dtype).t()
    else:
        left, right = values(dy.t(), dy.dtype), values(x.row, dy.dtype)
    return left, right


def wgrad(dy: Any, x: Quantized) -> Tensor:
    """`dy.T @ x`"""
    left, right = wgrad_operands(dy, x)
    return (left @ right).to(dy.dtype)
