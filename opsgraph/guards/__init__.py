"""Checks of what callers, their functions and other libraries hand in, change or take away."""
