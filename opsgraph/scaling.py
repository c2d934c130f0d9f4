"""The state of delayed scaling: amax histories and scales, buffers of the layer that they serve.

A layer's `Scaling` is a child module, so that it is in the state dict and moves with the layer. Its
columns are the activation, the weight and the gradient. What a pass sees goes into `amax_forward`
and `amax_backward`, which are -1 where nothing was seen; `update` moves it into the histories.
There is no branch on a value.

A backward that torch.compile made is handed `amax_backward` by a graph that may not know of its
being written, or two forwards before two backwards would be an error. So that buffer is written
without a change of its version.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .errors import OpsgraphError
from .kernels.reference.quantize import FP8_MAX, delayed_update
from .recipe import ROLES, DelayedScaling
from .torch_private import graph_task, preserve_version

_library = torch.library.Library("opsgraph", "FRAGMENT")
_library.define("snapshot(Tensor scale, int column) -> Tensor")


def _snapshot(scale: Tensor, column: int) -> Tensor:
    return scale[column].clone()


_library.impl("snapshot", _snapshot, "CompositeExplicitAutograd")
torch.library.register_fake("opsgraph::snapshot", lambda s, _: s.new_empty(()), lib=_library)


class _Tape(threading.local):
    """Scales that a checkpointed forward used, for its recomputation."""

    def __init__(self) -> None:
        self.scales: list[Tensor] | None = None
        self.replay: Iterator[Tensor] | None = None


tape = _Tape()


def recomputing() -> bool:
    """Whether a forward runs inside a backward, as torch.utils.checkpoint has it."""
    return graph_task() != -1


def snapshot(scale: Tensor, column: int) -> Tensor:
    """A scale for a plan to keep: an update may come before its backward.

    Opaque to compilers, which would rather read the buffer once more in the backward.
    """
    if torch.compiler.is_compiling():
        made: Tensor = torch.ops.opsgraph.snapshot(scale, column)
        return made
    if tape.replay is not None:
        return next(tape.replay)
    made = _snapshot(scale, column)
    if tape.scales is not None:
        tape.scales.append(made)
    return made


FORWARD, BACKWARD = "amax_forward", "amax_backward"
"""What is updated when a forward, or a backward, is over: the buffers with what it saw."""
_COLUMNS = {FORWARD: slice(0, 2), BACKWARD: slice(2, 3)}


class Scaling(nn.Module):
    """One linear layer's delayed scaling.

    Buffers, all fp32: scale `[3]`, by which activation, weight and gradient are multiplied;
    amax_forward `[2]` and amax_backward `[1]`, the largest magnitudes since the last update, or -1;
    amax_history `[length, 3]`.
    """

    scale: Tensor
    amax_forward: Tensor
    amax_backward: Tensor
    amax_history: Tensor

    def __init__(self, length: int, device: torch.device | None = None) -> None:
        super().__init__()
        place: Any = {"dtype": torch.float32, "device": device}
        self.register_buffer("scale", torch.ones(len(ROLES), **place))
        self.register_buffer("amax_forward", torch.full((2,), -1.0, **place))
        self.register_buffer("amax_backward", torch.full((1,), -1.0, **place))
        self.register_buffer("amax_history", torch.zeros(length, len(ROLES), **place))

    @property
    def activation(self) -> Tensor:
        """A copy of the activation's scale, fp32 `[]`."""
        return snapshot(self.scale, 0)

    @property
    def weight(self) -> Tensor:
        """A copy of the weight's scale."""
        return snapshot(self.scale, 1)

    @property
    def gradient(self) -> Tensor:
        """A copy of the gradient's scale."""
        return snapshot(self.scale, 2)

    def record(self, role: str, amax: Tensor) -> None:
        """Note an amax, fp32 `[]`, of an activation or a weight that was quantized."""
        if not torch.compiler.is_compiling() and recomputing():
            return  # it was noted when the forward ran first
        with torch.no_grad():
            seen = self.amax_forward[ROLES.index(role)]
            seen.copy_(torch.maximum(seen, amax))

    def resize(self, length: int) -> None:
        """Have a history of another length: the latest amaxes stay."""
        old = self.amax_history
        if old.size(0) != length:
            new = old.new_zeros(length, old.size(1))
            # Slot 0 is for the next amax, then come the oldest ones and at the end the latest.
            keep = min(length, old.size(0)) - 1
            new[length - keep :] = old[old.size(0) - keep :]
            self.amax_history = new

    def _apply(self, fn: Any, recurse: bool = True) -> Scaling:
        """Moves the buffers; their dtype stays, whatever the layer's becomes."""

        def move(t: Tensor) -> Tensor:
            moved: Tensor = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        given = state_dict.get(f"{prefix}amax_history")
        if given is not None:
            self.resize(given.size(0))
        super()._load_from_state_dict(state_dict, prefix, *args)


