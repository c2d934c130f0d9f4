"""Fusers of the `cpu` backend."""

from . import grouped, passes, products, quantize

__all__ = ["grouped", "passes", "products", "quantize"]
