"""`autocast`: which recipe is active, for the calling thread.

Contexts form a stack, and the innermost counts. A delayed recipe has a second count: how many of
its own contexts are open, whatever is around them or inside. As that goes from 0 to 1 the scales of
gradients are updated, as it comes back to 0 those of activations and weights (`delayed` has the
whole). In a checkpoint's recomputation, which is inside a backward, nothing is updated.
"""

from __future__ import annotations

import inspect
import threading
from functools import wraps
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..base.errors import OpsgraphError
from ..guards.torch_private import apart, graph_task
from ..guards.validation import flag, shown
from .delayed import BACKWARD, FORWARD, Scaling, child_name, scaling_of
from .recipe import DelayedScaling, Recipe, recipe_of
from .tapes import tapes
from .updates import as_before, catch_up, serving, update_backward, update_forward


class Active(threading.local):
    """The recipes of this thread, by number; Dynamo guards what is read here."""

    def __init__(self) -> None:
        self.key: int | None = None
        """What modules run in; None outside `autocast`."""
        self.stack: tuple[Any, ...] = ()
        """The contexts that are open, the innermost last; each has a `key`."""
        self.tasks: tuple[int, ...] = ()
        """For each the backward in which it was opened, -1 for none."""
        self.delayed: dict[int, _Open] = {}
        """The delayed recipes whose contexts are open."""
        self.init: tuple[int, bool] | None = None
        """Of `quantized_model_init`: the recipe, and whether to keep the first values."""
        self.first_microbatch: bool | None = None
        """True: keep quantized weights for the microbatches that follow; False: use those."""

    def push(self, context: Any, compiling: bool = False) -> None:
        """Open a context: the innermost counts."""
        self.stack = (*self.stack, context)
        self.tasks = (*self.tasks, -1 if compiling else graph_task())
        self.key = context.key

    def pop(self, context: Any) -> None:
        """Close a context, also one that is not the innermost, as generators do."""
        if self.stack[-1] is context:
            self.stack, self.tasks = self.stack[:-1], self.tasks[:-1]
        else:
            last = max(k for k, other in enumerate(self.stack) if other is context)
            self.stack = (*self.stack[:last], *self.stack[last + 1 :])
            self.tasks = (*self.tasks[:last], *self.tasks[last + 1 :])
        self.key = self.stack[-1].key if self.stack else None


class _Open:
    """How often a delayed recipe is entered, and over which group its amaxes are reduced."""

    depth, group = 0, None


active = Active()
_DEFAULT = DelayedScaling()


class microbatch:
    """Inside, quantized weights are kept (first=True) or those kept are used again (first=False).

    With None nothing is kept: weights are quantized at every call.
    """

    def __init__(self, first: bool | None) -> None:
        self.first = first
        self.before: bool | None = None

    @apart
    def __enter__(self) -> None:
        self.before, active.first_microbatch = active.first_microbatch, self.first

    @apart
    def __exit__(self, *error: object) -> None:
        active.first_microbatch = self.before


