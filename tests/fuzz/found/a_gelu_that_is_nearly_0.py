"""OPSGRAPH_CHECK=1 took PyTorch's GELU far below 0 for exact in fp64, where its 1 + tanh is 0."""

from opsgraph.testing.fuzz import Life

life = Life("float32", 14)
life.build(4, "ConstantScale(-8.0)", "GELU()")
life.verify(True)
try:
    life.call((1,), layout="level", seed=14)
finally:
    life.end()
