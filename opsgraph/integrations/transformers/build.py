"""From a state to ops that read the model's own parameters."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

from torch import nn

from ...features.several import SeveralLayers
from ...op import Op
from ...ops.activations import (
    GEGLU,
    GELU,
    GLU,
    QGEGLU,
    QGELU,
    Gated,
    Hardswish,
    Mish,
    ReGLU,
    ReLU,
    ReLU6,
    Sigmoid,
    SiLU,
    SReGLU,
    SReLU,
    SwiGLU,
    Tanh,
)  # fmt: skip
from ...ops.elementwise import ConstantScale
from ...ops.layer_scale import LayerScale
from ...ops.linear import Linear
from ...ops.residual import Add, Tee
from ...ops.transposed import TransposedLinear
from .states import State, is_activation, is_kind

_FUNCTIONS: dict[str, Callable[[], Op]] = {
    "silu": SiLU,
    "gelu_erf": lambda: GELU("none"),
    "gelu_tanh": GELU,
    "relu": ReLU,
    "relu6": ReLU6,
    "hardswish": Hardswish,
    "mish": Mish,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
}
_GATED: dict[type[Op], type[Op]] = {
    SiLU: SwiGLU,
    ReLU: ReGLU,
    SReLU: SReGLU,
    QGELU: QGEGLU,
    Sigmoid: GLU,
}


class CannotBuild(Exception):
    """Why no ops compute what a state does."""


Places = dict[Any, nn.Module]
"""By unit or vector, modules in whose place others are read, as copies in a proof."""


def ops_of(state: State, places: Places | None = None) -> list[Op]:
    """The ops from the root to a state. Raises CannotBuild."""
    return _Builder(places or {}).ops(state, None)


class _Builder:
    def __init__(self, places: Places) -> None:
        self.places, self.numbers = places, count()

    def ops(self, state: State | None, base: State | None) -> list[Op]:
        """From a state before it, or the root, on."""
        if state is base:
            return []
        if state is None:
            raise CannotBuild("a residual does not start on the way")
        kind, what = state.step
        if kind == "product":
            return self._gated(state, base)
        if kind == "half":
            raise CannotBuild("half of a value is used alone")
        if kind == "residual" and state.inputs[1] is not base:
            earlier = state.inputs[1]
            return [*self.ops(earlier, base), *self._residual(state, earlier)]
        if kind == "residual":
            return self._residual(state, base)
        before = self.ops(state.inputs[0], base)
        if kind == "module":
            return [*before, self._module(what)]
        if kind == "function":
            return [*before, _FUNCTIONS[what]()]
        if kind == "vector":
            width = what.now().shape[0]
            home = self.places.get(what, what.module)
            scale = LayerScale(width, device="meta").borrow(home, weight=what.attribute)
            return [*before, scale]
        return [*before, ConstantScale(what) if kind == "scale" else Add()]

    def _residual(self, state: State, earlier: State | None) -> list[Op]:
        name = f"residual {next(self.numbers)}"
        return [Tee(name), *self.ops(state.inputs[0], earlier), Add(name)]

    def _module(self, unit: Any) -> Op:
        op: Op = unit.leaf.make()
        module = self.places.get(unit, unit.module)
        for own, theirs in unit.leaf.names.items():
            op.borrow(module, **{own: theirs})
        return op

    def _gated(self, state: State, base: State | None) -> list[Op]:
        for gate, up in (state.inputs, state.inputs[::-1]):
            if gate is None or up is None or not is_activation(gate):
                continue
            (source,) = gate.inputs
            if source is None:
                continue
            if source.step.kind == up.step.kind == "half" and source.inputs == up.inputs:
                gated = self._gate(gate, gate_second=source.step.what == 1)
                return [*self.ops(source.inputs[0], base), gated]
            if _is_linear(source) and _is_linear(up) and source.inputs == up.inputs:
                before = self.ops(source.inputs[0], base)
                return [*before, self._joined(source.step.what, up.step.what), self._gate(gate)]
        raise CannotBuild("a product is not that of a gate and a value")

    def _gate(self, state: State, **options: bool) -> Op:
        kind, what = state.step
        op: Any = what.leaf.make() if kind == "module" else _FUNCTIONS[what]()
        if isinstance(op, GELU):
            return GEGLU(op.approximate, **options)
        kind_of = _GATED.get(type(op))
        return Gated(op, **options) if kind_of is None else kind_of(**options)

    def _joined(self, gate: Any, up: Any) -> Op:
        if TransposedLinear in (gate.leaf.op, up.leaf.op):
            raise CannotBuild("gate and up are transposed layers")
        one, other = gate.leaf.make(), up.leaf.make()
        bias = "bias" in gate.leaf.names
        if (one.in_features, bias) != (other.in_features, "bias" in up.leaf.names):
            raise CannotBuild("gate and up differ in width or bias")
        modules = [self.places.get(unit, unit.module) for unit in (gate, up)]
        rows = one.out_features + other.out_features
        op = Linear(one.in_features, rows, bias=bias, device="meta")
        names = {"weight": "weight"} | ({"bias": "bias"} if bias else {})
        return op.borrow(SeveralLayers(modules), **names)


def _is_linear(state: State) -> bool:
    return is_kind(state.step, "linear")
