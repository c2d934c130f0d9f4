"""Fusers of the `cublaslt` backend."""

from . import grouped, products

__all__ = ["grouped", "products"]
