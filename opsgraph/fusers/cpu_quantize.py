"""Quantize and QuantizeGrad by the C++ kernels for the CPU."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from ..fuser import register
from ..kernels.formats import Format
from ..ops import Quantize, QuantizeGrad
from ..quantizers import Quantized, Quantizer, transposed
from ..spec import Spec
from .cpu import CPU, reject_dtype
from .lazy import Lazy
from .quantizing import as_quantized, copy_names, format_of

build = Lazy("cpu.build")
kernels = Lazy("cpu.quantize")


def _made(
    quantizer: Quantizer, x: Tensor, scale: Tensor | None, names: Collection[str]
) -> tuple[Quantized, Tensor | None]:
    """The copies of x that are named, and its amax.

    Where the column copy is the transpose it is a view of the row copy, as in the reference: the
    products that read it were faster so than of bytes that were written transposed.
    """
    both = quantizer.shared and "col" in names
    if both:
        names = {"row", *names} - {"col"}
    made = kernels.quantize(x, format_of(quantizer), scale, names)
    found = as_quantized(quantizer, made, x.dtype)
    if both and found.row is not None:
        found = found._replace(col=transposed(found.row))
    return found, made.amax


class _Quantizing(CPU):
    """What both refuse."""

    def reject(self, q: Any, x: Spec) -> str | None:  # type: ignore[override]
        if not isinstance(format_of(q.quantizer), Format):
            return f"its kernels do not write {q.quantizer.storage.name}"
        return reject_dtype(x) or build.reason("quantize")


@register
class QuantizeCPU(_Quantizing):
    """Quantize: one reading of x for both copies, the column copy transposed."""

    pattern, saves = dict(q=Quantize), ("q_amax",)

    def fwd(self, x: Tensor, q: Any, q_scale: Tensor | None, want: Collection[str]) -> Any:
        made, amax = _made(q.quantizer, x, q_scale, copy_names(want))
        return made, (amax,)


@register
class QuantizeGradCPU(_Quantizing):
    """QuantizeGrad alone."""

    pattern = dict(q=QuantizeGrad)

    def bwd(self, dy: Tensor, q: Any, q_scale: Tensor | None, want: Collection[str]) -> Any:
        made, amax = _made(q.quantizer, dy, q_scale, copy_names(want))
        return made, (amax,)
