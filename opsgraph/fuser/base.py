"""`Fuser`: how a run of ops is computed in one step.

A fuser has the shape of an op. Its `pattern` names the ops it covers; an entry may be a union, and
`Bias | None` is optional. A class stands for ops of just that class and of those that differ from
it in their constants alone (`op.functions.family`): `GatedActivation` for SwiGLU, GEGLU and a
user's with another `kernel`, but `SwiGLU` for SwiGLU.

Arguments of `fwd`, `bwd` and `reject` are the pattern's names (the ops), `x` and `y` (the values
before and after the run; in `reject` x is its Spec), `dy`, and `ENTRY_NAME` for what the op of that
entry calls NAME: `fc_weight`, `act_x`, `norm_rstd`, `norm_eps`, `tee_d`. `saves` lists values that
`fwd` can hand out: inner values and what inner ops save, or private names of the fuser, which only
its own `bwd` may take.

One class may serve ops that differ. What the op in a place lacks is None, in arguments and in
results, and so is all of an entry that is left out. `fwd` returns `(y, saved)`, saved as `saves`
lists them: what the op there does not save is ignored, and so is x, which the plan has already.
`bwd` returns `(dx, gradients)`, one for each argument of an op's `fwd` after x that an entry's
classes can have a gradient for, entry by entry: with
`dict(tee=Tee | None, norm=RMSNorm | LayerNorm, fc=BasicLinear)` those are `norm_weight`,
`norm_bias` and `fc_weight`. What is not in `want` is ignored.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from itertools import product
from math import inf
from types import NoneType, UnionType
from typing import Any, ClassVar, NamedTuple, Union, get_args, get_origin

import torch

from ..guards.cached import cached_property, per_class
from ..op import BACKWARD, FORWARD, Op, Spec, arguments, differentiable
from ..op.functions import backward_functions, passes, said

AGAIN = "again"
"""Beside the passes: how an op, or a fuser, makes its y again in the backward."""
Variant = tuple[tuple[str, type[Op] | None], ...]


class Fuser:
    """One fused implementation. Subclass it, declare `backend`, `pattern`, `fwd` and/or `bwd`."""

    backend: ClassVar[str]
    pattern: ClassVar[Mapping[str, Any]]
    priority: ClassVar[float | None] = None
    """Of fusers that could take an op the one of the highest priority does, whatever its backend.
    Of equals the order of the backends decides, then the number of ops, then which was registered
    first. None stands for 1, and for 0 in opsgraph's own: a fuser that a user registers goes before
    those, and with 0 among them."""
    saves: ClassVar[tuple[str, ...]] = ()
    consumes: ClassVar[tuple[str, ...]] = ()
    """Arguments of `bwd` that come in a list of one. What `bwd` pops from it has no other variable
    unless something else still needs it: it may die early, or lend its memory to a result."""
    wants: ClassVar[Mapping[str, str]] = {}
    """What `want` calls a saved value or a gradient, if its kernel has another word for that:
    `dict(norm_rstd="rstd", fc_weight="y")`. The plan's source has that word already."""
    dtypes: ClassVar[Collection[torch.dtype] | None] = None
    """The dtypes that x may have, None for any."""
    quantized: ClassVar[bool] = False
    """Whether it takes an op whose operands a recipe has quantized."""
    recomputes: ClassVar[bool | None] = None  # the option recompute that it is for, None: any
    promotes: ClassVar[bool] = False  # whether its Add may add two dtypes
    reject_formats: Callable[..., str | None] | None = None
    """`reject_formats(self, x, weight, dy)`: a reason not to take operands of such a `Storage`; dy
    is None where a recipe leaves the gradient as it is."""
    fwd: Callable[..., Any] | None = None
    bwd: Callable[..., Any] | None = None
    wgrad: Callable[..., Any] | None = None
    dgrad: Callable[..., Any] | None = None
    """`bwd` in two steps, of which a plan runs what it needs: `wgrad(dy, fc_x, ...)`, the product,
    gives the only gradient after dx, a linear layer's weight's (a plan knows where it goes)."""
    again: Callable[..., Any] | None = None  # y once more in the backward, of what fwd saved too
    gives: ClassVar[tuple[str, ...]] = ()
    """`("fc_x",)`: in the place of the weight gradient of the last op, a linear layer, `bwd`
    returns that op's input, which it has made again. The weight gradient is a step of its own."""
    reject: Callable[..., str | None] | None = None
    """`reject(self, KEY, ..., x)`: a reason not to use it here, or None."""

    def saved(self, ops: Mapping[str, Op | None], x: Spec) -> dict[str, Spec]:
        """The specs of private saved names; needed only where there are such names."""
        raise NotImplementedError(f"{self.name} saves private values and must define `saved`")

    serial = 0
    """The number of its registration, which no other has."""

    @property
    def name(self) -> str:
        """What plans call it."""
        return type(self).__name__

    @cached_property
    def declaration(self) -> "Declaration":
        """What it declares, read once."""
        return Declaration(self)

    def split(self, argument: str) -> tuple[str | None, str]:
        """`fc_weight` is `("fc", "weight")`; what belongs to no key is `(None, argument)`."""
        keys = [key for key in self.pattern if argument.startswith(key + "_")]
        key = argument if argument in self.pattern else max(keys, key=len, default=None)
        return key, argument[len(key) + 1 :] if key else argument

    def functions(self, direction: str) -> dict[str, Callable[..., Any]]:
        """The functions to call in that pass, in order; none if it does not serve the pass."""
        names = {FORWARD: ("fwd",), BACKWARD: ("wgrad", "dgrad", "bwd"), AGAIN: (AGAIN,)}
        functions = {name: getattr(self, name) for name in names[direction]}
        return {name: function for name, function in functions.items() if function}


