"""`LayerNormMLP`, what it may be made with, and checkpoints of others for it."""

from .module import LayerNormMLP

__all__ = ["LayerNormMLP"]
