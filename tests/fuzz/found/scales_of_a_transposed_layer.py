"""Delayed scales of a transposed layer had another name in calls than in state dicts."""

from opsgraph.testing.fuzz import Life

life = Life("bfloat16", 22, backends=("reference",))
life.build(128, "Residual(Linear(128, 32, bias=False), TransposedLinear(32, 128), scale=0.5)")
life.prepare("delayed")
life.restart()
