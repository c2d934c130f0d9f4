"""Fusers of the `triton` backend."""

from . import products  # isort: skip  # first: of equals, the planner takes the first
from . import grouped, passes, quantize

__all__ = ["grouped", "passes", "products", "quantize"]
