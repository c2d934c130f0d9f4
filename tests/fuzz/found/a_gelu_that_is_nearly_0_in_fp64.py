"""A fault of lives: their GELU in fp64 lost its digits far below 0, and a norm stands behind it."""

from opsgraph.testing.fuzz import Life

life = Life("float64", 82, delay_wgrad_compute=False, backends=("reference",))
norm, gelu = "RMSNorm(2)", "GELU()"
life.from_torch(2, "Identity()", "Linear(2, 2, bias=True)", "GELU('tanh')", gelu, norm, gelu)
life.call(lead=(16,), size=10.0)
