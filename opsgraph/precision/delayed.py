"""Delayed scaling: the state of one weight's products, from the call that makes it on.

A `Scaling` is a child of the module that owns the weight, so that it is in the state dict and moves
with the module. Its columns are activation, weight and gradient (`ROLES`); its buffers, all fp32:

    scale          [3]          what a tensor is multiplied with before it is cast to FP8
    amax_forward   [2]          the largest magnitudes since the last update, -1 for none
    amax_backward  [1]          the same of the gradient
    amax_history   [length, 3]  those of earlier updates, the latest last; slot 0 is for the next

What happens to it, and when:

    made      By `recipe.prepare(module)`, by loading a state dict with its keys, by `state_dict()`
              inside the recipe's context, or by the first call: scales are 1, nothing was seen.
    read      A forward takes two scales, a backward works with one that its forward took.
    recorded  Calls with grad put amaxes into `amax_forward`, their backwards into `amax_backward`.
              Calls without grad leave no trace.
    updated   Amaxes become history, history makes scales, and nothing was seen (`updates`): of the
              gradient (`BACKWARD`) when the recipe's outermost context opens, of the other two
              (`FORWARD`) when it ends with grad enabled. All states of a recipe at once, on every
              rank of an amax_reduction_group with the largest amax of all (`exchange`). What saw
              nothing stays as it is.
    served    Another delayed recipe takes over: scales are converted to its terms.
    loaded    What a state dict lacks starts anew; `amax_forward` of a context that ended is `late`.
    reset     As made: after `to_empty`, and where a state dict has the weight and no state.

A checkpoint runs a forward again, inside the backward. That one reads the scales of the first: from
a tape, if `checkpoint_contexts` made one, else from `previous`, which goes back one update; beyond
that it is an error. It records nothing, unless the first ran without grad, as a reentrant
checkpoint's does: then its amaxes are late, and the next update of the gradient takes them, too.

Rules, each of which was a bug once:

- No branch on a value: no update waits for a device.
- A state is never made, nor updated, in inference mode: it could not be trained with.
- `amax_backward` is written past its version. A graph that torch.compile made saves it for its
  backward, and two forwards before two backwards would be an error.
- Reads take scales that each update makes anew and nothing writes to (`Fixed`): a plan keeps them,
  and a checkpoint inside a compiled graph reads again in the backward, when an update has written
  to `scale`. Where `scale` is another tensor, or others wrote to it, they copy that; so do those
  that another stream, a CUDA graph, a transform or a mode sees: for these it is gone, or constant.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..base import config
from ..base.errors import OpsgraphError
from ..kernels.reference.quantize import FP32_MAX, new_scales
from . import changes, interned
from .fixed import Fixed, followed_ops, version_of
from .quantizers import ROLES
from .tapes import compiled_snapshot, recomputing, snapshot, taken, tapes

FORWARD, BACKWARD = "amax_forward", "amax_backward"
"""What is updated when a forward, or a backward, is over: the buffers with what it saw."""
_ANEW = {"scale": 1.0, FORWARD: -1.0, BACKWARD: -1.0, "amax_history": 0.0}


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


class Scaling(nn.Module):
    """One weight's delayed scaling; the module's docstring says what becomes of it."""

    scale: Tensor
    amax_forward: Tensor
    amax_backward: Tensor
    amax_history: Tensor
    fixed: Tensor
    """The scales, fp32 `[3]`, to which nothing writes, for functions that Dynamo compiles: once it
    has traced one, `pinned`, all states have them after each update."""
    pinned = False
    _known: dict[Any, Any]
    """What updates need of this state and others, see `updates`."""
    label: str
    """What ranks of a group call it."""
    first: int | None
    """From what number on labels count, once ranks have exchanged this one."""
    terms: Terms | None
    """Those of the recipe that it serves; None if scales came from elsewhere."""
    fresh: bool
    """Whether no context of the recipe that it serves has opened since."""
    recorded: bool
    """Whether the last call outside of a backward was made with grad, and so recorded."""
    late: bool
    """Whether `amax_forward` holds something that no context's end will take up."""
    updates: int
    used: int
    """How often forward scales were updated, by now and when a forward last read them."""
    _previous: Any
    """What `previous` is, or where it is: a `Fixed`, and the place there."""

    def __init__(self, length: int, device: torch.device | None = None) -> None:
        super().__init__()
        place: Any = {"dtype": torch.float32, "device": device}
        with torch.inference_mode(False):
            self.register_buffer("scale", torch.empty(len(ROLES), **place))
            self.register_buffer(FORWARD, torch.empty(2, **place))
            self.register_buffer(BACKWARD, torch.empty(1, **place))
            self.register_buffer("amax_history", torch.empty(length, len(ROLES), **place))
        self.__dict__.update(  # past the module's look at each attribute
            _known={}, label="", first=None, terms=None, fresh=False, recorded=True, late=False,
            updates=0, used=0, _previous=None,
        )  # fmt: skip
        self.reset_parameters()

    @property
    def previous(self) -> Tensor | None:
        """The scales, fp32 `[3]`, before the last update of forward scales."""
        found = self._previous
        if isinstance(found, tuple):
            found = self._previous = found[0].values[found[1]]
        return found  # type: ignore[no-any-return]

    def fix(self) -> None:
        """Copy the scales to where nothing writes."""
        changes.states.changes += 1
        with torch.inference_mode(False), torch.no_grad():
            scale = self.scale
            fixed = Fixed(new_scales(1, scale.device).copy_(scale[None]))
        self.__dict__["_fixed"] = fixed, 0, scale, version_of(scale)
        if Scaling.pinned:
            self.pin()

    def pin(self) -> None:
        """Set `fixed`."""
        fixed, place, *_ = self.__dict__["_fixed"]
        self.__dict__["fixed"] = fixed.values[place]

    def __getstate__(self) -> dict[str, Any]:
        host = self.__dict__ | {"previous": self.previous}
        for name in ("fixed", "_fixed", "_known", "_previous"):
            host.pop(name, None)
        return host

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._previous = self.__dict__.pop("previous", None)
        self._known = {}
        self.fix()

    def reset_parameters(self, but: Collection[str] = ()) -> None:
        """Start anew: nothing was seen, scales are 1. but: buffers that stay as they are."""
        for name, value in _ANEW.items():
            buffer = self._buffers[name]
            if name not in but and buffer is not None:
                buffer.data.fill_(value)
        self.fix()

    # -- reading --

    @property
    def activation(self) -> Tensor:
        """The activation's scale, fp32 `[]`, to which nothing writes any more."""
        return self.read(0)

    @property
    def weight(self) -> Tensor:
        """The weight's scale."""
        return self.read(1)

    @property
    def gradient(self) -> Tensor:
        """The gradient's scale."""
        return self.read(2)

    def read(self, column: int) -> Tensor:
        """A scale by its column; in a checkpoint's recomputation that which its forward read.

        Raises OpsgraphError where that is lost.
        """
        if torch.compiler.is_compiling():
            return compiled_snapshot(self.fixed, column)
        host = self.__dict__  # past the module's look at each attribute
        if not recomputing():
            if host["used"] != host["updates"] and torch.is_grad_enabled():
                host["used"] = host["updates"]
        elif tapes.replaying is None and self.recorded and self.used != self.updates:
            if self.previous is None or self.updates - self.used > 1:
                raise OpsgraphError(
                    "DelayedScaling: got a recomputation after its forward's scales were updated "
                    "more than once, expected torch.utils.checkpoint with "
                    "context_fn=og.checkpoint_contexts, use_reentrant=False"
                )
            if column < 2:
                return snapshot(self.previous, column, (self, column))
        now: Any = self._buffers["scale"]
        fixed, place, scale, version = host["_fixed"]
        same = scale is now and version_of(now) == version and fixed.is_for_now()
        if not same or followed_ops(now):
            return snapshot(now, column, (self, column))
        return taken(fixed.views()[3 * place + column], (self, column))

    @property
    def moment(self) -> int:
        """Which update made the forward scales that a call has read."""
        again = recomputing() and not (self.recorded and tapes.replaying is None)
        return self.updates if again else self.used

    # -- recording --

    def notes(self, role: str, grad: bool) -> bool:
        """Whether the amax of an activation or a weight that was quantized is to be noted.

        grad: whether the call was made with grad enabled, which is taken down.
        """
        if not grad:
            if self.recorded and not torch.compiler.is_compiling():
                self.recorded = False
            return False
        if torch.compiler.is_compiling():
            return True
        if recomputing():
            if self.recorded or tapes.replaying is not None:
                return False  # when the forward ran first
            self.late = True
            changes.states.changes += 1
        elif not self.recorded and role == "activation":
            self.recorded = True
        return True

    # -- another recipe, another place --

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
                converted = (self.scale * factor).clamp_max(FP32_MAX)
                self.scale.copy_(torch.where(never, self.scale, converted))
                if self.previous is not None:
                    self._previous = self.previous * factor
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
        """Keys that a state dict lacks are not missing: plain training saves none."""
        loaded = [name for name in _ANEW if f"{prefix}{name}" in state_dict]
        if loaded:  # they may be these very buffers
            self.reset_parameters(but=loaded)
        self.terms = None
        self.late = self.late or FORWARD in loaded
        history = state_dict.get(f"{prefix}amax_history")
        if history is not None:
            self.resize(history.size(0))
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, [], *args)
        with torch.inference_mode(False), torch.no_grad():
            for name in loaded:  # with assign=True it is the caller's tensor, of any dtype
                if self._buffers[name] is state_dict[f"{prefix}{name}"]:
                    value = state_dict[f"{prefix}{name}"].float()
                    self._buffers[name] = value.clone(memory_format=torch.contiguous_format)
        self.fix()