class autocast:
    """Run linear layers in low precision: `with autocast(recipe=...):`, or a decorator.

    recipe: by default `DelayedScaling()`. enabled: False runs in high precision. Contexts nest; the
    innermost counts. One context can be entered again inside itself, and by several threads: each
    thread has contexts of its own. amax_reduction_group: a process group, over which DelayedScaling
    reduces its amaxes; every rank has to hold the same modules and open the contexts alike.

    DelayedScaling updates the scales of gradients when its outermost context opens, and those of
    activations and weights when that ends with grad enabled. Contexts of other recipes, around it
    or inside, change nothing. Calls without grad are not recorded.

    Raises OpsgraphError for wrong arguments, for functions that a decorator cannot run inside
    (generators, coroutines), and for ranks whose modules differ.
    """

    def __init__(
        self, enabled: bool = True, recipe: Recipe | None = None, amax_reduction_group: Any = None
    ) -> None:
        if recipe is not None and not isinstance(recipe, Recipe):
            raise OpsgraphError(f"autocast: got recipe {recipe!r}, expected one of opsgraph.recipe")
        if amax_reduction_group is not None and not hasattr(amax_reduction_group, "rank"):
            got = f"autocast: got amax_reduction_group {amax_reduction_group!r}"
            raise OpsgraphError(f"{got}, expected a process group or None")
        on = enabled is True or flag("autocast", "enabled", enabled)
        self.recipe = (recipe or _DEFAULT) if on else None
        self.key = None if self.recipe is None else self.recipe.key
        self.group = amax_reduction_group

    @apart  # else it would be compiled behind a break, and what it writes to `active` be lost
    def __enter__(self) -> autocast:
        compiling = torch.compiler.is_compiling()
        if isinstance(self.recipe, DelayedScaling):
            if compiling:
                raise OpsgraphError(
                    "autocast: got DelayedScaling inside a compiled function, expected the context "
                    "around its call, where it can update all scales at once"
                )
            _open(self.recipe, self.group)
        active.push(self, compiling)
        return self

    @apart
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        active.pop(self)
        if isinstance(self.recipe, DelayedScaling):
            _close(self.recipe)

    def __call__(self, function: Any) -> Any:
        if not callable(function):
            raise OpsgraphError(f"autocast: got {shown(function)} to decorate, expected a function")
        for runs_later in (inspect.isgeneratorfunction, inspect.iscoroutinefunction,
                      inspect.isasyncgenfunction):  # fmt: skip
            if runs_later(function):
                name = getattr(function, "__name__", repr(function))
                raise OpsgraphError(
                    f"autocast: got {name}, which runs after it was called, expected a plain "
                    "function, or the context inside it"
                )
        enabled, recipe, group = self.recipe is not None, self.recipe, self.group

        @wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            # A context of the call's own: Dynamo cannot enter one that was made outside.
            with autocast(enabled, recipe, group):
                return function(*args, **kwargs)

        return inside


def _open(recipe: DelayedScaling, group: Any) -> None:
    """Count a context of a delayed recipe; the outermost updates the scales of gradients."""
    tapes.turns += 1
    key, opened = recipe.key, active.delayed
    context, again = opened.get(key), graph_task() != -1
    if context is not None or again:
        serving(recipe)
    if context is None:
        if not (again or (group is None and as_before(key, BACKWARD))):
            update_backward(recipe, group)
        context = opened[key] = _Open()
        context.group = group
    elif context.group is None:
        context.group = group
    context.depth += 1


def _close(recipe: DelayedScaling) -> None:
    """Forget a context of a delayed recipe; the outermost updates the scales of forwards."""
    tapes.turns += 1
    key, opened = recipe.key, active.delayed
    context = opened[key]
    context.depth -= 1
    if context.depth == 0:
        del opened[key]
        if torch.is_grad_enabled() and graph_task() == -1:
            if context.group is not None or not as_before(key, FORWARD):
                update_forward(recipe, context.group)
    if opened and active.key in opened:  # the innermost again
        serving(recipe_of(active.key))  # type: ignore[arg-type]


def state_for(owner: nn.Module, weight: str, recipe: DelayedScaling, label: str) -> Scaling:
    """The state that a weight has for the recipe that is active, up to date as others are."""
    new = child_name(weight) not in owner._modules
    state, context = scaling_of(owner, weight, recipe, label), active.delayed.get(recipe.key)
    if new:  # it has seen nothing that an update could take up
        state.fresh = False
    elif context is not None and (context.group is None or not recipe.reduce_amax):
        catch_up(state, recipe)
    return state


def meet(module: nn.Module, *names: str) -> None:
    """Make the state of the active recipe for the weights that exist, if it has any.

    For state dicts: one that is asked for inside a delayed recipe's context has its scales.
    """
    recipe = None if active.key is None else recipe_of(active.key)
    if isinstance(recipe, DelayedScaling):
        for name in names:
            if getattr(module, name, None) is not None:  # one that is parametrized, too
                scaling_of(module, name, recipe)
