"""Quantizers, where users import them from; `precision/` defines them."""

from .op import Storage
from .precision.microscaled import MXQuantizer, NVFP4Quantizer
from .precision.quantizers import (
    BlockQuantizer,
    Copy,
    DelayedQuantizer,
    Operand,
    Quantized,
    Quantizer,
    RowQuantizer,
    TensorQuantizer,
)

__all__ = [
    "BlockQuantizer",
    "Copy",
    "DelayedQuantizer",
    "MXQuantizer",
    "NVFP4Quantizer",
    "Operand",
    "Quantized",
    "Quantizer",
    "RowQuantizer",
    "Storage",
    "TensorQuantizer",
]
