"""Checks of what callers, their functions and other libraries hand in, change or take away.

Names of users are kept apart too: from all that generated source adds (`names`).
"""
