"""Matrix products of tensors, by `product` where the library takes them, else by PyTorch."""

import warnings
from functools import cache

import torch
from torch import Tensor

from ...base.backend import backends
from . import library as lt
from .product import product, stored

DTYPES = (torch.bfloat16, torch.float16)
EPILOGUES = {"relu": lt.RELU, "gelu": lt.GELU}
"""Activations that the library has, GELU by tanh."""


def there(x: Tensor) -> bool:
    """Whether x is where the library multiplies."""
    return x.is_cuda and backends()["cublaslt"].why_not() is None


def takes_bias(bias: Tensor, dtype: torch.dtype) -> bool:
    """Whether a product of a dtype adds such a bias: one of that dtype, packed and aligned."""
    return bias.dtype == dtype and bias.is_contiguous() and not bias.data_ptr() % 16


def _takes(
    dtype: torch.dtype, a: Tensor, b: Tensor, bias: Tensor | None, other: Tensor | None
) -> bool:  # fmt: skip
    """Whether `product` computes it: matrices of 16 bits a value, not empty, a packed bias."""
    if a.dtype not in DTYPES or b.dtype != a.dtype or not there(a):
        return False
    if not (a.dim() == b.dim() == 2 and a.numel() and b.numel() and stored(a) and stored(b)):
        return False
    if dtype not in (a.dtype, torch.float32):
        return False
    if bias is not None and not takes_bias(bias, a.dtype):
        return False
    return other is None or (
        other.dtype == dtype and other.shape == (a.size(0), b.size(1)) and _by_rows(other)
    )


def _by_rows(x: Tensor) -> bool:
    found = stored(x) if x.dim() == 2 else None
    return found is not None and not found[0]


@cache
def warn(reason: str) -> None:
    """Say once that PyTorch multiplies in the library's place."""
    warnings.warn(f"opsgraph: PyTorch multiplies where it can: {reason}", stacklevel=3)


def matmul(
    a: Tensor, b: Tensor, bias: Tensor | None = None, other: Tensor | None = None,
    alpha: float = 1.0, activation: str | None = None,
) -> Tensor:  # fmt: skip
    """`alpha * a @ b (+ other) (+ bias)`, `[m, n]`, and perhaps an activation of `EPILOGUES`."""
    if _takes(a.dtype, a, b, bias, other):
        out = torch.empty(a.size(0), b.size(1), dtype=a.dtype, device=a.device)
        epilogue = lt.PLAIN if activation is None else EPILOGUES[activation]
        try:
            return product(out, a, b, bias=bias, c=other, alpha=alpha, epilogue=epilogue)
        except lt.CublasError as error:
            warn(str(error))
    if activation is not None:
        added = other if bias is None else bias if other is None else other + bias
        added = a.new_zeros(b.size(1)) if added is None else added
        return torch._addmm_activation(added, a, b, alpha=alpha, use_gelu=activation == "gelu")
    if other is not None:
        made = torch.addmm(other, a, b, alpha=alpha)
        return made if bias is None else made.add_(bias)
    if bias is not None:
        return torch.addmm(bias, a, b, alpha=alpha)
    return a @ b if alpha == 1.0 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=alpha)


def multiply_into(out: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """Write `a @ b` to out, `[m, n]`, or add it to that, without rounding to a's dtype first."""
    if _by_rows(out) and _takes(out.dtype, a, b, None, None):
        try:
            product(out, a, b, c=out if add else None)
            return
        except lt.CublasError as error:
            warn(str(error))
    if out.dtype == a.dtype and add:
        torch.addmm(out, a, b, out=out)
        return
    if out.dtype == a.dtype:
        made = a @ b
    elif a.is_cuda and out.dtype == torch.float32:
        made = torch.mm(a, b, out_dtype=out.dtype)
    else:
        made = a.to(out.dtype) @ b.to(out.dtype)
    (out.add_ if add else out.copy_)(made)
