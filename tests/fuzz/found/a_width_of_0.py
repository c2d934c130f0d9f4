"""A Bias behind a linear layer of no features took 0 for a width that is not known."""

from opsgraph.testing.fuzz import Life

life = Life("float32", 9)
life.build(12, "Linear(12, 0)", "Bias(0)", "Residual(RMSNorm(0, eps=0.1), Bias(0))")
life.call((2, 3))
