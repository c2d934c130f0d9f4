"""Quantize and QuantizeGrad, which recipes put around every linear layer.

Each is the identity in the other pass. `Quantize` makes the layer's operand of x, `QuantizeGrad`
that of the gradient which arrives at the layer. The op `Quantize` that a user writes rounds the
value, or its gradient, through the recipe's format wherever no linear layer does so anyway.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..guards.validation import flag
from ..op import Lowered, Op, Placed, Spec, lower_plainly
from ..op.functions import said
from ..precision.autocast import state_for
from ..precision.quantizers import ROLES, Quantizer
from ..precision.recipe import DelayedScaling, Recipe, recipe_of
from .elementwise import Identity
from .grouped import GroupedLinear
from .quantized_grouped import grouped


class _Quantizing(Op):
    """What all share: a quantizer, its role, and the scale where that is delayed."""

    keeps_width = True
    as_stored = ("scale",)
    quantizer: Quantizer
    role: str

    def __init__(self, quantizer: Quantizer | None = None, role: str = "") -> None:
        super().__init__()
        # Past the module's look at each attribute: there are two of these for each linear layer.
        self.__dict__.update(quantizer=quantizer or Quantizer(), role=role, scale=None)

    def reject(self, x: Spec) -> str | None:
        side = "out" if self.role == "gradient" else "in"
        return self.quantizer.reject(f"{side}_features", x.width)

    @classmethod
    def sample(cls) -> Sequence[Op]:
        return ()


class Quantize(_Quantizing):
    """Round x through the active recipe's format, and with backward=True its gradient.

    Without a recipe it does nothing. Before a linear layer, which quantizes its input itself, it
    adds nothing either.
    """

    saves = ("amax",)

    def __init__(
        self,
        forward: bool = True,
        backward: bool = False,
        *,
        quantizer: Quantizer | None = None,
        role: str = "",
    ) -> None:
        super().__init__(quantizer, role)
        who = type(self).__name__
        self.rounds = flag(who, "forward", forward), flag(who, "backward", backward)

    def identity(self, direction: str, training: bool) -> bool:
        return direction == "backward"

    def out(self, x: Spec) -> Spec:
        return x.stored(self.quantizer.storage)

    def saved(self, x: Spec) -> dict[str, Spec]:
        return {"amax": Spec((), torch.float32, x.device)}

    def fwd(self, x: Tensor, scale: Tensor | None, want: Collection[str]) -> Any:
        amax = self.quantizer.amax(x) if "amax" in want else None
        return self.quantizer(x, want, scale), (amax,)

    def lower(self) -> Sequence[Lowered]:
        return (Lowered(Identity, self),)


class QuantizeGrad(_Quantizing):
    """Quantize the gradient that arrives; the "gradient" of its scale is that amax."""

    packs_gradient = True

    def identity(self, direction: str, training: bool) -> bool:
        return direction == "forward"

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(self, x: Tensor, scale: Tensor | None) -> Any:
        return x, ()

    def bwd(self, dy: Tensor, scale: Tensor | None, want: Collection[str]) -> Any:
        amax = self.quantizer.amax(dy) if "scale" in want else None
        return self.quantizer(dy, want, scale), (amax,)


class RoundTrip(_Quantizing):
    """`y = dequantize(quantize(x))`; the gradient passes as it is."""

    def identity(self, direction: str, training: bool) -> bool:
        return direction == "backward"

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return _rounded(self.quantizer, x), ()


class RoundTripGrad(_Quantizing):
    """What RoundTrip does, to the gradient."""

    def identity(self, direction: str, training: bool) -> bool:
        return direction == "forward"

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return x, ()

    def bwd(self, dy: Tensor) -> tuple[Tensor, tuple[()]]:
        return _rounded(self.quantizer, dy), ()


def _rounded(quantizer: Quantizer, x: Tensor) -> Tensor:
    copy = quantizer(x, ("row",)).row
    assert copy is not None
    return copy.dequantize(x.dtype)[:, : x.shape[-1]]


def lowered(key: int, ops: Sequence[Op], labels: Sequence[str]) -> list[Placed]:
    """What ops stand for under the recipe of that number, with their labels."""
    plain = lower_plainly(ops, labels)
    flags = [False, *(said(entry.kind, "quantizable") for entry in plain), False]
    run: list[Placed] = []
    for entry, before, quantizable, after in zip(plain, flags, flags[1:], flags[2:], strict=False):
        if quantizable:
            run += _around(entry, recipe_of(key), *_parts(recipe_of(key)))
        elif entry.kind is GroupedLinear:
            run += grouped(entry, recipe_of(key))
        elif isinstance(entry.op, Quantize):
            run += _rounding(entry, recipe_of(key), before, after)
        else:
            run.append(entry)
    return run


_Parts: TypeAlias = tuple[Quantize, QuantizeGrad, Quantizer]


def _parts(recipe: Recipe) -> _Parts:
    """What a recipe puts before and after a linear layer, and the quantizer of its weight.

    For all its layers. The recipe keeps them, for quantizers may hold the function that made them:
    elsewhere they would keep it, and with it the recipe's number, for ever.
    """
    found: _Parts | None = recipe.__dict__.get("_parts")
    if found is None:
        activation, weight, gradient = map(recipe.quantizer, ROLES)
        before = Quantize(quantizer=activation, role="activation")
        found = before, QuantizeGrad(gradient, "gradient"), weight
        object.__setattr__(recipe, "_parts", found)
    return found


def _around(
    entry: Placed, recipe: Recipe, before: Op, after: Op, quantizer: Quantizer
) -> Iterator[Placed]:
    """A linear layer between its Quantize and its QuantizeGrad."""
    override, label = recipe.backward_override, entry.label
    if isinstance(recipe, DelayedScaling):
        serial = getattr(entry.op, "serial", "")
        state = state_for(*entry.op.home("weight"), recipe, f"#{serial}")
        before, after = before.skeleton(), after.skeleton()
        before._homes["scale"], after._homes["scale"] = (state, "activation"), (state, "gradient")
    yield Placed(Quantize, before, label, "q")
    yield entry._replace(quantizers={"weight": quantizer}, override=override)
    if override is None:
        yield Placed(QuantizeGrad, after, label, "g")


def _rounding(
    entry: Placed, recipe: Recipe, linear_before: bool, linear_after: bool
) -> Iterator[Placed]:
    """A user's Quantize, without what a linear layer beside it does anyway."""

    assert isinstance(entry.op, Quantize)
    forward, backward = entry.op.rounds
    if forward and not linear_after:
        op = RoundTrip(recipe.undelayed("activation"), "activation")
        yield Placed(RoundTrip, op, entry.label)
    else:
        yield entry
    if backward and not linear_before:
        grad = RoundTripGrad(recipe.undelayed("gradient"), "gradient")
        yield Placed(RoundTripGrad, grad, entry.label, "g")
