"""A weight that changed after a checkpoint's backward was taken for an operand of its gradient."""

from opsgraph.testing.fuzz import Life

life = Life("float32", 73, delay_wgrad_compute=True, backends=("reference",))
life.build(32, "Linear(32, 64)", "Linear(64, 64)")
life.call(backward="late", checkpointed="saved")
life.change("1.weight", 1)
life.backward_dw()
