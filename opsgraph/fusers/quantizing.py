"""Between quantizers and the kernels that write their copies, of every backend."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import backends
from ..kernels.formats import Format
from ..quantizers import (
    BlockQuantizer,
    DelayedQuantizer,
    MXQuantizer,
    Quantized,
    Quantizer,
    RowQuantizer,
    TensorQuantizer,
)

_SCALINGS = {
    TensorQuantizer: "tensor",
    DelayedQuantizer: "tensor",
    RowQuantizer: "rows",
    MXQuantizer: "mx",
}


def scaling_of(quantizer: Quantizer) -> str | None:
    """The kernels' name for a quantizer's scaling; None where they have none.

    A subclass has none: it may quantize in a way of its own.
    """
    if type(quantizer) is BlockQuantizer:
        return "blocks" if quantizer.height == 1 else "square"
    return _SCALINGS.get(type(quantizer))


def format_of(quantizer: Any) -> Format:
    """How the kernels are to quantize, for a quantizer that has a `scaling_of`."""
    eps, power = getattr(quantizer, "eps", 0.0), getattr(quantizer, "power_of_two", False)
    return Format(scaling_of(quantizer) or "", quantizer.dtype, eps, power)


def as_quantized(quantizer: Quantizer, copies: Any, dtype: torch.dtype) -> Quantized:
    """A value that stands for dtype, of the `Copies` that kernels made."""
    more = () if copies.inverse is None else (copies.inverse,)
    row, col = (None if c is None else quantizer.made(*c, *more) for c in (copies.row, copies.col))
    return Quantized(row, col, dtype)


def copy_names(want: Collection[str]) -> tuple[str, ...]:
    """The kernels' names for what a plan wants of a Quantize and what is before it."""
    short = [name.split("_", 1)[-1] for name in want]
    return tuple(dict.fromkeys((*short, *(["amax"] if "q_scale" in want else []))))


Made = tuple[Quantized, Tensor | None]


class Kernel(NamedTuple):
    """A backend's way to quantize a tensor: the dtypes that it reads, and the function.

    `quantize(quantizer, x, scale, names)` gives the copies of x, `[rows, width]`, and the amax,
    as far as they are named, with the quantizer's bits.
    """

    dtypes: tuple[torch.dtype, ...]
    quantize: Callable[[Quantizer, Tensor, Tensor | None, Collection[str]], Made]


KERNELS: dict[str, Kernel] = {}
"""By backend, which runs them on its devices; each adds its own."""


def quantize(
    order: Sequence[str], quantizer: Quantizer, x: Tensor, scale: Tensor | None,
    names: Collection[str],
) -> Made:  # fmt: skip
    """The copies of x that are named, and its amax if that is: the same bits, whoever makes them.

    The first backend in `order` with a kernel for x does, and where none has, the quantizer. That
    is so under torch.compile, too, which sees into the quantizer's formulas.
    """
    if not torch.compiler.is_compiling() and scaling_of(quantizer) is not None:
        known = backends()
        for name in order:
            kernel, backend = KERNELS.get(name), known.get(name)
            if kernel is None or backend is None or x.dtype not in kernel.dtypes:
                continue
            if x.device.type in (backend.devices or ()) and backend.why_not() is None:
                return kernel.quantize(quantizer, x, scale, names)
    amax = quantizer.amax(x) if "amax" in names else None
    return quantizer(x, names, scale), amax
