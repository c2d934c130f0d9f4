"""opsgraph: declare a run of basic ops, have it planned, fused and run, forward and backward."""

from . import checkpoints, fusers, ops, quantizers, recipe
from .errors import OpError, OpsgraphError, PlanError, RegisterError
from .fuser import Fuser, register
from .modules import LayerNormMLP
from .op import Op
from .plan import Plan
from .precision import autocast, checkpoint_contexts
from .quantized_parameter import quantized_model_init
from .sequential import Sequential
from .spec import Spec

__version__ = "0.1.0"

__all__ = [
    "Fuser",
    "LayerNormMLP",
    "Op",
    "OpError",
    "OpsgraphError",
    "Plan",
    "PlanError",
    "RegisterError",
    "Sequential",
    "Spec",
    "autocast",
    "checkpoint_contexts",
    "checkpoints",
    "fusers",
    "ops",
    "quantized_model_init",
    "quantizers",
    "recipe",
    "register",
]
