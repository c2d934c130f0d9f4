"""Fusers of the `cpu` backend."""

from . import passes, products, quantize

__all__ = ["passes", "products", "quantize"]
