"""Matrix products in the way that runs fastest on this machine.

The library's speed depends on how each operand is stored, on whether it is asked for a product or
for its transpose, and on which of its entry points is called; for bf16 there are our own kernels
beside it (`product`). Which combination wins differs between machines, dtypes and shapes, by a
factor of two and more. So each class of product is measured at its first use (`choices`): the kind
of product, the sizes (rows rounded up to a power of two), the dtype and the number of threads.
Where a combination wants an operand stored by columns, the time of its transposed copy counts; one
of a large gradient is made and multiplied in pieces. Small products, and most of those of few rows,
are as PyTorch has them and are not measured.

Results are stored by rows, in kept memory where the entry point allows it.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..choices import Choices
from . import memory, product
from .choices import fastest, machine
from .launch import direct
from .transpose import transposed

FORWARD, DGRAD, WGRAD = "forward", "dgrad", "wgrad"

SMALL = 2**26
"""Multiplications up to which a product is as PyTorch has it."""
TINY = 2**18
"""As many of bf16 where the library has no product of bf16, which needs AVX-512: PyTorch's own is
slow there."""
FEW = 32
"""Rows up to which a product's time is that of reading the weight, or of writing its gradient. No
layout changes that, and a weight that is still in the cache while one measures would mislead. Only
our units, which go through it once as it lies, are measured against PyTorch's product of bf16."""
LARGE = 2**20
"""Elements that such a weight has at the least."""
MOST_ROWS = 4096
"""Products of more rows are of the class of this many."""
PIECE = 2**21
"""Bytes of a gradient up to which its transposed copy is made as a whole."""
LEAST_COLUMNS = 512
"""Columns of a gradient in a piece, at the least: narrower products are slow."""


class Layout(NamedTuple):
    """How to compute a product of two operands.

    entry: "mm", "flipped" (mm of the transposes, into the transpose of the result), "onednn"
    (linear, with the bias in its accumulator), or a unit of `product`, flipped or not. first,
    second: whether that operand is to be stored by columns; operands come stored by rows.
    """

    entry: str = "mm"
    first: bool = False
    second: bool = False

    @property
    def unit(self) -> str:
        """The entry, flipped or not: perhaps a unit of `product`."""
        return self.entry.partition(" ")[0]

    @property
    def name(self) -> str:
        """What the file of choices calls it."""
        return self.entry + " first" * self.first + " second" * self.second


LAYOUTS = {
    layout.name: layout
    for first, second in ((False, False), (True, False), (False, True), (True, True))
    for layout in (
        *(Layout(entry, first, second) for entry in ("mm", "flipped", "onednn")),
        *(Layout(unit, first) for unit in product.UNITS if not second),
        *(Layout(f"{unit} flipped", False, second) for unit in product.UNITS if not first),
    )
    if layout.unit != product.TRANSPOSES or not (first or second)
}

choices = Choices("gemm", machine, fastest, forgotten=lambda: _chosen.clear())
_chosen: dict[tuple[object, ...], Layout | None] = {}


