"""A block size of gate and value, set on an activation without them, reached Triton's kernel."""

from opsgraph.testing.fuzz import Life

life = Life(backends=("triton", "aten", "reference"))
life.build(128, "ClippedGELU(1.5)")
life.set(0, "glu_interleave_size", 1)
life.call()
