"""States: what was done to a tensor, the root, to reach a value that is not computed yet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_erf": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
    "mish": functional.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}
Call = Callable[[nn.Module, Tensor], Tensor]
Kind = tuple[torch.dtype, torch.dtype | None]
"""Of a call: the root's dtype, and autocast's where that is on."""


def kind_of(root: Tensor) -> Kind:
    """The kind of a call for a root, now."""
    device = root.device.type
    on = torch.is_autocast_enabled(device)
    return root.dtype, torch.get_autocast_dtype(device) if on else None


class Step(NamedTuple):
    """The last thing done.

    kind: "module" (what: the Unit), "function" (its name in FUNCTIONS), "half" (0 or 1, of the last
    dimension), "scale" (a number), "vector" (a Vector), "product" (of two values), "residual" (the
    sum with an earlier value or the root), "extra" (the sum with another tensor).
    """

    kind: str
    what: Any = None


def is_kind(step: Step, kind: str) -> bool:
    """Whether it is that of a module of a kind: "linear", "norm", "activation"."""
    return step.kind == "module" and step.what.leaf.kind == kind


class State:
    """A step after others. Two values of one root and equal states are equal."""

    def __init__(self, step: Step, inputs: tuple[State | None, ...]) -> None:
        self.step = step
        self.inputs = inputs
        """What the step reads; None is the root."""
        self._before: tuple[State, ...] = ()
        self.next: dict[Any, State] = {}
        """By step and further inputs; only what was proven, once a model is patched."""
        self.plan: Any = None
        """The Sequential that computes the value from the root, where it was proven."""
        self.now = False
        """Whether the value is computed when it is reached: nothing that is planned follows."""
        self.eager = False
        """Whether the value is read by several, so that what follows starts from it."""
        self.barred: str | None = None
        """Why no plan may contain this step, where none may."""
        self.open = self._is_open()
        """Whether a linear layer's value waits for its activation, as gate and up do."""
        self.like: dict[Kind, tuple[int, torch.dtype]] = {}
        """The width and dtype of the value, by the kind of call."""

    def _is_open(self) -> bool:
        if is_activation(self):
            return False
        before = [state for state in self.inputs if state is not None]
        if is_kind(self.step, "linear"):
            return not any(is_activation(s) for state in before for s in state.before())
        return bool(before) and all(state.open for state in before)

    def takes(self, step: Step) -> bool:
        """Whether a plan may go on with a step: open ones do with activations and products."""
        activates = step.kind in ("function", "half", "product") or is_kind(step, "activation")
        return activates or not self.open

    def after(self, step: Step, *more: State | None) -> tuple[Any, State]:
        """What a step makes of this state, for `next`, which it is not put into."""
        return (step, *more), State(step, (self, *more))

    def before(self) -> tuple[State, ...]:
        """This state and all that it was reached from, each once, the later first."""
        if not self._before:
            found: dict[State, None] = {}
            waiting = [self]
            while waiting:
                state = waiting[-1]
                inputs = [s for s in state.inputs if s is not None and s not in found]
                waiting += inputs
                if not inputs:
                    found[waiting.pop()] = None
            self._before = tuple(reversed(found))
        return self._before

    def compute(self, values: Sequence[Tensor], extra: Tensor | None, call: Call) -> Tensor:
        """The step on values, as the model's own code does it. call: runs a module."""
        kind, what = self.step
        if kind == "module":
            return call(what.module, values[0])
        if kind == "function":
            return FUNCTIONS[what](values[0])
        if kind == "half":
            half: Tensor = values[0].chunk(2, -1)[what]
            return half
        if kind == "scale":
            return values[0] * float(what)
        if kind == "vector":
            vector: Tensor = what.read(call)
            return values[0] * vector
        if kind == "product":
            return values[0] * values[1]
        if kind == "residual":
            return values[0] + values[1]
        assert extra is not None
        return values[0] + extra

    def run(self, root: Tensor, extras: Sequence[Tensor], call: Call) -> dict[State | None, Tensor]:
        """The values of this state and those before it, by the model's own modules and functions.

        Each is run once. The root's value, that of None, is among them.
        """
        rest = list(extras)
        done: dict[State | None, Tensor] = {None: root}
        for state in reversed(self.before()):
            values = [done[before] for before in state.inputs]
            extra = rest.pop(0) if state.step.kind == "extra" else None
            done[state] = state.compute(values, extra, call)
        return done


def is_activation(state: State) -> bool:
    """Whether its last step is one."""
    return state.step.kind == "function" or is_kind(state.step, "activation")


class Vector:
    """A parameter that a model's code multiplies a value by, and the module that holds it."""

    def __init__(self, name: str, module: nn.Module, attribute: str) -> None:
        self.name, self.module, self.attribute = name, module, attribute

    def now(self, module: nn.Module | None = None) -> Tensor:
        """The parameter; module: in the place of its own."""
        found: Tensor = getattr(module or self.module, self.attribute)
        return found

    def read(self, call: Any) -> Tensor:
        """The parameter, or that of the copy which a proof calls."""
        return self.now(getattr(call, "places", {}).get(self))


def units_of(state: State) -> list[Any]:
    """The units and vectors that a state was reached by, in the order in which they compute."""
    steps = [s.step for s in reversed(state.before())]
    return list(dict.fromkeys(step.what for step in steps if step.kind in ("module", "vector")))


def all_states(units: Sequence[Any]) -> list[State]:
    """Every state that units reach, each once."""
    found: dict[State, None] = {}
    waiting = [unit.first for unit in units if unit.first is not None]
    while waiting:
        state = waiting.pop()
        if state not in found:
            found[state] = None
            waiting += state.next.values()
    return list(found)
