"""Fusers of the `triton` backend."""

from . import grouped, passes, products, quantize

__all__ = ["grouped", "passes", "products", "quantize"]
