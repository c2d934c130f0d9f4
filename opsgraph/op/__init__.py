"""`Op`: what is computed. `Spec`: what is known of a value before it exists."""

from .arguments import STORED, arguments, constant_under_compile, per_class
from .base import (
    BACKWARD,
    FORWARD,
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
