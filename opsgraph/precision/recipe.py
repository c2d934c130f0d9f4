"""Recipes: the numerics that linear layers run in under `opsgraph.autocast`.

A recipe gives a quantizer for each role: "activation", "weight" and "gradient". It is a frozen
value: two equal recipes are one, and a changed field is another recipe, for which modules plan
again. Keys of plans know it by its number, `key`.

`Format.HYBRID` is E4M3 in the forward and E5M2 for gradients. `backward_override` is what the
backward multiplies instead of quantized gradients: "high_precision", the values that the forward
had before it quantized them, or "dequantized", those that its GEMMs read.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from numbers import Integral, Real
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..base.errors import OpsgraphError
from ..guards.cached import cached_property
from ..guards.validation import choice, flag, shown
from ..guards.validation import module as verify_module
from ..kernels.reference.quantize import FP8_MAX
from . import delayed, interned
from .microscaled import MXQuantizer, NVFP4Quantizer
from .quantizers import (
    ROLES,
    BlockQuantizer,
    DelayedQuantizer,
    Quantizer,
    RowQuantizer,
    TensorQuantizer,
)

OVERRIDES = (None, "high_precision", "dequantized")
MARGINS = 126


class Format(Enum):
    """FP8 formats, of the forward and of gradients."""

    E4M3 = ("float8_e4m3fn", "float8_e4m3fn")
    E5M2 = ("float8_e5m2", "float8_e5m2")
    HYBRID = ("float8_e4m3fn", "float8_e5m2")

    def of(self, role: str) -> torch.dtype:
        """The dtype of a role's data."""
        role = choice("Format", "role", role, ROLES)
        dtype: torch.dtype = getattr(torch, self.value[role == "gradient"])
        return dtype


_FIELDS: dict[Any, tuple[type, Callable[[Any], Any], str]] = {
    "int": (Integral, int, "a whole number"),
    "float": (Real, float, "a number"),
    "Format": (Format, Format, f"one of {', '.join(map(str, Format))}"),
}
"""By annotation, the values that a field takes, what they become and how errors call them."""
_FIELDS |= {kind: _FIELDS[kind.__name__] for kind in (int, float, Format)}


class Copied(NamedTuple):
    """One quantized copy of a tensor: `data` and `scale` as the recipe stores them."""

    data: Tensor
    scale: Tensor
    dequantize: Callable[[], Tensor]
    """Returns the values that it stands for, in the tensor's shape and dtype."""


