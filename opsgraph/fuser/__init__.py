"""`Fuser`: how a run of ops is computed in one step, and the registry of all fusers."""

from .base import AGAIN, Function, Fuser, Name, Reference, Variant, reference, variants
from .matching import Match, Matcher
from .registry import Handle, register, registered

__all__ = [
    "AGAIN",
    "Function",
    "Fuser",
    "Handle",
    "Match",
    "Matcher",
    "Name",
    "Reference",
    "Variant",
    "reference",
    "register",
    "registered",
    "variants",
]
