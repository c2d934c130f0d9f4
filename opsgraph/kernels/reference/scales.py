"""A scale for each column, as PyTorch's own operations compute it, and its gradients."""

from collections.abc import Collection
from functools import cache

import torch
from torch import Tensor

from . import wide


@cache
def dtype_of(x: torch.dtype, weight: torch.dtype) -> torch.dtype:
    """That of a product or a sum."""
    return torch.promote_types(x, weight)


def beyond(dtype: torch.dtype, *factors: float | None) -> str | None:
    """Why PyTorch takes one of the factors for no alpha or beta of that dtype, or None."""
    large = [f for f in factors if f is not None and abs(f) > torch.finfo(dtype).max]
    return f"the factor {large[0]} is beyond {dtype}" if large else None


def scale_forward(x: Tensor, weight: Tensor, other: Tensor | None = None) -> Tensor:
    """`y = x * weight (+ other)`, `[rows, width]`: each rounded to what PyTorch promotes to."""
    y = x * weight
    return y if other is None else y + other


def scale_backward(
    dy: Tensor, x: Tensor, weight: Tensor, want: Collection[str] = ("x", "weight")
) -> tuple[Tensor | None, Tensor | None]:
    """`dx = dy * weight` and `dweight = sum(dy * x)`, in fp32, then in x's and weight's dtype.

    None for what is not in want ("x", "weight").
    """
    g = wide(dy)
    dx = (g * wide(weight)).to(x.dtype) if "x" in want else None
    return dx, (g * wide(x)).sum(0).to(weight.dtype) if "weight" in want else None
