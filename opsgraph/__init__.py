"""opsgraph: declare a run of basic ops, have it planned, fused and run, forward and backward."""

import gc

# What is imported lives on. A full collection in the midst of it, which looks at all of PyTorch's
# objects and frees none, takes longer than the imports do.
_collecting = gc.isenabled()
gc.disable()
try:
    from . import fusers, integrations, ops, quantizers, recipe
    from .base.errors import OpError, OpsgraphError, PlanError, RegisterError
    from .fuser import Fuser, register
    from .layernorm_mlp import checkpoints
    from .layernorm_mlp.module import LayerNormMLP
    from .op import Op, Spec
    from .plan import Plan
    from .precision.autocast import autocast
    from .precision.recomputed import checkpoint_contexts
    from .precision.weights import quantized_model_init
    from .run.sequential import Sequential
finally:
    if _collecting:
        gc.enable()

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
    "integrations",
    "ops",
    "quantized_model_init",
    "quantizers",
    "recipe",
    "register",
]
