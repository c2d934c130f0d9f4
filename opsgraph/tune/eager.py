"""A Sequential as one writes it in PyTorch, with the same parameters: what `bench` compares."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.errors import OpError
from ..features.convert import PlainOp
from ..op import Op
from ..ops.activations import AnyActivation
from ..ops.elementwise import Dropout, Identity
from ..ops.linear import Linear
from ..ops.norms import LayerNorm, RMSNorm
from ..ops.residual import Add, AddExtraInput, MakeExtraOutput, Residual, Tee
from ..ops.scaled_add import ScaledAdd, WeightedAdd

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
}
_GATES = {"swiglu": "silu", "reglu": "relu", "geglu": "gelu", "geglu_erf": "gelu_erf"}
"""Kernels of gated activations: that of what the first half goes through."""


class Eager(nn.Module):
    """Runs ops one after the other by PyTorch's functions. Raises OpError for extra inputs."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        for module in modules:
            if isinstance(module, (AddExtraInput, MakeExtraOutput)):
                name = type(module).__name__
                raise OpError("bench", f"{name} in a sequence", "Tee and Add with names")
        self.steps = nn.ModuleList(map(_step, modules))

    def forward(self, x: Tensor) -> Tensor:
        """x: `[*, width]`."""
        channels: dict[str | None, Tensor] = {}
        for step in self.steps:
            if isinstance(step, Tee):
                channels[step.channels["d"]] = x
            elif isinstance(step, Add | ScaledAdd | WeightedAdd):
                x = _summed(step, x, channels[step.channels["other"]])
            else:
                x = step(x)
        return x


class _Function(nn.Module):
    """A function of x and of the op's parameters, wherever those are."""

    def __init__(self, op: Op, function: Callable[..., Tensor], *names: str) -> None:
        super().__init__()
        self.op, self.function, self.names = op, function, names

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *(getattr(*self.op.home(name)) for name in self.names))


def _summed(step: Op, x: Tensor, other: Tensor) -> Tensor:
    if isinstance(step, WeightedAdd):
        return x + other * getattr(*step.home("weight"))  # type: ignore[no-any-return]
    return x + other * step.scale if isinstance(step, ScaledAdd) else x + other


class _Sum(nn.Module):
    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.residual, self.inner = residual, Eager(*residual.ops)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        scale, own = self.residual.scale, self.residual.residual_scale
        return (x if own == 1 else x * own) + (y if scale == 1 else y * scale)  # type: ignore[no-any-return]


def _step(module: nn.Module) -> nn.Module:
    if isinstance(module, Residual):
        return _Sum(module)
    if isinstance(module, nn.Sequential):
        return Eager(*module)
    if not isinstance(module, Op) or type(module) in (Tee, Add, ScaledAdd, WeightedAdd):
        return module
    made = _of(module)
    return PlainOp(module) if made is None else made


def _of(op: Any) -> nn.Module | None:
    kind = type(op)
    if kind is Linear and op.tensor_parallel_mode is None:
        return _Function(op, F.linear, "weight", *["bias"] * op.has("bias"))
    affine = kind in (LayerNorm, RMSNorm) and op.has("weight")
    if affine and not op.zero_centered_gamma and op.normalized_dtype is None:
        if kind is RMSNorm:
            return _Function(op, lambda x, w: F.rms_norm(x, w.shape, w, op.eps), "weight")
        names = ["weight", *["bias"] * op.has("bias")]
        return _Function(op, lambda x, w, b=None: F.layer_norm(x, w.shape, w, b, op.eps), *names)
    if kind in (Dropout, Identity):
        return nn.Dropout(op.p) if kind is Dropout else nn.Identity()
    if isinstance(op, AnyActivation) and not op.params:
        if op.kind in _PLAIN:
            return _Function(op, _PLAIN[op.kind])
        if op.kind in _GATES and not op.glu_interleave_size:
            return _Function(op, _gated(_PLAIN[_GATES[op.kind]]))
    return None


def _gated(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        gate, value = torch.chunk(x, 2, -1)
        return function(gate) * value

    return run
