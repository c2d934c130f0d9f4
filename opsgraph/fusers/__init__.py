"""Fused implementations, one folder per backend; importing this package registers them all."""

from . import aten, cpu, cublaslt, exchanges, triton

__all__ = ["aten", "cpu", "cublaslt", "exchanges", "triton"]
