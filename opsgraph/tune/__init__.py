"""Tuning: `measure` finds out what is fastest here, `command` is `python -m opsgraph tune`."""
