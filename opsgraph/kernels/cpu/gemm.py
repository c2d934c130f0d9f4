"""Matrix products in the way that the library runs fastest on this machine.

The library's speed depends on how each operand is stored, on whether it is asked for a product or
for its transpose, and on which of its entry points is called; which combination wins differs
between machines, dtypes and shapes, by a factor of two and more. So each class of product is
measured at its first use (`choices`): the kind of product, the sizes (rows rounded up to a power of
two), the dtype and the number of threads. A transposed copy of an operand that a combination wants
is counted in its time. Small products are as PyTorch has them and are not measured.

`a @ b + bias` is written to `[m, n]` by rows, in kept memory where the entry point allows it.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .choices import Choices
from .memory import empty

FORWARD, DGRAD, WGRAD = "forward", "dgrad", "wgrad"

SMALL = 2**26
"""Multiplications up to which a product is as PyTorch has it."""
MOST_ROWS = 4096
"""Products of more rows are of the class of this many."""


class Layout(NamedTuple):
    """How to compute `a @ b`.

    entry: "mm", "flipped" (mm of the transposes, into the transpose of the result) or "onednn"
    (linear, with the bias in its accumulator). a, b: whether a transposed copy of that operand is
    made first, stored by columns if it was by rows and by rows if it was by columns.
    """

    entry: str = "mm"
    a: bool = False
    b: bool = False

    @property
    def name(self) -> str:
        """What the file of choices calls it."""
        return self.entry + " a" * self.a + " b" * self.b


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(entry, a, b)
        for a, b in ((False, False), (True, False), (False, True), (True, True))
        for entry in ("mm", "flipped", "onednn")
    )
}

choices = Choices()
_chosen: dict[tuple[object, ...], Layout | None] = {}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, `[rows, out]`. x: `[rows, in]`; weight: `[out, in]`."""
    width, depth = weight.shape
    layout = _layout(FORWARD, x.shape[0], width, depth, x.dtype, bias is not None)
    if layout is None:
        return F.linear(x, weight, bias)
    return _product(layout, _dense(x), weight.t(), bias)


def dgrad(dy: Tensor, weight: Tensor) -> Tensor:
    """`dy @ weight`, `[rows, in]`. dy: `[rows, out]`; weight: `[out, in]`."""
    width, depth = weight.shape
    layout = _layout(DGRAD, dy.shape[0], width, depth, dy.dtype)
    if layout is None:
        return dy @ weight
    return _product(layout, _dense(dy), weight)


def wgrad(dy: Tensor, x: Tensor, dy_t: Tensor | None = None, x_t: Tensor | None = None) -> Tensor:
    """`dy.T @ x`, `[out, in]`. dy: `[rows, out]`; x: `[rows, in]`.

    dy_t, x_t: contiguous transposed copies, where there are any; see `wgrad_copies`.
    """
    layout = _layout(WGRAD, dy.shape[0], dy.shape[1], x.shape[1], dy.dtype)
    if layout is None:
        return dy.t() @ x
    a = dy_t if layout.a and dy_t is not None else _dense(dy).t()
    b = x_t.t() if layout.b and x_t is not None else _dense(x)
    missing = layout._replace(a=layout.a and dy_t is None, b=layout.b and x_t is None)
    return _product(missing, a, b)


def wgrad_copies(rows: int, width: int, depth: int, dtype: torch.dtype) -> tuple[bool, bool]:
    """Whether `wgrad` of dy `[rows, width]` and x `[rows, depth]` wants their transposed copies."""
    layout = _layout(WGRAD, rows, width, depth, dtype)
    return (False, False) if layout is None else (layout.a, layout.b)


def _layout(
    kind: str, rows: int, width: int, depth: int, dtype: torch.dtype, bias: bool = False
) -> Layout | None:
    """How to compute a product with a weight `[width, depth]`; None: as PyTorch does."""
    if rows * width * depth <= SMALL:
        return None
    rows = min(MOST_ROWS, 1 << (rows - 1).bit_length())
    key = kind, rows, width, depth, dtype, bias, torch.get_num_threads()
    if key not in _chosen:
        sizes = f"{rows} {width} {depth} {str(dtype).removeprefix('torch.')}"
        text = f"{kind}{' bias' if bias else ''} {sizes} threads {key[-1]}"
        found = choices.choose(text, partial(_candidates, kind, rows, width, depth, dtype, bias))
        _chosen[key] = LAYOUTS[found]
    return _chosen[key]


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
    kind: str, rows: int, width: int, depth: int, dtype: torch.dtype, bias: bool
) -> Mapping[str, Callable[[], object]]:
    """Every layout of a class of products, over operands made when the first of them runs."""

    @cache
    def operands() -> tuple[Tensor, Tensor, Tensor | None]:
        x, dy = (torch.full((rows, n), 0.5, dtype=dtype) for n in (depth, width))
        weight = torch.full((width, depth), 0.5, dtype=dtype)
        if kind == FORWARD:
            return x, weight.t(), torch.full((width,), 0.5, dtype=dtype) if bias else None
        return (dy, weight, None) if kind == DGRAD else (dy.t(), x, None)

    return {
        name: lambda layout=layout: _product(layout, *operands())  # type: ignore[misc]
        for name, layout in LAYOUTS.items()
        if layout.entry != "onednn" or _onednn(dtype)
    }


def _dense(x: Tensor) -> Tensor:
    """x stored by rows: a gradient may be expanded, an input strided."""
    return x if x.is_contiguous() else x.contiguous()


def _turned(x: Tensor) -> Tensor:
    """x stored by columns where it is stored by rows, and the other way round."""
    return x.t().contiguous().t() if x.is_contiguous() else x.contiguous()


def _product(layout: Layout, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """`a @ b + bias` as the layout says."""
    a = _turned(a) if layout.a else a
    b = _turned(b) if layout.b else b
    if layout.entry == "onednn":
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")  # type: ignore[no-any-return]
    y = empty((a.shape[0], b.shape[1]), a.dtype)
    if layout.entry == "mm":
        return torch.mm(a, b, out=y) if bias is None else torch.addmm(bias, a, b, out=y)
    if bias is None:
        torch.mm(b.t(), a.t(), out=y.t())
    else:
        torch.addmm(bias[:, None], b.t(), a.t(), out=y.t())
    return y
