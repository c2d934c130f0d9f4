"""FP8 copies of a tensor, and of an activation, in C++; formulas, shapes and bits are
`kernels.reference.quantize`'s.

The row copy, `[rows, width]`, has scales along rows; the column copy, `[width, rows]`, is the row
copy of the transpose. x is read once for both. It is read before that for an amax that is not a
block's: the tensor's where no scale is given, each row's and each column's.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..formats import E5M2, Copies, Copy, Format, check
from ..reference import quantize as reference
from . import activations
from .launch import DTYPES, Kernel, address, direct, floats, lines, rows_of
from .memory import empty

_FIELDS = "7q P q P 2P 2P 2P d"  # struct Quantize in source/quantize.h
_kernel = Kernel("opsgraph_quantize", _FIELDS, "quantize")
_BOTH = f"{activations.FIELDS} {_FIELDS}"
_activation_kernel = Kernel("opsgraph_activation_quantize", _BOTH, "quantize")
SCALINGS = {"tensor": 0, "rows": 1, "blocks": 2, "square": 3, "mx": 4}
"""The scalings, with their codes in source/quantize.h."""
FP32 = torch.float32


def quantize(
    x: Tensor, to: Format, scale: Tensor | None = None, want: Collection[str] = ("row",)
) -> Copies:
    """The copies of x, fp32 or bf16 `[rows, width]`, that are in want: "row", "col", "amax".

    scale, fp32 `[]`, is for scaling "tensor": without it the scale is x's own (current scaling).
    Only that scaling gives the amax. Raises ValueError for what is not defined.
    """
    if x.dtype not in DTYPES:
        raise ValueError(f"got dtype {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    check(to, scale, want)
    if not direct(x, scale) or not x.numel():
        return _by_formula(x, to, scale, want)
    made = _new_copies(x.shape, to, scale, want)
    read, stride = lines(x)
    _kernel(*_record(read.data_ptr(), stride, x.dtype, x.shape, to, scale, made))
    return made


def activation_quantize(
    x: Tensor, kind: str, to: Format, params: tuple[float, ...] = (), bias: Tensor | None = None,
    pre: bool = False, scale: Tensor | None = None, want: Collection[str] = ("row",),
) -> tuple[Copies, Tensor | None]:  # fmt: skip
    """`quantize` of `activation_forward(x, ...)`; returns (copies, x + bias as that does).

    One pass: the activation is rounded to x's dtype, but a tile of it never leaves the cache. Two
    passes where a scale depends on a whole row or on the tensor: see `ahead`.
    """
    check(to, scale, want)
    if ahead(to, scale) or not direct(x, bias, scale) or not x.numel():
        y, sums = activations.activation_forward(x, kind, params, None, bias, pre)
        return quantize(y, to, scale, want), sums
    row = activations.row(kind, params)
    rows, width, dtype = x.size(0), row.width(x.size(1)), x.dtype
    shape = torch.Size((rows, width))
    made = _new_copies(shape, to, scale, want)
    sums = empty(x.shape, dtype) if pre and bias is not None else None
    x, stride = rows_of(x, x.shape, dtype)
    bias = floats(bias, x.size(1))
    _activation_kernel(
        *row.head(dtype, rows, width, width, width), x.data_ptr(), 0, address(bias), stride, 0, 0,
        0, address(sums), 0, 0, *row.params,
        *_record(0, 0, dtype, shape, to, scale, made),
    )  # fmt: skip
    return made, sums


def ahead(to: Format, scale: Tensor | None) -> bool:
    """Whether scales must be known before anything can be quantized."""
    return to.scaling == "rows" or (to.scaling == "tensor" and scale is None)


def _new_copies(
    shape: torch.Size, to: Format, scale: Tensor | None, want: Collection[str]
) -> Copies:
    """Copies to be written, of a tensor of that shape."""
    rows, width = shape
    row = _new_copy(rows, width, to, scale) if "row" in want else None
    col = _new_copy(width, rows, to, scale) if "col" in want else None
    amax, inverse = _number() if "amax" in want else None, None
    if to.scaling == "tensor" and (row is not None or col is not None):
        inverse, own = _number(), _number() if scale is None else scale
        row, col = (None if copy is None else (copy[0], own) for copy in (row, col))
    return Copies(row, col, amax, inverse)


def _record(
    place: int, stride: int, dtype: torch.dtype, shape: torch.Size, to: Format,
    scale: Tensor | None, made: Copies,
) -> tuple[Any, ...]:  # fmt: skip
    """The kernel's record, for a tensor at that address, or for one that is yet to be made."""
    row, col, amax, inverse = made
    own = row or col if to.scaling == "tensor" else row  # a tensor's copies have one scale
    return (
        DTYPES[dtype], to.dtype is E5M2, SCALINGS[to.scaling], to.power_of_two,
        torch.get_num_threads(), *shape, place, stride, address(scale), address(row and row[0]),
        address(col and col[0]), address(own and own[1]), address(col and col[1]),
        address(amax), address(inverse), to.eps,
    )  # fmt: skip


def _number() -> Tensor:
    return empty((), FP32)


def _new_copy(rows: int, width: int, to: Format, scale: Tensor | None) -> Copy:
    """A row copy to be written; the scale of a tensor is made by the caller."""
    data = empty((rows, width), to.dtype)
    if to.scaling == "tensor":
        return data, data if scale is None else scale
    if to.scaling == "rows":
        return data, empty((rows, 1), FP32)
    block = reference.MX_BLOCK if to.scaling == "mx" else reference.BLOCK
    down = -(-rows // block) if to.scaling == "square" else rows
    dtype = torch.uint8 if to.scaling == "mx" else FP32
    return data, empty((down, -(-width // block)), dtype)


def _by_formula(x: Tensor, to: Format, scale: Tensor | None, want: Collection[str]) -> Copies:
    amax = reference.amax_of(x) if "amax" in want else None
    row = _copy_by_formula(x, to, scale) if "row" in want else None
    col = _copy_by_formula(x.t(), to, scale) if "col" in want else None
    made = row or col
    inverse = made[1].reciprocal() if made is not None and to.scaling == "tensor" else None
    return Copies(row, col, amax, inverse)


def _copy_by_formula(x: Tensor, to: Format, scale: Tensor | None) -> Copy:
    scaling, dtype, eps, power = to
    if scale is not None:
        return reference.cast(x, scale, dtype), scale
    if scaling == "tensor":
        return reference.quantize_tensor(x, dtype, eps, power)
    if scaling == "rows":
        return reference.quantize_rows(x, dtype, eps, power)
    if scaling == "mx":
        return reference.quantize_mxfp8(x, dtype)
    return reference.quantize_blocks(x, dtype, 1 if scaling == "blocks" else 128, eps, power)
