"""From ops to a plan: what is computed, which fusers could, and the functions that do."""

from .result import Plan, make_plan

__all__ = ["Plan", "make_plan"]
