"""Which functions of an op belong together: a base's derivative is not that of another `fwd`.

A subclass may override `fwd` alone. What the base says of its own `fwd` then no longer holds: its
gradients, how y is made again, which spec y has, when the op does nothing. An abstract base,
without a `fwd`, speaks for all subclasses.
"""

from collections.abc import Callable
from typing import Any

from ..base.errors import OpError, PlanError
from ..guards.cached import per_class
from .base import Op
from .spec import ROWS, Spec


def definer(kind: type[Op], name: str) -> tuple[int, Any]:
    """The class from which a name comes, and its place in the method resolution order."""
    definers = ((k, c) for k, c in enumerate(kind.__mro__) if name in c.__dict__)
    return next(definers, (len(kind.__mro__), Op))


@per_class
def _held(kind: type[Op]) -> dict[str, bool]:
    """What `holds` has found out about a class."""
    return {}


def holds(kind: type[Op], name: str) -> bool:
    """Whether what a class says under a name, perhaps inherited, is about the `fwd` it has."""
    held = _held(kind)
    if name not in held:
        fwd = getattr(definer(kind, name)[1], "fwd", None)
        held[name] = fwd is None or fwd is kind.fwd
    return held[name]


def said(kind: type[Op], name: str) -> Any:
    """What a class says under a name of `Op`; that one's default where it is about another `fwd`.

    So it is with `bwd`, `dgrad`, `wgrad`, `again`, `quantizable`, `promotes` and `typed_by`.
    """
    return getattr(kind, name) if holds(kind, name) else getattr(Op, name)


@per_class
def family(kind: type[Op]) -> tuple[type[Op], ...]:
    """The classes by which patterns know an op: its own, and the base that it is another case of.

    That is the most basic class from which it differs in its constants alone: GatedActivation for
    SwiGLU. Functions take constants as arguments, so what can do the base's work does its.
    """
    bases = (base for base in reversed(kind.__mro__[1:]) if issubclass(base, Op))
    return next(((kind, base) for base in bases if _differs_in_constants(kind, base)), (kind,))


def _differs_in_constants(kind: type[Op], base: type[Op]) -> bool:
    """Whether a class has the base's `fwd`, and changes constants alone.

    Free are besides a few names that no plan asks for. Any other may be what `fwd` calls.
    """
    if getattr(base, "fwd", None) is not kind.fwd:
        return False
    free = {*base.constants, "sample", "extra_repr", "reset_parameters"}
    added = (c for c in kind.__mro__ if c not in base.__mro__)
    changed = {name for c in added for name in vars(c) if hasattr(base, name)} - free
    return all(name.startswith("_") for name in changed)


@per_class
def passes(kind: type[Op]) -> tuple[str, ...]:
    """The extra inputs whose gradient is `dy` itself."""
    return said(kind, "passes") if said(kind, "bwd") else ()


@per_class
def promotes(kind: type[Op]) -> tuple[str, ...]:
    """The extra inputs with whose dtype that of y is promoted."""
    return said(kind, "promotes")  # type: ignore[no-any-return]


@per_class
def backward_functions(kind: type[Op]) -> dict[str, Callable[..., Any]]:
    """What computes the gradients, in order: `wgrad` and `dgrad`, or `bwd`; derived where absent.

    Where a class has all three, those of the more derived class count.
    """
    bwd, dgrad, wgrad = (said(kind, name) for name in ("bwd", "dgrad", "wgrad"))
    depths = [definer(kind, name)[0] for name in ("dgrad", "wgrad") if getattr(kind, name)]
    if bwd and (not (dgrad and wgrad) or definer(kind, "bwd")[0] < min(depths)):
        return {"bwd": bwd}
    if dgrad or wgrad:
        given = {"wgrad": wgrad, "dgrad": dgrad}
        return {name: own or Op.derive(kind, name) for name, own in given.items()}
    return {"bwd": Op.derive(kind, "bwd")}


def verify_backward(kind: type[Op], label: str) -> None:
    """Raises PlanError for an op whose gradients cannot be computed."""
    if kind.random and not any(said(kind, name) for name in ("bwd", "dgrad", "wgrad")):
        raise PlanError(
            f"{label}: got a random fwd and no bwd for it, expected one that takes the saved seed"
        )


def identity(kind: type[Op], op: Op, direction: str, training: bool) -> bool:
    """Whether the op does nothing in a pass.

    A base's word that evaluation does nothing counts for a subclass with its own `fwd` as well.
    """
    known = holds(kind, "identity") or (kind.training_matters and not training)
    return known and kind.identity(op, direction, training)


def out(kind: type[Op], op: Op, x: Spec) -> Spec:
    """The spec of y; of a `fwd` that overrides what its base's `out` is about, by running it."""
    traced = Op.retrace(kind, "out", op, x)
    return kind.out(op, x) if traced is None else traced[0]


def saved(kind: type[Op], op: Op, x: Spec) -> dict[str, Spec]:
    """The specs of what it saves, likewise."""
    traced = Op.retrace(kind, "saved", op, x)
    return kind.saved(op, x) if traced is None else traced[1]


def checked_out(kind: type[Op], op: Op, x: Spec, label: str) -> Spec:
    """`out`; raises OpError where y does not have one row for each row of x."""
    try:
        y = out(kind, op, x)
    except OpError as error:
        if str(error.args[0]).isidentifier():
            error.args = (label, *error.args[1:])
        raise
    if len(y.shape) != 2 or y.shape[0] != ROWS:
        sizes = ", ".join("*" if size == ROWS else str(size) for size in y.shape)
        raise OpError(label, f"an output of shape [{sizes}]", "[*, width], a row for each of x's")
    return y
