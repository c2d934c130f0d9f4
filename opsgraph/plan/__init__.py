"""From ops to a plan: what is computed, who could compute it, and the functions that do."""

from .result import Plan, make_plan

__all__ = ["Plan", "make_plan"]
