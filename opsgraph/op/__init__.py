"""`Op` and `Spec`: what is computed, and what is known of values before they exist."""

from .arguments import STORED, arguments, constant_under_compile, per_class
from .base import (
    BACKWARD,
    FORWARD,
    Lower,
    Lowered,
    Op,
    Placed,
    differentiable,
    lower_plainly,
    weights,
    without_extra_state,
)
from .spec import ROWS, Spec, Storage, row

__all__ = [
    "BACKWARD",
    "FORWARD",
    "ROWS",
    "STORED",
    "Lower",
    "Lowered",
    "Op",
    "Placed",
    "Spec",
    "Storage",
    "arguments",
    "constant_under_compile",
    "differentiable",
    "lower_plainly",
    "per_class",
    "row",
    "weights",
    "without_extra_state",
]
