"""OPSGRAPH_CHECK=1 moved values of fp64 by nothing, to see what their rounding explains."""

from opsgraph.testing.fuzz import Life

NORM = "RMSNorm(66, eps=0.1, elementwise_affine=False, zero_centered_gamma=True)"
life = Life("float64", 45)
life.mlp(4, 4)
life.verify(True)
linears = "Linear(1, 66, bias=True)", "Linear(66, 1, bias=True)"
life.aside(1, f"Residual({linears[0]}, LayerScale(66), {NORM}, {linears[1]})", lead=(1,), seed=896)
