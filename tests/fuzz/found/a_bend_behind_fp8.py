"""A fault of lives: one value of a product in FP8 lay on the other side of a bend."""

from opsgraph.testing.fuzz import Life

life = Life("bfloat16", 94, backends=("cpu", "reference"))
life.from_torch(128, "GELU()", "Linear(128, 64, bias=True)", "LeakyReLU(0.2)")
life.to("float32")
life.insert(1, "ConstantScale(2.0)")
life.call(seed=729, recipes=("rows",))