@dataclass(frozen=True)
class Recipe:
    """Base of all recipes; a subclass gives `quantizer(role)`."""

    backward_override: str | None = field(default=None, kw_only=True)
    key: ClassVar[int]
    """Its number, the same for equal recipes: what keys of plans hold."""

    def __post_init__(self) -> None:
        names = interned.names_of(type(self))
        if torch.compiler.is_dynamo_compiling():
            # Dynamo can trace neither the checks nor the lock: an equal recipe is made outside.
            values = tuple([getattr(self, name) for name in names])
            object.__setattr__(self, "key", interned.key_under_compile(type(self), names, values))
            return
        for name in names:
            object.__setattr__(self, name, self._checked(name, getattr(self, name)))
        self.check()
        # Now, so that Dynamo just reads it; and after the checks, or what is wrong would stay.
        object.__setattr__(self, "key", interned.key_of(self))

    def _checked(self, name: str, value: Any) -> Any:
        """A field's value as its annotation says, numbers as Python's own."""
        kind = self.__dataclass_fields__[name].type
        if kind in ("bool", bool):
            return flag(type(self).__name__, name, value)
        if kind not in _FIELDS:
            return value
        accepted, convert, expected = _FIELDS[kind]
        value = value.item() if getattr(value, "ndim", None) == 0 else value  # NumPy's and tensors
        if not isinstance(value, accepted) or isinstance(value, bool):
            self._fail(f"{name} {value!r}", expected)
        return convert(value)

    def check(self) -> None:
        """Raises OpsgraphError for values that a recipe cannot have, their types being right."""
        override = self.backward_override
        if not (override is None or (isinstance(override, str) and override in OVERRIDES)):
            known = ", ".join(map(repr, OVERRIDES))
            self._fail(f"backward_override {override!r}", f"one of {known}")
        epsilon = getattr(self, "amax_epsilon", 0.0)
        if isinstance(epsilon, float) and not 0 <= epsilon < math.inf:
            self._fail(f"amax_epsilon {epsilon}", "a finite number, at least 0")

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in interned.names_of(type(self))}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # the number is another one in another process

    def prepare(self, module: nn.Module) -> None:
        """Make the state that the recipe has for the linear layers in a module, if it has any.

        DelayedScaling does; otherwise their first call under it would.
        """
        verify_module(type(self).__name__, module)

    def _fail(self, got: str, expected: str) -> None:
        raise OpsgraphError(f"{type(self).__name__}: got {got}, expected {expected}")

    def quantizer(self, role: str) -> Quantizer:
        """How tensors of a role are quantized."""
        raise NotImplementedError(f"{type(self).__name__}: it has no quantizer(role) of its own")

    def undelayed(self, role: str) -> Quantizer:
        """The same for a tensor that has no history of amaxes."""
        return self.quantizer(role)

    def quantize(self, x: Tensor, role: str = "activation") -> Copied:
        """One quantized copy of x `[*, width]`, for a product that contracts over its width.

        x: fp32, bf16, fp16 or fp64, which is rounded to fp32. DelayedScaling takes the scale from
        x's own amax here, as a first step with one amax in the history would.
        """
        if role not in ROLES:
            self._fail(f"role {role!r}", f"one of {', '.join(ROLES)}")
        if not isinstance(x, Tensor) or not x.dim() or not x.is_floating_point():
            self._fail(shown(x), "a float tensor [*, width]")
        rows = torch.atleast_2d(x).flatten(0, -2)
        copy = self.quantizer(role)(rows, ("row",), self.first_scale(rows, role)).row
        assert copy is not None

        def dequantize() -> Tensor:
            return copy.dequantize(x.dtype)[:, : x.shape[-1]].reshape(x.shape)

        return Copied(copy.data, copy.scale, dequantize)

    def first_scale(self, x: Tensor, role: str) -> Tensor | None:
        """The scale for a tensor without a history; None where scales are its own anyway."""
        return None


@dataclass(frozen=True)
class DelayedScaling(Recipe):
    """FP8 with one scale per tensor, made from the amaxes of earlier steps.

    margin: scales are divided by 2^margin. amax_history_len: the number of updates that a scale
    looks back on. amax_compute_algo: "max" over the history, "most_recent", or a function of the
    history, fp32 `[length, tensors]`, that returns `[tensors]`. reduce_amax: over
    `amax_reduction_group`.
    """

    margin: int = 0
    fp8_format: Format = Format.HYBRID
    amax_history_len: int = 1024
    amax_compute_algo: str | Callable[[Tensor], Tensor] = "max"
    reduce_amax: bool = True

    def check(self) -> None:
        super().check()
        algo = self.amax_compute_algo
        if not (callable(algo) or (isinstance(algo, str) and algo in ("max", "most_recent"))):
            self._fail(f"amax_compute_algo {algo!r}", "'max', 'most_recent' or a function")
        if self.amax_history_len < 1:
            self._fail(f"amax_history_len {self.amax_history_len}", "at least 1")
        if abs(self.margin) > MARGINS:  # 2^-margin would be no normal fp32 number
            self._fail(f"margin {self.margin}", f"one from -{MARGINS} to {MARGINS}")

    def prepare(self, module: nn.Module) -> None:
        """Make the scales of all linear layers in a module, as their first call would.

        A state dict then has them: call it before torch.distributed.checkpoint asks a module what
        to load, and on every rank of an amax_reduction_group. What is there already stays.
        """
        super().prepare(module)
        delayed.prepare(module, self)

    @cached_property
    def terms(self) -> delayed.Terms:
        """The part that the states of layers depend on."""
        limits = (FP8_MAX[self.fp8_format.of(role)] for role in ("activation", "gradient"))
        return delayed.Terms(
            self.amax_history_len, *(limit * 2.0**-self.margin for limit in limits)
        )

    def quantizer(self, role: str) -> Quantizer:
        return DelayedQuantizer(self.fp8_format.of(role))

    def undelayed(self, role: str) -> Quantizer:
        return TensorQuantizer(self.fp8_format.of(role))

    def first_scale(self, x: Tensor, role: str) -> Tensor:
        own = TensorQuantizer(self.fp8_format.of(role)).copy(x.float()).scale
        return own / 2.0**self.margin