def record_gradient(seen: Tensor, amax: Tensor) -> None:
    """Note a gradient's amax, fp32 `[]`, in a layer's `amax_backward`."""
    with torch.no_grad(), preserve_version(seen):
        seen.copy_(torch.maximum(seen, amax))


def child_name(weight: str) -> str:
    """`scaling` for `weight`, `fc1_scaling` for `fc1_weight`."""
    return weight.removesuffix("weight") + "scaling"


def scaling_of(owner: nn.Module, weight: str, recipe: DelayedScaling, key: int) -> Scaling:
    """The state for a weight, a child of the module that owns it; made if it is not there yet."""
    name = child_name(weight)
    state = owner._modules.get(name)
    if not isinstance(state, Scaling):
        state = Scaling(recipe.amax_history_len, getattr(owner, weight).device)
        owner.add_module(name, state)
    state.resize(recipe.amax_history_len)
    known = _registered.setdefault(key, [])
    if not any(ref() is state for ref in known):
        known.append(weakref.ref(state))
    return state


def make_for(module: nn.Module, state_dict: Any, prefix: str, weights: Sequence[str]) -> None:
    """Make the states that a state dict holds, before it is loaded."""
    for weight in weights:
        name = child_name(weight)
        history = state_dict.get(f"{prefix}{name}.amax_history")
        if history is not None and name not in module._modules:
            module.add_module(name, Scaling(history.size(0), getattr(module, weight).device))


_registered: dict[int, list[weakref.ref[Scaling]]] = {}


def update(key: int, recipe: DelayedScaling, group: Any, seen: str) -> None:
    """Move what was seen into the histories, and make new scales from these.

    All states of the recipe are updated at once, after one reduction over the group; those that saw
    nothing stay as they are.
    """
    alive = [state for ref in _registered.get(key, ()) if (state := ref()) is not None]
    _registered[key] = [weakref.ref(state) for state in alive]
    by_device: dict[torch.device, list[Scaling]] = {}
    for state in alive:
        by_device.setdefault(state.scale.device, []).append(state)
    with torch.no_grad():
        for states in by_device.values():
            _update(states, recipe, group, seen)


def _update(states: Sequence[Scaling], recipe: DelayedScaling, group: Any, name: str) -> None:
    columns = _COLUMNS[name]
    amax = torch.cat([getattr(state, name) for state in states])
    if group is not None and recipe.reduce_amax:
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX, group=group)
    history = torch.cat([state.amax_history[:, columns] for state in states], 1)
    scale = torch.cat([state.scale[columns] for state in states])
    seen = ~(amax < 0)
    limit = FP8_MAX[recipe.fp8_format.of("gradient" if name == BACKWARD else "activation")]
    new_history, new_scale = delayed_update(
        torch.cat((amax[None], history[1:])), scale, limit, recipe.margin, recipe.amax_compute_algo
    )
    if new_scale.shape != scale.shape:
        raise OpsgraphError(
            f"DelayedScaling: amax_compute_algo returned {tuple(new_scale.shape)}, "
            f"expected {tuple(scale.shape)}"
        )
    history = torch.where(seen, new_history, history)
    scale = torch.where(seen, new_scale, scale)
    width = columns.stop - columns.start
    for k, state in enumerate(states):
        own = slice(k * width, (k + 1) * width)
        state.amax_history[:, columns] = history[:, own]
        state.scale[columns] = scale[own]
        buffer = getattr(state, name)
        with preserve_version(buffer):
            buffer.fill_(-1.0)
