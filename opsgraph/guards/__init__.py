"""Checks of what callers, their functions and other libraries hand in, change or take away.

Users meet generated source in three ways, each guarded here: their names stand in it beside its own
(`names`), so do the constants of their ops (`constants`), and tracebacks show it (`compiled`).
"""
