"""FP8 products of scales for 1 x 128 by scales for 128 x 128, by the library or by Triton.

Both sum in fp32, in different orders. Which is faster is measured once for each class of operands
and remembered, as algorithms are in `product`; the library's is the usual one.
"""

import threading
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from ...base.backend import backends
from ...guards.watching import watching
from .. import choices
from ..lazy import Lazy
from . import library as lt
from .product import SMALL, choices_of, product

block_product = Lazy("triton.block_product")

MODES = (lt.BLOCK, lt.SQUARE)
LIBRARY, TRITON = "cublaslt", "triton"

_chosen: dict[Any, str] = {}
"""Who multiplies, by class."""
_lock = threading.RLock()


def multiply(
    out: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None
) -> None:
    """`out = a @ b.T (+ bias)`. Operands are as `product` takes them, but b by rows.

    Raises CublasError.
    """
    device = out.device.index
    if torch._C._cuda_getDevice() != device:
        with torch.cuda.device(device):
            return multiply(out, a, b, a_scale, b_scale, bias)
    operands = out, a, b, a_scale, b_scale, bias
    if a.size(0) * b.numel() <= SMALL or out.element_size() != 2:
        return _by_library(*operands)
    together = out.data_ptr() | a.data_ptr() | b.data_ptr() | a_scale.data_ptr()
    aligned = together % 16 == 0
    key = device, a.dtype, a.shape, b.dtype, b.shape, out.dtype, bias is None, aligned
    by = _chosen.get(key)
    if by is None:
        runs = {name: partial(run, *operands) for name, run in _RUNS.items()}
        with _lock:
            by = _chosen.get(key) or _choose(key, runs, _why_not(out, a, b, a_scale))
    return _RUNS[by](*operands)


def _by_library(
    out: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None
) -> None:
    product(out, a, b.t(), (a_scale, b_scale), MODES, bias)


def _by_triton(*operands: Any) -> None:
    block_product.block_product(*operands)


_RUNS = {LIBRARY: _by_library, TRITON: _by_triton}
"""The usual one first."""


def _why_not(out: Tensor, *operands: Tensor) -> str | None:
    """Why Triton does not multiply these, or None."""
    reason = backends()["triton"].why_not_on(out.device)
    return reason or block_product.why_not(out, *operands)


def _choose(key: Any, runs: Mapping[str, choices.Run], why_not: str | None) -> str:
    """Who multiplies operands of a class: remembered, or measured now.

    It is known from now on, unless it could not be measured now and may be later.
    """
    if why_not is not None:
        return _chosen.setdefault(key, LIBRARY)
    kept, text = _choices(key[0]), repr(key[1:])
    try:
        by = kept.choose(text, lambda: runs)
    except torch.OutOfMemoryError:  # measuring takes memory of its own
        by = LIBRARY
    if choices.measurable() or kept.known(text) is not None:
        _chosen[key] = by
    elif watching.recorder is not None:
        watching.recorder.refuse("what runs fastest is not known yet")
    return by


@cache
def _choices(device: int) -> choices.Choices:
    import triton

    return choices_of("blocks", device, lambda: _chosen.clear(), f"triton {triton.__version__}")
