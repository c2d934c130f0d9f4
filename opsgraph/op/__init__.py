"""`Op`: what is computed. `Spec`: what is known of a value before it exists."""

from ..guards.arguments import STORED, arguments
from .base import (
    BACKWARD,
    FORWARD,
    Lowered,
    Op,
    Placed,
    differentiable,
    lower_plainly,
    weights,
)
from .spec import ROWS, Factor, Spec, Storage, row

__all__ = [
    "BACKWARD",
    "FORWARD",
    "ROWS",
    "STORED",
    "Factor",
    "Lowered",
    "Op",
    "Placed",
    "Spec",
    "Storage",
    "arguments",
    "differentiable",
    "lower_plainly",
    "row",
    "weights",
]
