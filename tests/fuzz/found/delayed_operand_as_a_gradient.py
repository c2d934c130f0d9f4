"""An added input's gradient in three dimensions shared memory with a delayed gradient's operand."""

from opsgraph.testing.fuzz import Life

life = Life("float32", 58, delay_wgrad_compute=True)
life.build(128, "Linear(128, 64)", "Add('a')", "Tee()")
life.call(lead=(2, 16), backward="twice")
