"""Hooks that hear of delayed gradients, and refer to their layer, kept it for ever."""

from opsgraph.testing.fuzz import Life

life = Life()
life.build(8, "Linear(8, 8, delay_wgrad_compute=True)", "GELU()")
life.listen()
life.call()
life.leave()
