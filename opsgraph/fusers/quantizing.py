"""Between quantizers and the kernels that write their copies, of every backend."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backend import backends
from ..fuser import Fuser
from ..kernels.formats import Target
from ..ops import Quantize, QuantizeGrad
from ..precision.quantizers import Quantized, Quantizer


def format_of(quantizer: Quantizer) -> Target | None:
    """How kernels are to quantize; None where only the quantizer's formulas do."""
    return quantizer.format if quantizer.by_kernels else None


def as_quantized(quantizer: Quantizer, copies: Any, dtype: torch.dtype) -> Quantized:
    """A value that stands for dtype, of the `Copies` that kernels made."""
    more = () if copies.inverse is None else (copies.inverse,)
    row, col = (None if c is None else quantizer.made(*c, *more) for c in (copies.row, copies.col))
    return Quantized(row, col, dtype)


Made = tuple[Quantized, Tensor | None]


class Kernel(NamedTuple):
    """A backend's way to quantize a tensor: formats that it writes, dtypes that it reads, and how.

    `quantize(quantizer, x, scale, names)` gives the copies of x, `[rows, width]`, and the amax,
    as far as they are named, with the quantizer's bits. why_not: a reason why it is absent here
    though its backend is there.
    """

    formats: tuple[type, ...]
    dtypes: tuple[torch.dtype, ...]
    quantize: Callable[[Quantizer, Tensor, Tensor | None, Collection[str]], Made]
    why_not: Callable[[], str | None] = lambda: None

    def takes(self, to: Target | None, x: Tensor) -> bool:
        """Whether it quantizes such a tensor so."""
        return isinstance(to, self.formats) and x.dtype in self.dtypes and not self.why_not()


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
    if not torch.compiler.is_compiling():
        to, known = format_of(quantizer), backends()
        for name in order:
            here = name in KERNELS and known[name].why_not_on(x.device) is None
            if here and KERNELS[name].takes(to, x):
                return KERNELS[name].quantize(quantizer, x, scale, names)
    amax = quantizer.amax(x) if "amax" in names else None
    return quantizer(x, names, scale), amax


class QuantizesValue(Fuser):
    """Quantize by a backend's kernel: one reading of x for both copies."""

    pattern, saves, wants = dict(q=Quantize), ("q_amax",), dict(q_amax="amax")

    def fwd(self, x: Tensor, q: Any, q_scale: Tensor | None, want: Collection[str]) -> Any:
        kernel = KERNELS[self.backend]
        made, amax = kernel.quantize(q.quantizer, x, q_scale, want)
        return made, (amax,)


class QuantizesGradient(Fuser):
    """QuantizeGrad by a backend's kernel."""

    pattern, wants = dict(q=QuantizeGrad), dict(q_scale="amax")

    def bwd(self, dy: Tensor, q: Any, q_scale: Tensor | None, want: Collection[str]) -> Any:
        kernel = KERNELS[self.backend]
        made, amax = kernel.quantize(q.quantizer, dy, q_scale, want)
        return made, (amax,)
