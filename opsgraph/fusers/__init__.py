"""Fused implementations, one folder per backend; importing this package registers them all."""

from ..kernels import backends
from . import aten, cpu, cublaslt, exchanges, triton

__all__ = ["aten", "backends", "cpu", "cublaslt", "exchanges", "triton"]
