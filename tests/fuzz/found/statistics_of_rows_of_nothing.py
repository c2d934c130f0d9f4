"""Of rows without elements rstd is 0 to the kernels, and was nan to the reference ops."""

from opsgraph.testing.fuzz import Life

for norm in ("LayerNorm(0)", "RMSNorm(0)"):
    life = Life(recompute=False)
    life.build(0, "Bias(0)", norm, "Linear(0, 3, bias=False)")
    life.verify(True)
    life.call()
    life.end()
