"""What else may become of a module: copies, state dicts, scales, hooks, and fusers registered."""

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ... import ops
from ...base.errors import OpsgraphError
from ...fuser import register
from ...fuser.registry import Handle
from ...precision import recipe
from ...precision.delayed import Scaling as DelayedState
from .changes import Changes, Impossible
from .compare import Wrong
from .own import FUSERS, Scaling

RECIPES: dict[str, Callable[[], Any]] = {
    "current": recipe.Float8CurrentScaling,
    "delayed": recipe.DelayedScaling,
    "blocks": recipe.Float8BlockScaling,
    "mxfp8": recipe.MXFP8BlockScaling,
    "rows": lambda: recipe.Float8CurrentScaling(row_wise=True),
    "exact backward": lambda: recipe.Float8CurrentScaling(backward_override="high_precision"),
    "dequantized": lambda: recipe.Float8CurrentScaling(backward_override="dequantized"),
}


class States(Changes):
    """`Changes`, and what does not concern one op or parameter."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.handles: list[Handle] = []
        self.hooks: list[Any] = []
        self.original: tuple[nn.Module, dict[str, Any]] | None = None
        """The module of which this one is the latest copy, and what it held then."""
        self.heard = 0
        """How often a hook was called."""
        self.recipes = {name: make() for name, make in RECIPES.items()}

    # -- copies --

    def copy(self, shallow: bool = False) -> None:
        """Go on with a deepcopy, or with a `copy.copy`."""
        self._copied()
        if shallow and self.module.queued_backward_dw():
            raise Impossible  # modules inside are the same, and so are their gradients that wait
        old = self.module
        self.module = copy.copy(old) if shallow else copy.deepcopy(old)
        self.original = old, self._tables(old)

    def pickle(self) -> None:
        """Go on with what torch.save and torch.load make of the module."""
        self._copied()
        buffer = io.BytesIO()
        torch.save(self.module, buffer)
        buffer.seek(0)
        self.module = torch.load(buffer, weights_only=False)

    def average(self, seed: int) -> None:
        """Go on with a moving average of the module and of itself with other parameters."""
        self._copied()
        self._changed()
        if not list(self.module.parameters()):
            raise Impossible  # PyTorch takes no mean of nothing
        averaged = AveragedModel(self.module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        averaged.update_parameters(self.module)
        with torch.no_grad():
            for k, parameter in enumerate(self.module.parameters()):
                parameter.copy_(self._values(parameter.shape, seed + k))
        averaged.update_parameters(self.module)
        self.module = averaged.module

    def load(self, seed: int, assign: bool, foreign: bool = False) -> None:
        """Load a state dict of other values; foreign: with the keys of TransformerEngine's ops."""
        self._changed(data=assign)
        state = {
            name: self._values(p.shape, seed + k)
            for k, (name, p) in enumerate(self.module.named_parameters(remove_duplicate=False))
        }
        for path, module in self.module.named_modules(remove_duplicate=False):
            if foreign and isinstance(module, ops.Linear):
                for inner, name in enumerate(("weight", "bias")):
                    if (value := state.pop(f"{path}.{name}", None)) is not None:
                        state[f"{path}.basic_ops.{inner}.{name}"] = value
                    state[f"{path}.basic_ops.{inner}._extra_state"] = torch.empty(0)
        self.module.load_state_dict(state, assign=assign)

    # -- scales --

    def prepare(self, name: str) -> None:
        """Have a recipe make its scales."""
        self.recipes[name].prepare(self.module)
        self.behind = True

    def resume(self) -> None:
        """Go on with a copy that has loaded the state dict, without gradients the same bits."""
        self._copied()
        state = io.BytesIO()
        torch.save(self.module.state_dict(), state)
        state.seek(0)
        other = copy.deepcopy(self.module)
        for module in other.modules():
            if isinstance(module, DelayedState):
                module.reset_parameters()
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        other.load_state_dict(torch.load(state))
        for (key, one), two in zip(
            self.module.state_dict().items(), other.state_dict().values(), strict=True
        ):
            if not torch.equal(one, two):
                raise Wrong(f"{key} was not loaded")
        self.module = other

    def reset(self) -> None:
        """Have scales start anew."""
        states = [m for m in self.module.modules() if isinstance(m, DelayedState)]
        if not states:
            raise Impossible
        self._changed()
        for state in states:
            state.reset_parameters()

    # -- hooks and fusers --

    def hook(self, index: int) -> None:
        """Register a forward hook, which has to be called: the op is run as a module."""
        self._changed(values=False)
        op = self._at(index)
        if op is self.module:
            raise Impossible
        self.hooks.append((op, op.register_forward_hook(self._hear)))

    def unhook(self) -> None:
        """Remove the latest one."""
        self._changed(values=False)
        if not self.hooks:
            raise Impossible
        self.hooks.pop()[1].remove()

    def register(self) -> None:
        """Register a fuser of one's own."""
        self._changed(values=False)
        self.handles.append(register(Scaling))

    def fuse(self, kind: str) -> None:
        """Begin with the ops that a fuser of one's own is for, and register it."""
        fuser, sources = FUSERS[kind]
        for source in reversed(sources):
            self.insert(0, source.format(self.width))
        known = self._shown()
        self.handles.append(register(fuser))
        if known and fuser.__name__ not in (shown := self._shown()):
            raise Wrong(f"a plan knows nothing of {fuser.__name__}: {shown}")

    def unregister(self) -> None:
        """Take the latest one out."""
        self._changed(values=False)
        if not self.handles:
            raise Impossible
        self.handles.pop().unregister()

    def end(self) -> None:
        """Take out what was registered."""
        while self.handles:
            self.handles.pop().unregister()

    # -- how --

    def _shown(self) -> str:
        """The plan of a call in training, or nothing where the ops do not fit."""
        try:
            return str(self.module.plan(x=self._random((4, self.width), 0)))
        except OpsgraphError:
            return ""

    @staticmethod
    def _tables(module: nn.Module) -> dict[str, Any]:
        return {**module._parameters, **module._modules}

    def _check_original(self) -> None:
        """What became of a copy since has to leave the module as it was of which it is one."""
        if self.original is not None:
            old, before = self.original
            now = self._tables(old)
            if now.keys() != before.keys() or any(now[k] is not before[k] for k in now):
                raise Wrong("a copy shares its parameters or modules with the original")

    def _copied(self) -> None:
        while self.hooks:  # a copy's hooks would be this life's
            self.unhook()

    def _hear(self, *_: Any) -> None:
        self.heard += 1