class Name(NamedTuple):
    """A name that a fuser uses: the pattern's key that it belongs to, and what it is of that op."""

    text: str
    key: str | None
    value: str
    moved: bool = False
    """Whether the function takes it from a list of one."""


class Function(NamedTuple):
    """A function that plans call, with the names of its arguments, `want` apart."""

    name: str
    arguments: tuple[Name, ...]
    wants: bool


class Declaration:
    """What a fuser declares, in the form that planning reads."""

    def __init__(self, fuser: Fuser) -> None:
        ours = type(fuser).__module__.startswith("opsgraph.")
        self.priority = float(not ours) if fuser.priority is None else fuser.priority
        self.entries = {k: frozenset(alternatives(e)) for k, e in fuser.pattern.items()}
        self.functions = {
            direction: [
                _function(fuser, *item, moved) for item in fuser.functions(direction).items()
            ]
            for direction, moved in ((FORWARD, ()), (BACKWARD, fuser.consumes), (AGAIN, ()))
        }
        self.saves = tuple(Name(name, *fuser.split(name)) for name in fuser.saves)
        self.private = tuple(name.text for name in self.saves if name.key is None)
        """What it saves that is no value of an op."""
        self.gradients = tuple(_gradients(fuser))
        """What follows dx in the results of `bwd`."""
        self.gives = tuple(Name(name, *fuser.split(name)) for name in fuser.gives)
        self.rejects = arguments(fuser.reject) if fuser.reject else ()
        named = [name for function in self.functions[BACKWARD] for name in function.arguments]
        self.tapped = tuple(name.key for name in named if name.key and name.value == "d")
        """The Tees whose gradients `bwd` takes."""

    def fits(self, kinds: set[type[Op]]) -> bool:
        """Whether one of these classes, bases among them, stands for every entry of the pattern."""
        return all(None in e or not kinds.isdisjoint(e) for e in self.entries.values())


def _function(fuser: Fuser, name: str, call: Any, moved: Collection[str]) -> Function:
    """What a fuser's function takes."""
    named = ("self", *arguments(call)) if isinstance(fuser, Reference) else arguments(call)
    taken = (Name(n, *fuser.split(n), n in moved) for n in named if n != "want")
    return Function(name, tuple(taken), "want" in named)


def _gradients(fuser: Fuser) -> Iterator[Name]:
    """A name for each gradient that some class of an entry has, entry by entry.

    That of an extra input which its op passes on is dy itself, and no fuser's to give.
    """
    prefixed = not isinstance(fuser, Reference)
    for key, entry in fuser.pattern.items():
        kinds = [kind for kind in alternatives(entry) if kind and not passes(kind)]
        for value in dict.fromkeys(name for kind in kinds for name in differentiable(kind)):
            yield Name(f"{key}_{value}" if prefixed else value, key, value)


class Reference(Fuser):
    """One op by its own functions: what every other implementation is checked against."""

    backend = "reference"
    priority = -inf

    def __init__(self, kind: type[Op]) -> None:
        self.kind = kind
        self.pattern = {"op": kind}  # type: ignore[misc]
        self.saves = kind.saves  # type: ignore[misc]

    @property
    def name(self) -> str:
        return self.kind.__name__

    def split(self, argument: str) -> tuple[str | None, str]:
        return ("op", "") if argument == "self" else ("op", argument)

    def functions(self, direction: str) -> dict[str, Callable[..., Any]]:
        kind = self.kind
        if direction == FORWARD:
            return {"fwd": kind.fwd}
        if direction == BACKWARD:
            return backward_functions(kind)
        again = said(kind, "again")
        return {"again": again} if again else {}


@per_class
def reference(kind: type[Op]) -> Reference:
    """The reference of a class, made once."""
    return Reference(kind)


def alternatives(entry: Any) -> tuple[type[Op] | None, ...]:
    """The classes that an entry of a pattern may stand for, None for an optional one."""
    kinds = get_args(entry) if get_origin(entry) in (Union, UnionType) else (entry,)
    return tuple(None if kind in (None, NoneType) else kind for kind in kinds)


def variants(pattern: Mapping[str, Any]) -> Iterator[Variant]:
    """Every concrete pattern that a pattern with unions and optional entries stands for."""
    for kinds in product(*map(alternatives, pattern.values())):
        yield tuple(zip(pattern, kinds, strict=True))
