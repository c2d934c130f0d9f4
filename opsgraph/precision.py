"""`autocast`: which recipe is active, for the calling thread."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from . import scaling
from .errors import OpsgraphError
from .recipe import DelayedScaling, Recipe


class Active(threading.local):
    """The recipes of this thread, by number; Dynamo guards what is read here."""

    def __init__(self) -> None:
        self.key: int | None = None
        """What modules run in; None outside `autocast`."""
        self.depth = 0
        self.entered: dict[int, tuple[DelayedScaling, Any]] = {}
        """Delayed recipes, and their groups, since the outermost context opened."""
        self.init: tuple[int, bool] | None = None
        """Of `quantized_model_init`: the recipe, and whether to keep the first values."""
        self.first_microbatch: bool | None = None
        """True: keep quantized weights for the microbatches that follow; False: use those."""


active = Active()
_DEFAULT = DelayedScaling()


class microbatch:
    """Inside, quantized weights are kept (first=True) or those kept are used again (first=False).

    With None nothing is kept: weights are quantized at every call.
    """

    def __init__(self, first: bool | None) -> None:
        self.first = first

    def __enter__(self) -> None:
        active.first_microbatch = self.first

    def __exit__(self, *error: object) -> None:
        active.first_microbatch = None


class autocast:
    """Run linear layers in low precision: `with autocast(recipe=...):`, or a decorator.

    recipe: by default `DelayedScaling()`. enabled: False runs in high precision. Contexts nest; the
    innermost counts. amax_reduction_group: a process group, over which DelayedScaling reduces its
    amaxes; every rank has to hold the same modules then.

    DelayedScaling updates the scales of activations and weights when the outermost context ends
    with grad enabled, and those of gradients when the next outermost context opens.
    """

    def __init__(
        self, enabled: bool = True, recipe: Recipe | None = None, amax_reduction_group: Any = None
    ) -> None:
        if recipe is not None and not isinstance(recipe, Recipe):
            raise OpsgraphError(f"autocast: got recipe {recipe!r}, expected one of opsgraph.recipe")
        self.recipe = (recipe or _DEFAULT) if enabled else None
        self.key = None if self.recipe is None else self.recipe.key
        self.group = amax_reduction_group
        self.before: list[int | None] = []

    def __enter__(self) -> autocast:
        if self.key is not None and isinstance(self.recipe, DelayedScaling):
            if torch.compiler.is_compiling():
                raise OpsgraphError(
                    "autocast: got DelayedScaling inside a compiled function, expected the context "
                    "around its call, where it can update all scales at once"
                )
            if active.depth == 0 and not scaling.recomputing():
                scaling.update(self.key, self.recipe, self.group, scaling.BACKWARD)
            active.entered[self.key] = self.recipe, self.group
        self.before.append(active.key)
        active.key = self.key
        active.depth += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        active.depth -= 1
        active.key = self.before.pop()
        if active.depth == 0 and active.entered:
            entered, active.entered = active.entered, {}
            if torch.is_grad_enabled() and not scaling.recomputing():
                for key, (recipe, group) in entered.items():
                    scaling.update(key, recipe, group, scaling.FORWARD)

    def __call__(self, function: Any) -> Any:
        from functools import wraps

        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return inside


class _Recompute:
    """Runs what a checkpoint forgot: with the recipe and the delayed scales of its forward."""

    def __init__(self, key: int | None, scales: list[Tensor]) -> None:
        self.key, self.scales = key, scales
        self.before: int | None = None

    def __enter__(self) -> None:
        self.before, active.key = active.key, self.key
        active.depth += 1  # a context inside is not the outermost, and updates nothing
        scaling.tape.replay = iter(self.scales)

    def __exit__(self, *error: object) -> None:
        scaling.tape.replay = None
        active.depth -= 1
        active.key = self.before
        active.entered = {}


class _Record:
    """Notes the delayed scales that a forward uses."""

    def __init__(self, scales: list[Tensor]) -> None:
        self.scales = scales

    def __enter__(self) -> None:
        scaling.tape.scales = self.scales

    def __exit__(self, *error: object) -> None:
        scaling.tape.scales = None


def checkpoint_contexts() -> tuple[Any, Any]:
    """`torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False, context_fn=this)`.

    The recomputation then has the recipe and the delayed scales of the forward, whether autocast is
    outside of f or in it, and changes no state. (A module's own `checkpoint=True` needs none.)
    """
    scales: list[Tensor] = []
    return _Record(scales), _Recompute(active.key, scales)
