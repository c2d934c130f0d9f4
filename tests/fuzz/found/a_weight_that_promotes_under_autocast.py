"""Under autocast a sum with a weight in fp32 was planned in 16 bits; products behind it failed."""

from opsgraph.testing.fuzz import Life

life = Life("float32", 80)
life.build(8, "GLU()", "Tee('a')", "WeightedAdd('a', 4)", "TransposedLinear(4, 3, bias=False)")
life.call(autocast=True)
