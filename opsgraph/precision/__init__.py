"""Numerics in low precision: recipes, quantizers, delayed scales, quantized products."""
