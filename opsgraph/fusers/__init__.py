"""Fused implementations, one file per backend; importing this package registers them all."""

from . import aten, triton

__all__ = ["aten", "triton"]
