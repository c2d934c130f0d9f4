"""`plan(x=x)` took rows of no columns for no rows, and an extra input did not fit."""

from opsgraph.testing.fuzz import Life

life = Life()
life.build(0, "Linear(0, 1)", "Add()")
life.fuse("dropping")
life.call((3,))
life.end()
