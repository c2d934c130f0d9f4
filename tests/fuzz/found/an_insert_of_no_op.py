"""A Residual's list of ops took what is no module where it was inserted."""

from opsgraph.testing.fuzz import Life

life = Life()
life.build(8, "Residual(GELU())")
life.call()
life.broken(0, "insert")
life.call()
