"""Ops as users write them, for lives to hold; each says `fwd` alone."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ... import ops
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


def _wave(op: Any, x: Tensor, get: Any) -> Tensor:
    return torch.sin(op.scale * x)


def _offset(op: Any, x: Tensor, get: Any) -> Tensor:
    y: Tensor = x + get("bias1") ** 2
    return y


formulas.FORMULAS |= {Wave: _wave, Offset: _offset}
