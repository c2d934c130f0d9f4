"""Quantizers, where users import them from; `precision/quantizers.py` defines them."""

from .op import Storage
from .precision.quantizers import (
    BlockQuantizer,
    Copy,
    DelayedQuantizer,
    MXQuantizer,
    NVFP4Quantizer,
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
