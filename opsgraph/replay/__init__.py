"""Passes without Python between their kernels: recorded once, replayed by one native call."""
