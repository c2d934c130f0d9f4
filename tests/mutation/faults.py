"""Planted faults: what a slip of a hand would leave, in each part of the product."""

from .form import Fault
from .in_kernels import CPU, TRITON
from .in_plans import CASTS, CODE, PLANNER
from .in_state import MODULES, SCALES

FAULTS: tuple[Fault, ...] = (*CPU, *TRITON, *PLANNER, *CODE, *CASTS, *MODULES, *SCALES)
