"""An operand that waited for backward_dw kept its graph, and with it the module for ever."""

from opsgraph.testing.fuzz import Life

life = Life(delay_wgrad_compute=True)
life.build(8, "Linear(8, 8)", "nn.Linear(8, 8)", "Linear(8, 1)")
life.call(backward="late")
life.leave()
