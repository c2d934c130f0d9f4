"""The state of delayed scaling: amax histories and scales, buffers of the layer that they serve.

A layer's `Scaling` is a child module, so that it is in the state dict and moves with the layer. Its
columns are the activation, the weight and the gradient. What a pass sees goes into `amax_forward`
and `amax_backward`, which are -1 where nothing was seen; `amaxes` moves it into the histories.
There is no branch on a value.

A state is made by `recipe.prepare(module)`, by loading a state dict that has its keys, when a state
dict is asked for inside the recipe's context, or else at the first call; always outside of
inference mode, or it could not be trained with.

A backward that torch.compile made is handed `amax_backward` by a graph that may not know of its
being written, or two forwards before two backwards would be an error. So that buffer is written
without a change of its version.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .. import config
from ..errors import OpsgraphError
from ..guards.torch_private import graph_task, preserve_version
from ..kernels.reference.quantize import FP32_MAX
from . import interned
from .quantizers import ROLES


def recomputing() -> bool:
    """Whether a forward runs inside a backward, as torch.utils.checkpoint has it."""
    return graph_task() != -1


class Tape:
    """Scales that a checkpointed forward used, for its recomputation."""

    def __init__(self) -> None:
        self.used: list[Tensor] = []


class _Tapes(threading.local):
    """The tapes that are running: all that record, and the innermost that replays."""

    def __init__(self) -> None:
        self.recording: tuple[Tape, ...] = ()
        self.replaying: Iterator[Tensor] | None = None


tapes = _Tapes()

_library = torch.library.Library("opsgraph", "FRAGMENT")
_library.define("snapshot(Tensor scale, int column) -> Tensor")
_library.define("seen(Tensor seen, Tensor amax, int column) -> Tensor")


def _snapshot(scale: Tensor, column: int) -> Tensor:
    if tapes.replaying is None:
        made = scale[column].clone()
    elif (found := next(tapes.replaying, None)) is not None:
        made = found
    else:
        raise OpsgraphError(
            "checkpoint_contexts: got a recomputation that takes a scale which its forward did not "
            "take, expected the same calls in both"
        )
    for tape in tapes.recording:
        tape.used.append(made)
    return made


def _snapshot_compiled(scale: Tensor, column: int) -> Tensor:
    """A copy: compilers may write where an op's result was once they have read it."""
    return _snapshot(scale, column).clone()


def _seen(seen: Tensor, amax: Tensor, column: int) -> Tensor:
    """`seen`, with an amax in one column unless the forward noted that already."""
    made = seen.clone()
    if tapes.replaying is None:
        made[column] = torch.maximum(made[column], amax)
    return made


_library.impl("snapshot", _snapshot_compiled, "CompositeExplicitAutograd")
_library.impl("seen", _seen, "CompositeExplicitAutograd")
torch.library.register_fake("opsgraph::snapshot", lambda s, _: s.new_empty(()), lib=_library)
torch.library.register_fake("opsgraph::seen", lambda s, *_: torch.empty_like(s), lib=_library)


def snapshot(scale: Tensor, column: int) -> Tensor:
    """A scale for a plan to keep: an update may come before its backward.

    Opaque to compilers, for a checkpoint around what they made to record and replay it.
    """
    if torch.compiler.is_compiling():
        made: Tensor = torch.ops.opsgraph.snapshot(scale, column)
        return made
    return _snapshot(scale, column)


class Terms(NamedTuple):
    """The part of a recipe that a state depends on: the history's length, what scales are made of.

    forward, backward: the format's largest number, divided by 2^margin.
    """

    length: int
    forward: float
    backward: float


class Served(Protocol):
    """A recipe, as far as its states know it."""

    @property
    def key(self) -> int:
        """Its number."""

    @property
    def terms(self) -> Terms:
        """What its states depend on."""


FORWARD, BACKWARD = "amax_forward", "amax_backward"
"""What is updated when a forward, or a backward, is over: the buffers with what it saw."""


