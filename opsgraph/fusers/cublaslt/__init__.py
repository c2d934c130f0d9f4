"""Fusers of the `cublaslt` backend."""

from . import grouped, linear, products

__all__ = ["grouped", "linear", "products"]
