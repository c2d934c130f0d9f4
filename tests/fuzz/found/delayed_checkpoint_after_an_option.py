"""A checkpoint's recomputation took other scales than its forward (found by the fuzzer)."""

from opsgraph.testing.fuzz import Life

life = Life("float32", 75)
life.build(64, "Linear(64, 128)", "ReGLU()", "Linear(64, 32)", "RMSNorm(32)")
life.call(recipes=("delayed",))
life.option("planner", "optimal")
life.call(recipes=("delayed",), checkpointed="saved")
