"""Ops and fusers as users write them, for lives to hold."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
from ...fuser import Fuser
from ...op import Op, Spec
from .. import formulas


def sine(x: Tensor) -> Tensor:
    return torch.sin(x)


class Wave(ops.ConstantScale):
    """`y = sin(scale * x)`: what its base says of a scale is about another `fwd`."""

    constants = ("scale", "function", "least")  # type: ignore[assignment]

    def __init__(self, scale: float) -> None:
        super().__init__(scale)
        self.function, self.least = sine, -math.inf

    def fwd(  # type: ignore[override]
        self, x: Tensor, scale: float, function: Any, least: float
    ) -> tuple[Tensor, tuple[()]]:
        return function(scale * x).clamp_min(least), ()


class Offset(Op):
    """`y = x + bias1 * bias1`, with a parameter `[width]` whose name ends in a digit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias1 = nn.Parameter(torch.empty(width))

    @property
    def in_width(self) -> int:
        return self.bias1.numel()

    def shape_of(self, name: str) -> tuple[int, ...]:
        return (self.in_width,)

    def width_before(self, out_width: int) -> int:
        return self.in_width

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(self, x: Tensor, bias1: Tensor) -> tuple[Tensor, tuple[()]]:
        return x + bias1 * bias1, ()


class Noise(Op):
    """`y = x + noise`, of which each call draws another."""

    keeps_width = True
    random = True

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return x + drawn(x), ()

    def bwd(self, dy: Tensor) -> tuple[Tensor, tuple[()]]:
        return dy, ()


def drawn(x: Tensor) -> Tensor:
    """As many numbers, of any dtype the same."""
    return torch.rand(x.shape, dtype=torch.float32, device=x.device).to(x.dtype)


class Scaling(Fuser):
    """A Bias and a scale in one step."""

    backend = "reference"
    pattern = dict(bias=ops.Bias, scale=ops.ConstantScale)

    def fwd(self, x: Tensor, bias_bias: Tensor, scale: ops.ConstantScale) -> Any:
        """Gives `(x + bias) * scale`."""
        return (x + bias_bias) * scale.scale, ()


class Dropping(Fuser):
    """A Bias and a Dropout for calls without grad: nothing is saved."""

    backend = "reference"
    pattern = dict(bias=ops.Bias, drop=ops.Dropout)

    def fwd(self, x: Tensor, bias_bias: Tensor, drop: ops.Dropout) -> Any:
        """Gives `dropout(x + bias)`."""
        return drop.fwd(x + bias_bias, drop.p)[0], ()


class Dropped(Fuser):
    """A Dropout and a SiLU for calls without grad."""

    backend = "reference"
    pattern = dict(drop=ops.Dropout, act=ops.SiLU)

    def fwd(self, x: Tensor, drop: ops.Dropout) -> Any:
        """Gives `silu(dropout(x))`."""
        x = drop.fwd(x, drop.p)[0]
        return x * torch.sigmoid(x), ()


class Summed(Fuser):
    """The backward of a sum and a SiLU, which has no place for the gradient of what was added."""

    backend = "reference"
    pattern = dict(add=ops.Add, act=ops.SiLU)

    def bwd(self, dy: Tensor, act_x: Tensor) -> Any:
        """Gives `dy * silu'(x)`."""
        s = torch.sigmoid(act_x)
        return dy * s * (1 + act_x * (1 - s)), ()


FUSERS: dict[str, tuple[type[Fuser], tuple[str, ...]]] = {
    "scaling": (Scaling, ("Bias({})", "ConstantScale(2.0)")),
    "dropping": (Dropping, ("Bias({})", "Dropout(0.4)")),
    "dropped": (Dropped, ("Dropout(0.4)", "SiLU()")),
    "summed": (Summed, ("Add()", "SiLU()")),
}
"""Fusers, with ops of a width for which they are."""


def _wave(op: Any, x: Tensor, get: Any) -> Tensor:
    return torch.sin(op.scale * x)


def _offset(op: Any, x: Tensor, get: Any) -> Tensor:
    y: Tensor = x + get("bias1") ** 2
    return y


def _noise(op: Any, x: Tensor, get: Any) -> Tensor:
    return x + drawn(x)


formulas.FORMULAS |= {Wave: _wave, Offset: _offset, Noise: _noise}