# -- the states of a recipe, of a module, of a state dict --

_registered: dict[int, list[weakref.ref[Scaling]]] = {}
"""By a recipe's number its states, in the order in which they came to it."""


def child_name(weight: str) -> str:
    """`scaling` for `weight`, also if it is read transposed; `fc1_scaling` for `fc1_weight`."""
    return weight.removeprefix("transposed_").removesuffix("weight") + "scaling"


def scaling_of(owner: nn.Module, weight: str, recipe: Served, label: str = "") -> Scaling:
    """The state for a weight, a child of the module that owns it; made if there is none.

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
        if recipe.key not in _registered:
            interned.drop_forgotten(_registered)
        references = _registered.setdefault(recipe.key, [])
        if not any(reference() is state for reference in references):
            references.append(weakref.ref(state, changes.gone))
            state.fresh = True
            changes.states.changes += 1
        if Scaling.pinned:
            state.pin()
    return state


def pin_states() -> None:
    """Have all states hold `fixed` from now on, for Dynamo to read."""
    with config.lock:
        Scaling.pinned = True
        for states in map(states_of, [*_registered]):
            for state in states:
                state.pin()


def states_of(key: int) -> list[Scaling]:
    """All states of a recipe of that number, in the order in which they came to it."""
    references = _registered.get(key, [])
    states = [state for reference in references if (state := reference()) is not None]
    if len(states) < len(references):
        with config.lock:
            _registered[key] = [r for r in _registered[key] if r() is not None]
    return states


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
    """Make the states that a state dict holds; weights that come without one start theirs anew."""
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