_FACTORS: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    FORWARD: lambda x, weight: (x, weight.t()),
    DGRAD: lambda dy, weight: (dy, weight),
    WGRAD: lambda dy, x: (dy.t(), x),
}
"""The product of each kind, from its operands as they are stored by rows."""


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, other: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias + other`, `[rows, out]`, as other is. x: `[rows, in]`; weight:
    `[out, in]`, of which a view that is stored by columns is read as it is; bias: `[out]`."""
    if _by_columns(weight):
        return _multiplied(DGRAD, x, weight.t(), bias, other)
    return _multiplied(FORWARD, x, weight, bias, other)


def dgrad(
    dy: Tensor, weight: Tensor, other: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`dy @ weight + other`, `[rows, in]`, as other is. dy: `[rows, out]`; weight: `[out, in]`.

    out: contiguous, gets the result, which is returned. weight may be a view as in `linear`.
    """
    if _by_columns(weight):
        return _multiplied(FORWARD, dy, weight.t(), None, other, out)
    return _multiplied(DGRAD, dy, weight, None, other, out)


def _by_columns(weight: Tensor) -> bool:
    """Whether a weight is the transposed view of a matrix that is stored by rows."""
    return weight.stride(1) != 1 and weight.shape[1] > 1 and weight.t().is_contiguous()


def _multiplied(
    kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`x @ weight.T` of the kind FORWARD, `x @ weight` of DGRAD, plus what is to be added."""
    width, depth = weight.shape
    layout = _layout(kind, x, width, depth, bias is not None, other is not None, out is not None)
    if layout is not None and direct(x, weight, bias, other):
        return _product(kind, layout, x, weight, bias, other, out)
    if bias is None and other is not None:
        made = torch.addmm(other, x, weight.t() if kind == FORWARD else weight)
    else:  # as it is: quantized tensors have a product here, and no transposed view
        made = F.linear(x, weight if kind == FORWARD else weight.t(), bias)
        made = made if other is None else made + other
    return made if out is None else out.copy_(made)


def wgrad(dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """`dy.T @ x`, `[out, in]`. dy: `[rows, out]`; x: `[rows, in]`.

    Either may be the view of a contiguous transposed copy, see `wgrad_transposes_x`. out: some
    columns of a larger gradient, get the result, which is returned.
    """
    width, depth = dy.shape[1], x.shape[1]
    layout = _layout(WGRAD, dy, width, depth, into=out is not None)
    large = out is not None or width * depth * dy.element_size() >= memory.LEAST
    if (large or layout is not None) and direct(dy, x):
        if layout is not None:
            return _wgrad(layout, dy, x, out)
        if out is None:
            out = memory.empty((width, depth), dy.dtype)
        return torch.mm(dy.mT, x, out=out)
    made = torch.mm(dy.mT, x)
    return made if out is None else out.copy_(made)


def wgrad_transposes_x(like: Tensor, width: int, depth: int, into: bool = False) -> bool:
    """Whether `wgrad` of dy `[rows, width]` and x `[rows, depth]` (into out) wants x by columns.

    like: any tensor of as many rows and that dtype. A caller that makes x then makes the transposed
    copy alone.
    """
    layout = _layout(WGRAD, like, width, depth, into=into)
    return layout is not None and layout.second


def for_wgrad(x: Tensor, width: int) -> Tensor:
    """x `[rows, depth]`, stored as `wgrad` of a dy `[rows, width]` wants it: perhaps a copy."""
    return _stored(x, by_columns=True) if wgrad_transposes_x(x, width, x.shape[1]) else x


def _wgrad(layout: Layout, dy: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """The weight gradient, in pieces of dy's columns where dy is to be copied and large."""
    if not layout.first or dy.nbytes <= PIECE or dy.t().is_contiguous():
        return _product(WGRAD, layout, dy, x, out=out)
    rows, width = dy.shape
    step = max(LEAST_COLUMNS, PIECE // (rows * dy.element_size()) // 64 * 64)
    x = _stored(x, layout.second)
    dweight = memory.empty((width, x.shape[1]), dy.dtype) if out is None else out
    for k in range(0, width, step):
        _product(WGRAD, layout, dy[:, k : k + step], x, out=dweight[k : k + step])
    return dweight


def _layout(
    kind: str, like: Tensor, width: int, depth: int, bias: bool = False, add: bool = False,
    into: bool = False,
) -> Layout | None:  # fmt: skip
    """How to compute a product with a weight `[width, depth]`; None: as PyTorch does."""
    rows, dtype = like.shape[0], like.dtype
    if not _measured(rows, width, depth, dtype) or not direct(like):
        return None
    rows = min(MOST_ROWS, 1 << (rows - 1).bit_length())
    key = kind, rows, width, depth, dtype, bias, add, into, torch.get_num_threads()
    if key not in _chosen:
        sizes = f"{rows} {width} {depth} {str(dtype).removeprefix('torch.')}"
        text = f"{kind}{' bias' * bias}{' add' * add}{' into' * into} {sizes} threads {key[-1]}"
        made = partial(_candidates, kind, rows, width, depth, dtype, bias, add, into)
        _chosen[key] = LAYOUTS[choices.choose(text, made)]
        memory.pool.release()  # of what was measured with
    return _chosen[key]


def _measured(rows: int, width: int, depth: int, dtype: torch.dtype) -> bool:
    """Whether something may be faster than PyTorch's product of that class."""
    if dtype == torch.bfloat16 and not _onednn(dtype):
        return rows * width * depth > TINY
    if rows <= FEW:
        return rows > 0 and dtype == torch.bfloat16 and width * depth >= LARGE
    return rows * width * depth > SMALL


@cache
def _onednn(dtype: torch.dtype) -> bool:
    """Whether the library's linear takes that dtype here."""
    if not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype == torch.float32


def _candidates(
    kind: str, rows: int, width: int, depth: int, dtype: torch.dtype, bias: bool, add: bool,
    into: bool = False,
) -> Mapping[str, Callable[[], object]]:  # fmt: skip
    """Every layout of a class of products, over operands made when the first of them runs.

    The usual one comes first: AMX's tiles where there are such.
    """

    @cache
    def operands() -> tuple[Tensor | None, ...]:
        def made(*shape: int) -> Tensor:
            return torch.full(shape, 0.5, dtype=dtype, device="cpu")

        x, dy, weight = made(rows, depth), made(rows, width), made(width, depth)
        columns = width if kind == FORWARD else depth
        other, added = made(rows, columns) if add else None, made(columns) if bias else None
        if kind != WGRAD:
            return x if kind == FORWARD else dy, weight, added, other, None
        return dy, x, None, None, made(width, 2 * depth)[:, :depth] if into else None

    def run(layout: Layout) -> Tensor:
        first, second, *added, out = operands()
        assert first is not None
        assert second is not None
        if kind == WGRAD:
            return _wgrad(layout, first, second, out)
        return _product(kind, layout, first, second, *added)

    return {
        name: partial(run, layout)
        for name, layout in sorted(LAYOUTS.items(), key=lambda item: item[1].unit != "tiles")
        if _available(layout, dtype)
        and not (layout.entry == "onednn" and into)
        and _worthwhile(kind, layout, rows, width, depth)
    }


def _available(layout: Layout, dtype: torch.dtype) -> bool:
    """Whether this machine has what a layout calls, for that dtype."""
    if layout.unit in product.UNITS:
        return dtype == torch.bfloat16 and layout.unit in product.units()
    return layout.entry != "onednn" or _onednn(dtype)


def _worthwhile(kind: str, layout: Layout, rows: int, width: int, depth: int) -> bool:
    """Whether a layout's copies are worth their memory: at most half of the result's.

    A weight gradient's are made in pieces or in the place of the operand; the library's linear
    would copy more, and make every piece of the result in memory of its own. Our units take the
    factor on the right as it is, but the sums must be over adjacent elements of the other one. With
    few rows the weight should be the other one, which is read once as it is.
    """
    if layout.unit in product.UNITS:
        flipped, copied = layout.unit != layout.entry, layout.first or layout.second
        transposes = layout.unit == product.TRANSPOSES
        if kind == WGRAD:
            return transposes or copied
        if kind == FORWARD and rows > FEW and transposes:
            return True
        return not copied and flipped == (kind == FORWARD and rows <= FEW)
    if rows <= FEW:
        return layout == Layout()
    if kind == WGRAD:
        return layout.entry != "onednn"
    inputs, outputs = (depth, width) if kind == FORWARD else (width, depth)
    first, second = rows * inputs, width * depth
    return 2 * max(layout.first * first, layout.second * second) <= rows * outputs


def _stored(x: Tensor, by_columns: bool) -> Tensor:
    """x, laid out by rows or by columns: a gradient may be expanded, an input strided."""
    if by_columns:
        return x if x.t().is_contiguous() else transposed(x).t()
    return x if x.is_contiguous() else x.contiguous()


def _product(
    kind: str, layout: Layout, first: Tensor, second: Tensor, bias: Tensor | None = None,
    other: Tensor | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The product as the layout says, plus what is to be added, stored by rows (into out)."""
    first, second = _stored(first, layout.first), _stored(second, layout.second)
    a, b = _FACTORS[kind](first, second)
    if layout.entry == "onednn":
        made = _onednn_product(a, b, bias, other)
        return made if out is None else out.copy_(made)
    y = memory.empty((a.shape[0], b.shape[1]), a.dtype) if out is None else out
    into = y
    if layout.entry.endswith("flipped"):
        a, b, into = b.t(), a.t(), y.t()
        bias = None if bias is None else bias[:, None]
    if layout.unit in product.UNITS:
        if other is not None and into is not y:
            other = other.t()
        product.multiply(layout.unit, a, b, into, bias, other)
        return y
    if bias is None:
        torch.mm(a, b, out=into)
    else:
        torch.addmm(bias, a, b, out=into)
    return y if other is None else y.add_(other)


def _onednn_product(a: Tensor, b: Tensor, bias: Tensor | None, other: Tensor | None) -> Tensor:
    run = torch.ops.mkldnn._linear_pointwise
    make = partial(run, a, b.t(), bias, "none", [], "")
    if other is not None:
        make = partial(run.binary, a, _stored(other, False), b.t(), bias, "add")
    return memory.adopted(make, (a.shape[0], b.shape[1]), a.dtype)
