"""Recomputations by torch.utils.checkpoint: they need the recipe and the scales of their forward.

`checkpoint_contexts` gives both. Without it they are the forward's own where autocast is inside the
checkpointed function, and anything else is an error, which is found in one of two ways:

- A checkpoint that is not reentrant makes saved tensors again. So each call under a recipe saves a
  number, its `moment`, and `saved_again` compares the two.
- A reentrant one runs its forward without grad, so that nothing is saved then. `follow` holds its
  recomputation to the recipe of the module's last call without grad.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointError,
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
)

from ..base.errors import OpsgraphError
from ..guards.torch_private import dispatch_modes, graph_task, saved_hooks
from .autocast import active
from .delayed import Scaling
from .tapes import Replay, Tape, tapes


def _lost(part: str) -> OpsgraphError:
    return OpsgraphError(
        f"autocast: got a checkpoint's recomputation without its forward's {part}, expected "
        "context_fn=og.checkpoint_contexts, use_reentrant=False, or autocast in its function"
    )


def follow(last: int | None) -> int | None:
    """The recipe of a module's last call without grad, after a call in the recipe that is active.

    Raises OpsgraphError for a reentrant checkpoint's recomputation in another one.
    """
    if graph_task() == -1:
        return last if torch.is_grad_enabled() else active.key
    if last != active.key and tapes.replaying is None and torch.is_grad_enabled():
        inside = active.tasks and active.tasks[-1] == graph_task()  # its function has a context
        if not (inside or saved_hooks()):
            raise _lost("recipe")
    return last


_SHIFT = 1 << 32


def moment(recipe: int, states: Iterable[Scaling]) -> Tensor | None:
    """What a call under a recipe saves beside its tensors: the recipe, and its scales' updates.

    One number, int64 `[]`, on the CPU; None where no hooks are there that could make it again.
    Updates are only ever more, so that sums are the same if all are; a recomputation that replays
    its forward's scales has 0 for them.
    """
    if not saved_hooks():
        return None
    updates = 0 if tapes.replaying is not None else 1 + sum([state.moment for state in states])
    value = recipe * _SHIFT + updates
    return torch.tensor(value, device="cpu") if dispatch_modes() else _number(value)


@lru_cache(256)
def _number(value: int) -> Tensor:
    return torch.tensor(value, device="cpu")  # never in inference mode, which saves nothing


def saved_again(ctx: Any, recipe: int | None) -> list[Tensor]:
    """The tensors that a call saved, but for its `moment` where it has one.

    Raises OpsgraphError where a checkpoint made them again in another recipe or with other scales.
    """
    try:
        saved = list(ctx.saved_tensors)
    except CheckpointError as error:
        if recipe is None and active.key is None:
            raise
        raise _lost("recipe") from error
    if recipe is None or (first := ctx.moment) is None:
        return saved
    again = saved.pop(0)
    if again is first:
        return saved
    if again.dtype != first.dtype or again.dim():
        raise _lost("recipe")
    (recipe_then, updates_then), (recipe_now, updates_now) = (
        divmod(int(number), _SHIFT) for number in (first, again)
    )
    if recipe_then != recipe_now:
        raise _lost("recipe")
    if updates_then != updates_now and updates_then and updates_now:
        raise _lost("scales")
    return saved


class _Recompute:
    """Runs what a checkpoint forgot: with the recipe and the delayed scales of its forward."""

    def __init__(self, key: int | None, tape: Tape) -> None:
        self.key, self.tape = key, tape
        self.before: list[Any] = []

    def __enter__(self) -> None:
        self.before.append((tapes.recording, tapes.replaying))
        tapes.recording, tapes.replaying = (), Replay(self.tape)
        active.push(self)

    def __exit__(self, *error: object) -> None:
        active.pop(self)
        tapes.recording, tapes.replaying = self.before.pop()


class _Record:
    """Notes the delayed scales that a forward uses."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __enter__(self) -> None:
        tapes.recording = (*tapes.recording, self.tape)

    def __exit__(self, *error: object) -> None:
        tapes.recording = tapes.recording[:-1]


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
    tape = Tape()
    return _Record(tape), _Recompute(active.key, tape)
