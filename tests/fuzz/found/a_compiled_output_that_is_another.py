"""Of two outputs that are one Dynamo copies one: the other is a view that has its memory alone."""

from opsgraph.testing.fuzz import Life

life = Life("bfloat16", 2)
life.build(1, "Linear(1, 12)", "Tee('b', to_caller=False)", "Tee()", "ReGLU(glu_interleave_size=1)")
life.call(inplace=True, compiled="eager")
