"""Measuring: `measure` finds out what is fastest here, `command` is `python -m opsgraph tune`.

`bench` is `python -m opsgraph bench`; it compares with `eager`.
"""
