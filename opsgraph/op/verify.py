"""What is wrong with a class of ops, a module or an input: told before anything is planned."""

import inspect
from keyword import iskeyword
from typing import Any

import torch

from ..base.errors import OpError, PlanError
from .arguments import STORED, arguments, per_class
from .base import Op, differentiable, is_names, weights
from .functions import backward_functions, definer, derived_backward, function

OWN = frozenset({"x", "y", "dy", "want", "self"})
"""Arguments that have a meaning in every op, so that no value can be called so."""
_FUNCTIONS = tuple(
    name for name in vars(Op) if not name.startswith("_") and callable(getattr(Op, name))
) + ("fwd", "bwd", "dgrad", "wgrad", "again")
"""The functions that plans and sequences call, some of which a class may lack."""


@per_class
def _uncallable(kind: type[Op]) -> str | None:
    """Why plans cannot call a function of a class, with an op and values in order; or None."""
    for name in _FUNCTIONS:
        method = inspect.getattr_static(kind, name, None)
        if method is not None and not callable(getattr(kind, name)):
            return f"got {name} = {method!r}, expected a method"
    for name in ("fwd", "bwd", "dgrad", "wgrad", "again"):
        method = inspect.getattr_static(kind, name, None)
        if isinstance(method, staticmethod | classmethod):
            return f"got {name} as a {type(method).__name__}, expected a method, with self first"
        if not inspect.isfunction(method):
            continue
        parameters = inspect.signature(method).parameters.values()
        named = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "want"]
        if named:
            return f"got the keyword-only arguments {named} of {name}, expected them before any *"
    return None


@per_class
def verify(kind: type[Op]) -> str | None:
    """What is wrong with a class, or None."""
    if getattr(kind, "fwd", None) is None:
        return "got no fwd, expected one that returns (y, saved)"
    if wrong := _uncallable(kind):
        return wrong
    for name in ("saves", "constants", "extra_inputs", "passes", "as_stored", "promotes"):
        value = getattr(kind, name)
        if not is_names(value):
            return f"got {name} = {value!r}, expected a tuple of names"
    if strange := set(kind.passes) - set(kind.extra_inputs):
        return f"got passes = {sorted(strange)}, expected some of extra_inputs"
    absent = [name for name in kind.extra_inputs if name not in arguments(kind.fwd)]
    if absent:
        return f"got the extra inputs {absent}, which fwd does not name"
    if kind.taps and function(kind, "bwd") is None:
        return "got an op that taps without a bwd for its fwd, expected bwd(self, dy, d)"
    halves = [name for name in ("dgrad", "wgrad") if function(kind, name)]
    if len(halves) == 1 and function(kind, "bwd"):
        if definer(kind, halves[0])[0] < definer(kind, "bwd")[0]:
            return f"got {halves[0]} beside an inherited bwd, expected bwd, or dgrad and wgrad"
    if halves and len(differentiable(kind)) > 1 and "bwd" not in backward_functions(kind):
        return f"got {halves[0]} and {len(differentiable(kind))} parameters, expected bwd"
    return _wrong_names(kind)


def _wrong_names(kind: type[Op]) -> str | None:
    """Which names of an op's values and constants could mean two things, or None."""
    inputs = {*weights(kind), *kind.extra_inputs, *kind.constants}
    own = OWN | {"d"} if kind.taps else OWN
    if taken := own & inputs:
        return (
            f"parameters, constants and extra inputs cannot be called {sorted(taken)}, "
            "which mean the op's own values"
        )
    if taken := (own | {"d"} | inputs).intersection(kind.saves):
        return f"it cannot save under the names {sorted(taken)}"
    every = [*weights(kind), *kind.extra_inputs, *kind.constants, *kind.saves]
    stored = {name + STORED for name in weights(kind)}
    if meant := stored.intersection(every):
        return f"got {sorted(meant)}, expected other names: they mean parameters as stored"
    if twice := sorted({name for name in every if every.count(name) > 1}):
        return f"got {twice} declared twice, expected one meaning for each name"
    if wrong := [name for name in every if not str.isidentifier(name) or iskeyword(name)]:
        return f"got the names {wrong}, expected identifiers"
    return None


def verify_kind(kind: type[Op], label: str) -> None:
    """Raises PlanError for a class that cannot be planned, whatever the input."""
    if reason := verify(kind):
        raise PlanError(f"{label}: {reason}")


def verify_added(module: Any, name: str = "") -> None:
    """Raises PlanError for a module that cannot stand in a sequence, under that name."""
    if not isinstance(module, Op):
        return
    label = f"{name}:{type(module).__name__}" if name else type(module).__name__
    if "_homes" not in module.__dict__:
        raise PlanError(f"{label}: its __init__ did not call super().__init__()")
    if reason := _uncallable(type(module)):
        raise PlanError(f"{label}: {reason}")
    for entry in module.lower():
        verify_kind(entry.kind, label)


def verify_backward(kind: type[Op], label: str) -> None:
    """Raises PlanError for an op whose gradients cannot be computed."""
    functions = backward_functions(kind)
    if kind.random and functions == {"bwd": derived_backward(kind)}:
        raise PlanError(
            f"{label}: got a random fwd and no bwd for it, expected one that takes the saved seed"
        )


def verify_trailing(op: Op, label: str, shape: torch.Size) -> None:
    """Raises OpError for an input whose last dimensions are not those that the op works on."""
    sizes = op.trailing()
    if sizes and tuple(shape[-1 - len(sizes) : -1]) != sizes:
        expected = ", ".join(map(str, (*sizes, op.in_width)))
        raise OpError(label, f"input of shape {tuple(shape)}", f"[*, {expected}]")
