"""No fault: a GELU near 3.4 loses a unit in fp16 or none. Of 300 of them 1.5 is left, or 0."""

from opsgraph.testing.fuzz import Life

life = Life("float16", 18, backends=("cpu", "aten", "reference"))
life.build(3, "GELU()", "ClippedGELU(1.5)", times=300)
life.fuse("scaling")
life.call(lead=(33,), seed=193)
life.end()
