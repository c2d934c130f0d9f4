"""Between quantizers and the kernels that write their copies, of every backend."""

from collections.abc import Collection
from typing import Any

import torch

from ..kernels.formats import NVFP4, Format, Target
from ..quantizers import (
    BlockQuantizer,
    MXQuantizer,
    NVFP4Quantizer,
    Quantized,
    Quantizer,
    RowQuantizer,
    TensorQuantizer,
)


def _scaling(quantizer: Quantizer) -> str | None:
    """The name of a quantizer's scaling in `formats.BLOCKS`."""
    if isinstance(quantizer, RowQuantizer):
        return "rows"
    if isinstance(quantizer, TensorQuantizer):
        return "tensor"
    if isinstance(quantizer, BlockQuantizer):
        return "blocks" if quantizer.height == 1 else "square"
    return "mx" if isinstance(quantizer, MXQuantizer) else None


def format_of(quantizer: Any) -> Target | None:
    """How the kernels are to quantize; None where they have no such format."""
    if isinstance(quantizer, NVFP4Quantizer):
        return NVFP4(quantizer.height, quantizer.stochastic, quantizer.hadamard)
    scaling = _scaling(quantizer)
    if scaling is None:
        return None
    eps, power = getattr(quantizer, "eps", 0.0), getattr(quantizer, "power_of_two", False)
    return Format(scaling, quantizer.dtype, eps, power)


def as_quantized(quantizer: Quantizer, copies: Any, dtype: torch.dtype) -> Quantized:
    """A value that stands for dtype, of the `Copies` that kernels made."""
    more = () if copies.inverse is None else (copies.inverse,)
    row, col = (None if c is None else quantizer.made(*c, *more) for c in (copies.row, copies.col))
    return Quantized(row, col, dtype)


def copy_names(want: Collection[str]) -> tuple[str, ...]:
    """The kernels' names for what a plan wants of a Quantize and what is before it."""
    short = [name.split("_", 1)[-1] for name in want]
    return tuple(dict.fromkeys((*short, *(["amax"] if "q_scale" in want else []))))
