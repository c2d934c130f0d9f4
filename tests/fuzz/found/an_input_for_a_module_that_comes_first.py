"""What is no tensor met an AttributeError on its way to a module in front, if ops had changed."""

from opsgraph.testing.fuzz import Life

life = Life("float32", 63)
life.build(64, "LayerNormMLP(64, 128)")
life.call(recipes=("delayed",), mode="inference")
life.misuse("none")
