"""Fused implementations, one folder per backend; importing this package registers them all."""

from . import aten, cpu, cublaslt, overlap, symmetric, triton

__all__ = ["aten", "cpu", "cublaslt", "overlap", "symmetric", "triton"]
