"""Ops for modules of transformers, which is not imported: activations by name, norms by proof.

A norm is known by its structure, a single weight and an epsilon. Whether its gain is `weight` or
`1 + weight`, and where it rounds, its results on probe values tell: they are compared with those of
each setting of `RMSNorm`.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import nn

from ..op import Op
from ..ops.activations import GELU, QGELU, ClippedGELU, Mish, SiLU, SReLU
from ..ops.elementwise import Identity
from ..ops.norms import RMSNorm
from ..ops.transposed import TransposedLinear
from ..ops.xielu import XIELU

_ACTIVATIONS: dict[str, Callable[[Any], Op | str]] = {
    "SiLUActivation": lambda module: SiLU(),
    "GELUActivation": lambda module: GELU("none"),
    "GELUTanh": lambda module: GELU(),
    "PytorchGELUTanh": lambda module: GELU(),
    "NewGELUActivation": lambda module: GELU(),
    "FastGELUActivation": lambda module: GELU(),
    "AccurateGELUActivation": lambda module: GELU(),
    "QuickGELUActivation": lambda module: QGELU(),
    "ReLUSquaredActivation": lambda module: SReLU(),
    "MishActivation": lambda module: Mish(),
    "ClippedGELUActivation": lambda module: _clipped(module),
    "LinearActivation": lambda module: Identity(),
    "XIELUActivation": lambda module: XIELU(
        beta=float(module.beta), eps=float(module.eps), alpha_n_init=float(module.beta) + 1.0
    ),
}
_ROUNDINGS = (None, "input", "weight")
_GAINS: tuple[dict[str, Any], ...] = (
    {}, {"zero_centered_gamma": True}, {"zero_centered_gamma": True, "round_gamma": True}
)  # fmt: skip
_DTYPES = (
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16),
)  # fmt: skip
"""Of x and of the weight: settings differ in where they round, and in the dtype of y."""
_NEARLY = 0.01
"""The share of 16-bit results that may differ, by the order of a sum: roundings change 0.2."""
_EPS_NAMES = "variance_epsilon", "eps", "epsilon", "norm_eps"


def of_transformers(module: nn.Module) -> Op | str | None:
    """The op that computes what a module of transformers does, without its parameters.

    Otherwise the reason why there is none; or None, where the module is no activation or norm of
    transformers.
    """
    kind = type(module)
    if not kind.__module__.partition(".")[0].startswith("transformers"):
        return None
    if kind.__name__ in _ACTIVATIONS:
        return _ACTIVATIONS[kind.__name__](module)
    if kind.__name__ == "Conv1D" and {*module._parameters} == {"weight", "bias"}:
        weight: Any = module._parameters["weight"]
        return TransposedLinear(*weight.shape, device="meta")
    return _norm(module) if "Norm" in kind.__name__ else None


def _clipped(module: Any) -> Op | str:
    low, high = module.min, module.max
    return ClippedGELU(high) if low == -high else f"it clips from {low} to {high}, not evenly"


def _norm(module: nn.Module) -> Op | str:
    weight = module._parameters.get("weight")
    eps = [module.__dict__[name] for name in _EPS_NAMES if name in module.__dict__]
    if weight is None or weight.ndim != 1 or len(eps) != 1 or not isinstance(eps[0], float):
        return "it is no norm of a single weight of one dimension and an epsilon"
    width = weight.shape[0]
    for rounding, gain in product(_ROUNDINGS, _GAINS):
        options: Any = {"normalized_dtype": rounding, **gain}
        op = RMSNorm(width, eps[0], device="meta", **options)
        if _agrees(module, op, width):
            return op
    return "its results on probe values are those of no setting of RMSNorm"


def _agrees(module: nn.Module, op: RMSNorm, width: int) -> bool:
    """Whether both compute the same on probe values, large and about the epsilon, in each dtype."""
    probe = torch.Generator().manual_seed(0)
    rows = torch.randn(48, width, generator=probe)
    rows[:16] *= 30
    rows[16:32] *= 1e-3
    gain = torch.randn(width, generator=probe) * 0.3 + 0.7
    for dtype, weight_dtype in _DTYPES:
        x, weight = rows.to(dtype), gain.to(weight_dtype)
        try:
            with torch.no_grad():
                y = torch.func.functional_call(module, {"weight": weight}, (x,))
        except Exception:  # whatever it raises, it is no norm of one tensor
            return False
        z = op.fwd(
            x, weight, op.eps or 0.0, op.constant("zero_centered_gamma", None),  # type: ignore[arg-type]
            op.normalized_dtype,
        )[0]  # fmt: skip
        if not isinstance(y, torch.Tensor) or y.dtype != z.dtype or y.shape != z.shape:
            return False
        tolerance = 0.02 if torch.bfloat16 in (dtype, y.dtype) else 1e-5
        if not torch.allclose(y.double(), z.double(), rtol=tolerance, atol=0):
            return False
        if y.dtype == torch.bfloat16 and (y != z).double().mean() > _NEARLY:
            return False
    return True
