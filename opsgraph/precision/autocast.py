"""`autocast`: which recipe is active, for the calling thread."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable
from functools import lru_cache, wraps
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)

from ..errors import OpsgraphError
from ..guards.torch_private import dispatch_modes, graph_task, saved_hooks
from ..guards.validation import flag
from . import amaxes
from . import delayed as scaling
from .recipe import DelayedScaling, Recipe, recipe_of


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

    def push(self, context: Any) -> None:
        """Open a context: the innermost counts."""
        self.stack = (*self.stack, context)
        self.tasks = (*self.tasks, -1 if torch.compiler.is_compiling() else graph_task())
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

    def __init__(self, group: Any) -> None:
        self.depth, self.group = 0, group


active = Active()
_DEFAULT = DelayedScaling()


class microbatch:
    """Inside, quantized weights are kept (first=True) or those kept are used again (first=False).

    With None nothing is kept: weights are quantized at every call.
    """

    def __init__(self, first: bool | None) -> None:
        self.first = first
        self.before: bool | None = None

    def __enter__(self) -> None:
        self.before, active.first_microbatch = active.first_microbatch, self.first

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
        on = enabled is True or flag("autocast", "enabled", enabled)
        self.recipe = (recipe or _DEFAULT) if on else None
        self.key = None if self.recipe is None else self.recipe.key
        self.group = amax_reduction_group

    def __enter__(self) -> autocast:
        if isinstance(self.recipe, DelayedScaling):
            if torch.compiler.is_compiling():
                raise OpsgraphError(
                    "autocast: got DelayedScaling inside a compiled function, expected the context "
                    "around its call, where it can update all scales at once"
                )
            _open(self.recipe, self.group)
        active.push(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        active.pop(self)
        if isinstance(self.recipe, DelayedScaling):
            _close(self.recipe)
            if active.delayed:
                _return()

    def __call__(self, function: Any) -> Any:
        for found in (inspect.isgeneratorfunction, inspect.iscoroutinefunction,
                      inspect.isasyncgenfunction):  # fmt: skip
            if found(function):
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
    """Count a context of a delayed recipe; the outermost takes up what backwards saw."""
    now = active.delayed.get(recipe.key)
    if now is not None or scaling.recomputing():
        amaxes.serving(recipe)
    if now is None:
        if not scaling.recomputing():
            amaxes.take_up_backwards(recipe, group)
        now = active.delayed[recipe.key] = _Open(group)
    elif now.group is None:
        now.group = group
    now.depth += 1


def _close(recipe: DelayedScaling) -> None:
    """Forget a context of a delayed recipe; the outermost takes up what forwards saw."""
    now = active.delayed[recipe.key]
    now.depth -= 1
    if now.depth == 0:
        del active.delayed[recipe.key]
        if torch.is_grad_enabled() and not scaling.recomputing():
            amaxes.take_up_forwards(recipe, now.group)


def _return() -> None:
    """Have layers serve the delayed recipe that is the innermost again."""
    if active.key in active.delayed:
        amaxes.serving(recipe_of(active.key))  # type: ignore[arg-type]


def state_for(owner: nn.Module, weight: str, recipe: DelayedScaling, label: str) -> scaling.Scaling:
    """The state that a weight has for the recipe that is active, up to date as others are."""
    state, now = scaling.scaling_of(owner, weight, recipe, label), active.delayed.get(recipe.key)
    if now is not None and (now.group is None or not recipe.reduce_amax):
        amaxes.take_up_what_came(state, recipe)
    return state


def meet(module: nn.Module, *names: str) -> None:
    """Make the state of the active recipe for the weights that exist, if it has any.

    For state dicts: one that is asked for inside a delayed recipe's context has its scales.
    """
    recipe = None if active.key is None else recipe_of(active.key)
    if isinstance(recipe, DelayedScaling):
        for name in names:
            if getattr(module, name, None) is not None:  # one that is parametrized, too
                scaling.scaling_of(module, name, recipe)


def follow(last: int | None) -> int | None:
    """The recipe of a module's last call without grad, after a call in the recipe that is active.

    A reentrant checkpoint's forward is such a call, so its recomputation has to be in that recipe:
    else raises OpsgraphError. Of a checkpoint that is not reentrant `saved_again` knows exactly.
    """
    if not scaling.recomputing():
        return last if torch.is_grad_enabled() else active.key
    if last != active.key and scaling.tapes.replaying is None and torch.is_grad_enabled():
        inside = active.tasks and active.tasks[-1] == graph_task()  # its function has a context
        if not (inside or saved_hooks()):
            raise _lost("recipe")
    return last


def _lost(what: str) -> OpsgraphError:
    return OpsgraphError(
        f"autocast: got a checkpoint's recomputation without its forward's {what}, expected "
        "context_fn=og.checkpoint_contexts, use_reentrant=False, or autocast in its function"
    )


_SHIFT = 1 << 32


def moment(recipe: int, states: Iterable[scaling.Scaling]) -> Tensor:
    """What a call under a recipe saves beside its tensors: the recipe, and its scales' updates.

    One number, int64 `[]`, on the CPU. Updates are only ever more, so that sums are the same if all
    are; a recomputation that replays its forward's scales has 0 for them.
    """
    replayed = scaling.tapes.replaying is not None
    made = recipe * _SHIFT + (0 if replayed else 1 + sum([state.moment for state in states]))
    return torch.tensor(made, device="cpu") if dispatch_modes() else _number(made)


@lru_cache(256)
def _number(value: int) -> Tensor:
    return torch.tensor(value, device="cpu")  # never in inference mode, which saves nothing


def saved_again(ctx: Any, recipe: int | None) -> list[Tensor]:
    """The tensors that a call saved, but for its `moment`, which calls under a recipe have.

    Raises OpsgraphError where a checkpoint made them again in another recipe or with other scales.
    """
    try:
        saved = list(ctx.saved_tensors)
    except CheckpointError as error:
        if recipe is None and active.key is None:
            raise
        raise _lost("recipe") from error
    if recipe is None:
        return saved
    found, was = saved.pop(0), ctx.moment
    if found is not was and (found.dtype != was.dtype or found.dim()):
        raise _lost("recipe")
    if found is not was and (one := int(found)) != (other := int(was)):
        if one // _SHIFT != other // _SHIFT:
            raise _lost("recipe")
        if one % _SHIFT and other % _SHIFT:
            raise _lost("scales")
    return saved


class _Recompute:
    """Runs what a checkpoint forgot: with the recipe and the delayed scales of its forward."""

    def __init__(self, key: int | None, tape: scaling.Tape) -> None:
        self.key, self.tape = key, tape
        self.before: list[Any] = []

    def __enter__(self) -> None:
        self.before.append((scaling.tapes.recording, scaling.tapes.replaying))
        scaling.tapes.recording, scaling.tapes.replaying = (), iter(self.tape.used)
        active.push(self)

    def __exit__(self, *error: object) -> None:
        active.pop(self)
        scaling.tapes.recording, scaling.tapes.replaying = self.before.pop()


class _Record:
    """Notes the delayed scales that a forward uses."""

    def __init__(self, tape: scaling.Tape) -> None:
        self.tape = tape

    def __enter__(self) -> None:
        scaling.tapes.recording = (*scaling.tapes.recording, self.tape)

    def __exit__(self, *error: object) -> None:
        scaling.tapes.recording = scaling.tapes.recording[:-1]


def checkpoint_contexts() -> tuple[Any, Any]:
    """`torch.utils.checkpoint.checkpoint(f, x, use_reentrant=False, context_fn=this)`.

    The recomputation then has the recipe and the delayed scales of the forward, whether autocast is
    outside of f or in it, and notes no amax and moves no scale. (A module's own `checkpoint=True`
    needs none.) Checkpoints may stand inside checkpoints.
    """
    if torch.compiler.is_compiling():
        # A checkpoint inside a compiled function takes dispatch modes alone. It needs no more: its
        # graph has the recipe, and reads scales that no update writes to.
        policy = CheckpointPolicy.PREFER_RECOMPUTE
        return create_selective_checkpoint_contexts(lambda *_, **__: policy)  # type: ignore[no-any-return]
    tape = scaling.Tape()
    return _Record(tape), _Recompute(active.key, tape)
