"""What is wrong with a class of ops, an op or its parameters: told before anything is planned.

Stages verify what they are made of. The other hook is `Op.verify_added`, for ops inside of ops.
"""

import inspect
from collections.abc import Mapping, Sequence
from keyword import iskeyword
from typing import Any

from torch import Tensor, nn

from ..base.errors import OpError, PlanError
from ..guards.arguments import is_names
from ..guards.cached import per_class
from ..guards.constants import plain
from ..guards.constants import verify as verify_constant
from ..op import STORED, Op, Placed, arguments, differentiable, weights
from ..op.functions import backward_functions, definer, said
from ..ops.lora import ADAPTED
from ..ops.transposed import as_stored
from ..plan.basic_ops import BasicOps

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
    if kind.taps and said(kind, "bwd") is None:
        return "got an op that taps without a bwd for its fwd, expected bwd(self, dy, d)"
    halves = [name for name in ("dgrad", "wgrad") if said(kind, name)]
    if len(halves) == 1 and said(kind, "bwd"):
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


def verify_entries(entries: Sequence[Placed]) -> None:
    """Raises PlanError for an op whose class cannot be planned, or that lacks a constant."""
    for kind, op, label, *_ in entries:
        if reason := verify(kind):
            raise PlanError(f"{label}: {reason}")
        for name in kind.constants:
            if not hasattr(op, name):
                raise PlanError(f"{label}: got no {name!r}, which its constants name")
            verify_constant(plain(getattr(op, name)), label, name)
    _verify_adapted(entries)


def _verify_adapted(entries: Sequence[Placed]) -> None:
    """Raises PlanError for a LoRALinear that stands twice, or a branch that two of them hold."""
    seen: dict[tuple[bool, object], str] = {}
    for _, op, label, *_ in entries:
        if not isinstance(op.channels, Mapping):
            raise PlanError(f"{label}: got channels = {op.channels!r}, expected a dict of names")
        for value, channel in op.channels.items():
            if channel is None or not channel.startswith(ADAPTED):
                continue
            first = seen.setdefault((op.taps, channel if op.taps else id(op)), label)
            if first != label and (op.taps or value == "other"):
                what = "the LoRALinear of" if op.taps else "a LoRA of"
                raise PlanError(f"{label}: got {what} {first} again, expected another")


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
        if reason := verify(entry.kind):
            raise PlanError(f"{label}: {reason}")


Op.verify_added = staticmethod(verify_added)


def verify_weights(run: BasicOps) -> None:
    """Raises PlanError unless `fwd` names just what the op has: all parameters, no other."""
    for i, name in run.slots:
        if not hasattr(*run.ops[i].home(name)):
            raise PlanError(
                f"{run.labels[i]}: got no {name!r}, which its fwd names, expected a parameter "
                "or buffer of that name, or a constant or extra input"
            )
    read: dict[int, set[str]] = {}
    for i, name in run.slots:
        read.setdefault(id(run.ops[i]), set()).add(name)
    for i, op in enumerate(run.ops):
        named = read.get(id(op), set())
        held = {name for name in (*op._parameters, *op._homes) if op.has(name)}
        # What a hook reads before the op runs is no argument of fwd.
        if (missing := held - named - set(op.joined())) and not op._forward_pre_hooks:
            raise PlanError(
                f"{run.labels[i]}: parameters {sorted(missing)} are not arguments of fwd"
            )


def check_shapes(
    run: BasicOps,
    ops: Sequence[Op],
    places: Sequence[tuple[nn.Module, str]],
    weights: Sequence[Tensor | None],
) -> None:
    """Raises OpError for a parameter of another shape than its op says, by its owner's name."""
    for (i, name), (_, shown), weight in zip(run.slots, places, weights, strict=True):
        kind = run.kinds[i]
        expected = kind.shape_of(ops[i], name)
        if weight is None and name in kind.required:
            shown, sizes = as_stored(shown, expected or ())
            shape = "" if expected is None else f" of shape {_text(sizes)}"
            raise OpError(run.labels[i], f"{shown}=None", f"a parameter{shape}")
        if weight is not None and name in kind.typed_by and not weight.is_floating_point():
            raise OpError(run.labels[i], f"{shown} dtype {weight.dtype}", "a float")
        if weight is None or expected is None:
            continue
        got = tuple(weight.shape)
        fits = (e in (None, g) for e, g in zip(expected, got, strict=False))
        if len(got) != len(expected) or not all(fits):
            _, sizes = as_stored(shown, expected)
            shown, stored = as_stored(shown, got)
            raise OpError(run.labels[i], f"{shown} of shape {stored}", _text(sizes))


def _text(shape: Sequence[int | None]) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"
