"""Under vmap OPSGRAPH_CHECK=1 read values that vmap hides, behind a user's fuser."""

from opsgraph.testing.fuzz import Life

life = Life()
life.build(3, "Bias(3)", "ConstantScale(0.5)")
life.register()
life.verify(True)
try:
    life.transform("vmap", (16,))
finally:
    life.end()