_ANEW = {"scale": 1.0, "amax_forward": -1.0, "amax_backward": -1.0, "amax_history": 0.0}


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
        with torch.inference_mode(False):
            self.register_buffer("scale", torch.empty(len(ROLES), **place))
            self.register_buffer("amax_forward", torch.empty(2, **place))
            self.register_buffer("amax_backward", torch.empty(1, **place))
            self.register_buffer("amax_history", torch.empty(length, len(ROLES), **place))
        self.reset_parameters()
        self.label = ""
        """What ranks of a group call it."""
        self.noted = True
        """Whether the last call outside of a backward was recorded: one without grad is not."""
        self.late = False
        """Whether a forward was noted of which no context's end will take note: a reentrant
        checkpoint runs it in the backward, a state dict was made inside the context."""
        self.updates = self.used = 0
        """How often forward scales were updated, by now and when a forward last used them."""
        self.before: Tensor | None = None
        """The scales of activation and weight before the last update."""
        self.terms: Terms | None = None
        """Those of the recipe that it serves; None if scales came from elsewhere."""
        self.fresh = False
        """Whether it serves a recipe whose context has not opened since."""
        self.fix()

    def fix(self) -> None:
        """Copy the scales to where no update writes.

        Graphs that torch.compile made read those copies: with a checkpoint inside they read them
        again in the backward, after an update has written to the buffer.
        """
        with torch.inference_mode(False), torch.no_grad():
            self.fixed_forward, self.fixed_backward = self.scale[:2].clone(), self.scale[2:].clone()
        self.version = self.scale._version

    def reset_parameters(self, but: Collection[str] = ()) -> None:
        """Start anew, as after `to_empty`: nothing was seen, scales are 1.

        but: buffers that stay as they are.
        """
        with torch.no_grad(), preserve_version(self.amax_backward):
            for name, value in _ANEW.items():
                if name not in but:
                    self._buffers[name].fill_(value)  # type: ignore[union-attr]

    @property
    def activation(self) -> Tensor:
        """A copy of the activation's scale, fp32 `[]`."""
        return self._now(0)

    @property
    def weight(self) -> Tensor:
        """A copy of the weight's scale."""
        return self._now(1)

    @property
    def gradient(self) -> Tensor:
        """A copy of the gradient's scale."""
        return self._now(2)

    def _now(self, column: int) -> Tensor:
        """A scale, and in a checkpoint's recomputation that which its forward used.

        Without `checkpoint_contexts` that is the one before the last update, if the forward was
        before it; of an earlier one nothing is left.
        """
        if torch.compiler.is_compiling():
            fixed = self.fixed_forward if column < 2 else self.fixed_backward
            return snapshot(fixed, column % 2)
        if not recomputing():
            if self.used != self.updates and torch.is_grad_enabled():
                self.used = self.updates
        elif tapes.replaying is None and self.noted and self.used != self.updates:
            if self.before is None or self.updates - self.used > 1:
                raise OpsgraphError(
                    "DelayedScaling: got a recomputation after its forward's scales were updated "
                    "more than once, expected torch.utils.checkpoint with "
                    "context_fn=og.checkpoint_contexts, use_reentrant=False"
                )
            if column < 2:
                return snapshot(self.before, column)
        return snapshot(self.scale, column)

    @property
    def moment(self) -> int:
        """Which update made the forward scales that a call has taken."""
        again = recomputing() and not (self.noted and tapes.replaying is None)
        return self.updates if again else self.used

    def record(self, role: str, amax: Tensor, grad: bool) -> None:
        """Note an amax, fp32 `[]`, of an activation or a weight that was quantized.

        grad: whether the call was made with grad enabled; without, nothing is noted.
        """
        column = ROLES.index(role)
        if not grad:
            if self.noted and not torch.compiler.is_compiling():
                self.noted = False
            return
        with torch.no_grad():
            if torch.compiler.is_compiling():
                made = torch.ops.opsgraph.seen(self.amax_forward, amax, column)
                self.amax_forward.copy_(made)
                return
            if recomputing():
                if self.noted or tapes.replaying is not None:
                    return  # it was noted when the forward ran first
                self.late = True
            elif not self.noted and column == 0:
                self.noted = True
            seen = self.amax_forward[column]
            seen.copy_(torch.maximum(seen, amax))

    def serve(self, terms: Terms) -> None:
        """Be the state of a recipe: scales that another one made are converted."""
        if self.terms == terms:
            return
        self.resize(terms.length)
        if self.terms is not None:
            forward = terms.forward / self.terms.forward
            backward = terms.backward / self.terms.backward
            with torch.inference_mode(False), torch.no_grad():
                factor = self.scale.new_tensor([forward, forward, backward])
                never = (self.scale == 1) & (self.amax_history.amax(0) == 0)
                made = torch.where(never, self.scale, (self.scale * factor).clamp_max(FP32_MAX))
                self.scale.copy_(made)
                self.before = None if self.before is None else self.before * factor[:2]
            self.fix()
        self.terms = terms

    def resize(self, length: int) -> None:
        """Have a history of another length: the latest amaxes stay."""
        old = self.amax_history
        if old.size(0) != length:
            with torch.inference_mode(False), torch.no_grad():
                new = old.new_zeros(length, old.size(1))
                # Slot 0 is for the next amax, then come the oldest and at the end the latest.
                keep = min(length, old.size(0)) - 1
                new[length - keep :] = old[old.size(0) - keep :]
            self.amax_history = new

    def _apply(self, fn: Any, recurse: bool = True) -> Scaling:
        """Moves the buffers; their dtype stays, whatever the layer's becomes."""

        def move(t: Tensor) -> Tensor:
            moved: Tensor = fn(t)
            return moved if moved.dtype == t.dtype else t.to(moved.device)

        meta = self.scale.is_meta
        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        if meta and not self.scale.is_meta:
            self.reset_parameters()
        self.fix()
        return self

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *args: Any
    ) -> None:
        """Keys that are not given are not missing: checkpoints of plain training have none."""
        there = [name for name in _ANEW if f"{prefix}{name}" in state_dict]
        if there:  # what is there may be these very buffers
            self.reset_parameters(but=there)
        self.terms = None
        self.late = self.late or "amax_forward" in there  # of a context that has ended
        given = state_dict.get(f"{prefix}amax_history")
        if given is not None:
            self.resize(given.size(0))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, [], *args)
        with torch.inference_mode(False), torch.no_grad():
            for name in there:  # with assign=True it is the caller's tensor, of any dtype
                if self._buffers[name] is state_dict[f"{prefix}{name}"]:
                    self._buffers[name] = state_dict[f"{prefix}{name}"].float().clone()
        self.fix()


