"""Gradients that wait for backward_dw were lost when the module was told to delay no more."""

from opsgraph.testing.fuzz import Life

life = Life("float32", 86, delay_wgrad_compute=True)
life.build(4, "Linear(4, 16)")
life.call(backward="late")
life.option("delay_wgrad_compute", False)
life.backward_dw()
