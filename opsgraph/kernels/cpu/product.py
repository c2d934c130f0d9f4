"""Matrix products of bf16 in C++, by the units that a CPU has for them.

The library that PyTorch calls leaves speed behind (docs/design/cpu.md): with AMX, and where a CPU
multiplies pairs of bf16 slower than floats. Here the operands are packed into the caches as the
unit wants them, a bias and a residual are added to the sums before they are rounded, and the result
may be stored by rows or by columns. Which of these and of the library's layouts wins is measured,
see `gemm`.
"""

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...base.errors import OpError
from . import memory
from .launch import Kernel, address, floats, library

UNITS = {
    "floats": "fp32 multiply-adds",
    "pairs": "AVX-512's dot products of pairs",
    "tiles": "AMX",
}
"""What multiplies, in the order of `source/product.cpp`, with what it is."""
TRANSPOSES = "tiles"
"""The unit that takes a left factor stored by columns: it transposes that as it packs it."""
_CODES = {unit: code for code, unit in enumerate(UNITS)}

_kernel = Kernel("opsgraph_product", "5q P 2q P 2q P q P 2q P 2q P", "product")


@cache
def units() -> tuple[str, ...]:
    """The units that are worth a measurement on this machine."""
    found = tuple(unit for unit in UNITS if room(unit, 1))
    return ("tiles",) if "tiles" in found else found  # nothing comes near them


@cache
def _rooms() -> Any:
    function = library("product").opsgraph_product_room
    function.argtypes, function.restype = [ctypes.c_int64] * 2, ctypes.c_int64
    return function


def room(unit: str, depth: int) -> int:
    """Bytes that a thread needs to sum over `depth`; 0 where the CPU has no such unit."""
    return _rooms()(_CODES[unit], depth)  # type: ignore[no-any-return]


def multiply(
    unit: str, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None,
    other: Tensor | None = None,
) -> None:  # fmt: skip
    """`out = a @ b + bias + other`, summed up in fp32 in the order of k and rounded once.

    a: `[m, k]`, stored by rows, or by columns for tiles; b: `[k, n]`, out: `[m, n]`, each stored by
    rows or by columns; all bf16 with a stride of 1 in one dimension; any size may be 0. bias: `[n]`
    or `[m, 1]`; other: `[m, n]`, bf16. Results do not depend on the number of threads; pairs and
    tiles take denormal numbers for zero.
    """
    (m, k), n, threads = a.shape, b.shape[1], torch.get_num_threads()
    of_rows = bias is not None and bias.dim() == 2
    bias = floats(bias, m if of_rows else n)
    if b.shape[0] != k or out.shape != (m, n) or (other is not None and other.shape != (m, n)):
        shapes = [tuple(t.shape) for t in (a, b, out, other) if t is not None]
        raise OpError("product", f"shapes {shapes}", "[m, k] by [k, n] into [m, n]")
    if unit != TRANSPOSES and _by_columns(a):
        raise OpError("product", f"a stored by columns for {unit}", "a by rows")
    if not k:  # the kernel begins with the first part of k
        added = 0.0 if bias is None else bias
        out.copy_(
            out.new_zeros((), dtype=torch.float32) + added + (0.0 if other is None else other)
        )
        return
    needed = memory.empty((room(unit, k) * threads,), torch.uint8)
    _kernel(
        threads, _CODES[unit], m, n, k, a.data_ptr(), _line(a), _by_columns(a),
        b.data_ptr(), _line(b), _by_columns(b), address(bias), of_rows, address(other),
        *((0, 0) if other is None else other.stride()), out.data_ptr(), _line(out),
        _by_columns(out), needed.data_ptr(),
    )  # fmt: skip


def _by_columns(x: Tensor) -> bool:
    """Whether the elements of a row are not adjacent: then those of a column are."""
    return x.shape[1] > 1 and x.stride(1) != 1


def _line(x: Tensor) -> int:
    """Elements from one row to the next, or from one column to the next."""
    return x.stride(1 if _by_columns(x) else 0)
