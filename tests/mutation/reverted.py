"""Mends that are taken back: the faults that were there before them."""

from .form import Fault

REVERTED: tuple[Fault, ...] = ()