def record_gradient(seen: Tensor, amax: Tensor) -> None:
    """Note a gradient's amax, fp32 `[]`, in a layer's `amax_backward`."""
    with torch.no_grad(), preserve_version(seen):
        seen.copy_(torch.maximum(seen, amax))


def child_name(weight: str) -> str:
    """`scaling` for `weight`, `fc1_scaling` for `fc1_weight`."""
    return weight.removesuffix("weight") + "scaling"


def scaling_of(owner: nn.Module, weight: str, recipe: Served, label: str = "") -> Scaling:
    """The state for a weight, a child of the module that owns it; made if it is not there yet.

    label: what ranks of a group call it, if it was given no name.
    """
    name = child_name(weight)
    with config.lock:
        state = owner._modules.get(name)
        if not isinstance(state, Scaling):
            state = Scaling(recipe.terms.length, getattr(owner, weight).device)
            owner.add_module(name, state)
        state.label = state.label or label
        state.serve(recipe.terms)
        known = _registered.setdefault(recipe.key, [])
        if not any(ref() is state for ref in known):
            known.append(weakref.ref(state))
            state.fresh = True
    return state


_registered: dict[int, list[weakref.ref[Scaling]]] = {}


def states_of(recipe: Served) -> list[Scaling]:
    """All states of a recipe, in the order in which they were made."""
    with config.lock:
        interned.drop_forgotten(_registered)
        alive = [state for ref in _registered.get(recipe.key, ()) if (state := ref()) is not None]
        _registered[recipe.key] = [weakref.ref(state) for state in alive]
    return alive


def _scaled(module: nn.Module) -> Sequence[str]:
    """Names of a module's weights that delayed scaling serves."""
    names: Sequence[str] = getattr(module, "scaled_weights", ())
    return names


def prepare(module: nn.Module, recipe: Served) -> None:
    """Make the states of all weights in a module that the recipe serves."""
    for path, child in list(module.named_modules()):
        for name in _scaled(child):
            owner, weight = getattr(child, "home", lambda name, child=child: (child, name))(name)
            state = scaling_of(owner, weight, recipe)
            state.label = f"{path}.{child_name(name)}"


def before_loading(module: nn.Module, state_dict: Mapping[str, Any], prefix: str) -> None:
    """Make the states that a state dict holds; without them, given weights start theirs anew."""
    for weight in _scaled(module):
        name = child_name(weight)
        state, stem = module._modules.get(name), f"{prefix}{name}."
        if any(key.startswith(stem) for key in state_dict):
            if not isinstance(state, Scaling):
                history = state_dict.get(f"{stem}amax_history")
                length = 1 if history is None else history.size(0)
                module.add_module(name, Scaling(length, getattr(module, weight).device))
        elif isinstance(state, Scaling) and f"{prefix}{weight}" in state_dict:
            state.reset_parameters()
            state.fix()
