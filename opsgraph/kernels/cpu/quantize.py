"""FP8 copies of a tensor in C++; formulas, shapes and bits are `kernels.reference.quantize`'s.

The row copy, `[rows, width]`, has scales along rows; the column copy, `[width, rows]`, is the row
copy of the transpose. x is read once for both, and once more before that for an amax that is not
one of a block: the tensor's where no scale is given, each row's and each column's.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from ..formats import E5M2, Copies, Copy, Format, check
from ..reference import quantize as reference
from .launch import DTYPES, Kernel, address, direct, rows_of
from .memory import empty

_FIELDS = "=7q 2q q 2q 2q 2q d"  # struct Quantize in source/quantize.h
_kernel = Kernel("opsgraph_quantize", _FIELDS, "quantize")
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
    rows, width = x.shape
    row = _new_copy(rows, width, to, scale) if "row" in want else None
    col = _new_copy(width, rows, to, scale) if "col" in want else None
    amax, given, inverse = _number() if "amax" in want else None, 0, None
    written = None if row is None else row[1]
    if to.scaling == "tensor":
        given = address(scale)
        if row is not None or col is not None:
            inverse, own = _number(), _number() if scale is None else scale
            row, col = (None if copy is None else (copy[0], own) for copy in (row, col))
            written = own
        elif scale is None:
            written = _number()  # an amax alone: the kernel makes a scale of it all the same
    x, stride = rows_of(x, x.shape, x.dtype)
    _kernel(
        DTYPES[x.dtype], to.dtype is E5M2, SCALINGS[to.scaling], to.power_of_two,
        torch.get_num_threads(), rows, width, x.data_ptr(), stride, given,
        address(row and row[0]), address(col and col[0]), address(written),
        address(col and col[1]), address(amax), address(inverse), to.eps,
    )  # fmt: skip
    return Copies(row, col, amax, inverse)


def _number() -> Tensor:
    return torch.empty((), dtype=FP32, device="cpu")


def _new_copy(rows: int, width: int, to: Format, scale: Tensor | None) -> Copy:
    """A row copy to be written; the scale of a tensor is made by the caller."""
    data = empty((rows, width), to.dtype)
    if to.scaling == "tensor":
        return data, data if scale is None else scale
    if to.scaling == "rows":
        return data, torch.empty((rows, 1), dtype=FP32, device="cpu")
    block = reference.MX_BLOCK if to.scaling == "mx" else reference.BLOCK
    down = -(-rows // block) if to.scaling == "square" else rows
    dtype = torch.uint8 if to.scaling == "mx" else FP32
    return data, torch.empty((down, -(-width // block)), dtype=dtype, device="cpu")


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
