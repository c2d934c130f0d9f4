"""Fused implementations, one folder per backend; importing this package registers them all."""

from . import aten, backends, cpu, cublaslt, exchanges, triton

__all__ = ["aten", "backends", "cpu", "cublaslt", "exchanges", "triton"]
