"""OPSGRAPH_CHECK=1 asked for the largest of no values: the amax of an input without columns."""

from opsgraph.testing.fuzz import Life

life = Life("float32", 91, recompute=False)
life.build(0, "GELU('none')", "Linear(0, 32, bias=False, accumulate_into_main_grad=True)")
life.verify(True)
life.call(recipes=("rows", "delayed"))