@dataclass(frozen=True)
class Float8CurrentScaling(Recipe):
    """FP8 with one scale per tensor, from its own amax; row_wise: one for each row and column.

    use_power_2_scales: round scales down to powers of two. amax_epsilon: the least amax.
    """

    fp8_format: Format = Format.HYBRID
    row_wise: bool = False
    use_power_2_scales: bool = False
    amax_epsilon: float = 0.0

    def quantizer(self, role: str) -> Quantizer:
        kind = RowQuantizer if self.row_wise else TensorQuantizer
        return kind(self.fp8_format.of(role), self.amax_epsilon, self.use_power_2_scales)


@dataclass(frozen=True)
class Float8BlockScaling(Recipe):
    """FP8 with fp32 scales for 1x128 blocks of activations and gradients, 128x128 of weights.

    use_f32_scales: keep scales as they are; else they are rounded down to powers of two.
    """

    fp8_format: Format = Format.E4M3
    use_f32_scales: bool = False
    amax_epsilon: float = 0.0

    def quantizer(self, role: str) -> Quantizer:
        height = 128 if role == "weight" else 1
        dtype = self.fp8_format.of(role)
        return BlockQuantizer(dtype, height, self.amax_epsilon, not self.use_f32_scales)


@dataclass(frozen=True)
class MXFP8BlockScaling(Recipe):
    """MXFP8: an E8M0 scale for each 32 values, along each product's own dimension."""

    fp8_format: Format = Format.E4M3

    def quantizer(self, role: str) -> Quantizer:
        return MXQuantizer(self.fp8_format.of(role))


@dataclass(frozen=True)
class NVFP4BlockScaling(Recipe):
    """NVFP4: E2M1 data in blocks of 16, E4M3 block scales, one fp32 scale per tensor.

    Weights have 16x16 blocks (disable_2d_quantization: 1x16), gradients are rounded stochastically
    (disable_stochastic_rounding: to nearest even), and the operands of weight gradients are
    rotated by a random Hadamard transform of 16 points (disable_rht: they are not).
    """

    disable_rht: bool = False
    disable_stochastic_rounding: bool = False
    disable_2d_quantization: bool = False

    def quantizer(self, role: str) -> Quantizer:
        role = choice("NVFP4BlockScaling", "role", role, ROLES)
        if role == "weight":
            return NVFP4Quantizer(1 if self.disable_2d_quantization else 16)
        stochastic = role == "gradient" and not self.disable_stochastic_rounding
        # With an override the gradients stay plain, so nothing may be rotated.
        rotates = not self.disable_rht and self.backward_override is None
        return NVFP4Quantizer(1, stochastic, rotates)


@dataclass(frozen=True)
class CustomRecipe(Recipe):
    """Quantizers of your choice: `qfactory(role)` returns one of `opsgraph.quantizers`.

    Roles are "activation", "weight" and "gradient". `qfactory` is called when a module first plans
    under the recipe, and perhaps again; it must return equal quantizers each time.
    """

    qfactory: Callable[[str], Quantizer]

    def check(self) -> None:
        super().check()
        if not callable(self.qfactory):
            self._fail(f"qfactory {self.qfactory!r}", "a function of a role")

    def quantizer(self, role: str) -> Quantizer:
        quantizer = self.qfactory(role)
        if not isinstance(quantizer, Quantizer) or quantizer.delayed:
            got = type(quantizer).__name__
            self._fail(f"{got} for {role}", "a Quantizer of opsgraph.quantizers, not delayed")
        if role != "gradient" and getattr(quantizer, "stochastic", False):
            self._fail(f"stochastic rounding for {role}", "it for gradients alone")
        return quantizer


def recipe_of(key: int) -> Recipe:
    """The recipe with that number."""
    recipe: Recipe = interned.recipe_of(key)
    return recipe
