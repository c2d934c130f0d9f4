"""What quantizers are made with, and what they are given to quantize: checks of both."""

from collections.abc import Callable, Collection
from typing import Any

from torch import Tensor

from ..base.errors import OpError
from ..guards.validation import epsilon, flag, shown, whole
from ..kernels.reference.quantize import FP8_MAX

_HEIGHTS = {"BlockQuantizer": (1, 128), "NVFP4Quantizer": (1, 16)}


def _format(who: str, name: str, value: Any) -> Any:
    if value not in FP8_MAX:
        raise OpError(who, f"{name}={shown(value)}", " or ".join(map(str, FP8_MAX)))
    return value


def _height(who: str, name: str, value: Any) -> int:
    height = whole(who, name, value)
    known = _HEIGHTS.get(who, (height,))
    if height not in known:
        raise OpError(who, f"{name}={height}", " or ".join(map(str, known)))
    return height


_CHECKS: dict[str, Callable[[str, str, Any], Any]] = {
    "dtype": _format, "eps": epsilon, "height": _height,
    "power_of_two": flag, "stochastic": flag, "hadamard": flag,
}  # fmt: skip
"""What fields have to be, by their names."""


def verify_fields(quantizer: Any) -> None:
    """Raises OpError for a field that no quantizer has so; numbers become Python's own."""
    who = type(quantizer).__name__
    for name, check in _CHECKS.items():
        if name in quantizer.__dataclass_fields__:
            object.__setattr__(quantizer, name, check(who, name, getattr(quantizer, name)))


def verify_call(quantizer: Any, x: Any, want: Collection[str], scale: Any) -> None:
    """Raises OpError for what cannot be quantized, unknown copies and a scale that is missing."""
    who = type(quantizer).__name__
    if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
        raise OpError(who, shown(x), "a float tensor [rows, width]")
    if not {"row", "col"}.intersection(want):  # plans ask for more
        raise OpError(who, f"want={shown(want)}", "row, col or both")
    if quantizer.delayed and not isinstance(scale, Tensor):
        raise OpError(who, f"scale={shown(scale)}", "a tensor, made from earlier amaxes")
