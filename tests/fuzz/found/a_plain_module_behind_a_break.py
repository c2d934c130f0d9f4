"""Behind a break Dynamo looked into a pass's first call, and failed in PyTorch 2.11."""

from opsgraph.testing.fuzz import Life

life = Life("float64", checkpoint=False)
life.build(6, "SReGLU()", "LayerNormMLP(3, 4, delay_wgrad_compute=True)")
life.call(compiled="eager")
