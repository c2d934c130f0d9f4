"""Between quantizers and the kernels that write their copies, of every backend."""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..base.backend import backends
from ..fuser import Fuser
from ..kernels.formats import Target
from ..op import Spec
from ..ops import Quantize, QuantizeGrad
from ..precision.quantizers import Quantized, Quantizer
from ..precision.weights import QuantizedTensor


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

    def takes(self, to: Target | None, x: Spec | Tensor) -> bool:
        """Whether it quantizes such a tensor so."""
        return isinstance(to, self.formats) and x.dtype in self.dtypes and not self.why_not()


KERNELS: dict[str, Kernel] = {}
"""By backend, which runs them on its devices; each adds its own."""


def _chosen(
    order: Sequence[str], quantizer: Quantizer, x: Spec | Tensor
) -> tuple[str, Callable[..., Made]]:
    """The first backend in `order` with a kernel for x, or the quantizer's own formulas."""
    to, known = format_of(quantizer), backends()
    for name in order:
        if name in KERNELS and known[name].why_not_on(x.device) is None:
            if KERNELS[name].takes(to, x):
                return name, KERNELS[name].quantize
    return "reference", _by_formulas


def _by_formulas(
    quantizer: Quantizer, x: Tensor, scale: Tensor | None, names: Collection[str]
) -> Made:
    amax = quantizer.amax(x) if "amax" in names else None
    return quantizer(x, names, scale), amax


def quantize(
    order: Sequence[str], quantizer: Quantizer, x: Tensor, scale: Tensor | None,
    names: Collection[str],
) -> Made:  # fmt: skip
    """The copies of x that are named, and its amax if that is named: the same bits in any backend.

    The first backend in `order` with a kernel for x makes them, else the quantizer.
    """
    return _chosen(order, quantizer, x)[1](quantizer, x, scale, names)


def prepare_by(
    order: Sequence[str], quantizer: Quantizer, weight: Spec, copies: tuple[str, ...]
) -> tuple[str, Callable[..., tuple[Tensor | None, ...]]]:
    """What quantizes weights like this one, for the `prepare` of a plan to call.

    A QuantizedTensor in the same layout is taken as it is held, and has no amax. A tuple is what an
    earlier call returned. amax: what is wanted of a delayed one's. Under torch.compile the compiler
    sees into the quantizer's formulas.
    """
    backend, kernel = _chosen(order, quantizer, weight)
    delayed = quantizer.delayed

    def parts(value: Quantized) -> tuple[Tensor, ...]:
        if len(copies) == 1:
            return quantizer.parts(value, copies[0])
        return (*quantizer.parts(value, copies[0]), *quantizer.parts(value, copies[1]))

    def prepare(
        weight: Any, scale: Tensor | None = None, amax: tuple[str, ...] = ("amax",)
    ) -> tuple[Tensor | None, ...]:
        if isinstance(weight, tuple):
            return weight
        weight = weight.detach()
        if isinstance(weight, QuantizedTensor):
            if (held := weight.copies(quantizer, copies)) is not None:
                return (*parts(held), None) if delayed else parts(held)
            weight = weight.dequantize()
        run = _by_formulas if torch.compiler.is_compiling() else kernel
        value, found = run(quantizer, weight, scale, (*copies, *amax) if delayed else copies)
        return (*parts(value), found) if delayed else parts(value)

    return backend, prepare


class Quantizes(Fuser):
    """What writes quantized copies, which its backend's kernels have to know how to."""

    def reject(self, q: Any) -> str | None:
        """Why they do not, or None."""
        kernel = KERNELS[self.backend]
        if not isinstance(format_of(q.quantizer), kernel.formats):
            return f"its kernels do not write {q.quantizer.storage.name}"
        return kernel.why_not()


class QuantizesValue(Quantizes):
    """Quantize by a backend's kernel: one reading of x for both copies."""

    pattern, saves, wants = dict(q=Quantize), ("q_amax",), dict(q_amax="amax")

    def fwd(self, x: Tensor, q: Any, q_scale: Tensor | None, want: Collection[str]) -> Any:
        kernel = KERNELS[self.backend]
        value, amax = kernel.quantize(q.quantizer, x, q_scale, want)
        return value, (amax,)


class QuantizesGradient(Quantizes):
    """QuantizeGrad by a backend's kernel."""

    pattern, wants = dict(q=QuantizeGrad), dict(q_scale="amax")

    def bwd(self, dy: Tensor, q: Any, q_scale: Tensor | None, want: Collection[str]) -> Any:
        kernel = KERNELS[self.backend]
        value, amax = kernel.quantize(q.quantizer, dy, q_scale, want)
        return value, (amax,)
