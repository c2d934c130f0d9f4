"""Modules that tell their owners, which made something of them, when they have changed.

A Sequential watches the ops that it has planned, and a change of one op makes those Sequentials
look again that hold it, and no other. A call pays nothing for it. Parameters are no business of
this file: calls read them anew, and their shapes are part of a plan's key.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial, wraps
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.hooks import RemovableHandle

from ..base import config
from ..base.errors import OpError
from .torch_private import opaque
from .validation import Checked

F = TypeVar("F", bound=Callable[..., Any])

HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
)
MODULE_ATTRIBUTES = frozenset(nn.Module().__dict__)
PRIVATE = frozenset({"_owners", "_runner", "_wgrad_queue", "_wgrad_hooks"})
"""What belongs to this object alone: no copy has it."""
_LITERALS = (bool, int, float, complex, str, bytes, type(None))


class _Serving(threading.local):
    """What an op's `forward` runs in this thread while a sequence calls the op, by the op's id."""

    def __init__(self) -> None:
        self.stages: dict[int, Callable[..., Any]] = {}


serving = _Serving()


class Owner(Protocol):
    """What watches a module."""

    def _forget(self) -> None: ...


def _same(old: Any, new: Any) -> bool:
    """Whether a value may take another's place without the owners being told."""
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        same = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
        return same and type(old) is type(new)
    # By their text, for 0.0 == -0.0.
    return old is new or (
        type(old) is type(new) and isinstance(old, _LITERALS) and repr(old) == repr(new)
    )


def mutable(value: Any) -> bool:
    """Whether a value can change in place, as far as plans are made of such values."""
    if type(value) in _LITERALS:
        return False
    if isinstance(value, tuple | frozenset):
        return any(map(mutable, value))
    return isinstance(value, list | dict | set | bytearray)


class _Leaf:
    """What a container holds, for comparison with what takes its place."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Leaf) and _same(self.value, other.value)

    __hash__ = None  # type: ignore[assignment]


def contents(value: Any) -> Any:
    """What a container holds now, as a value that does not change with the container."""
    if isinstance(value, list | tuple):
        return type(value).__name__, [contents(item) for item in value]
    if isinstance(value, dict):
        return "dict", [(contents(key), contents(item)) for key, item in value.items()]
    if isinstance(value, set | frozenset | bytearray):
        return type(value).__name__, value.copy()
    return _Leaf(value)


class _Handle(RemovableHandle):
    """A hook's handle that tells the module when the hook is removed."""

    told: Callable[[], None] | None = None

    def remove(self) -> None:
        super().remove()
        if self.told is not None:
            self.told()


def _telling(register: F) -> F:
    """A `register_*_hook` of nn.Module that tells the owners, now and when the hook goes."""

    @wraps(register)
    def told(self: Watched, *args: Any, **kwargs: Any) -> RemovableHandle:
        handle = register(self, *args, **kwargs)
        handle.__class__ = _Handle
        reference = weakref.ref(self)
        handle.told = lambda: None if (module := reference()) is None else module.touch()
        self.touch()
        return handle  # type: ignore[no-any-return]

    return told  # type: ignore[return-value]


class Watched(nn.Module):
    """A module that knows, by weak references, which owners to tell when its structure changes."""

    def watch(self, owner: Owner) -> None:
        """Have `owner._forget()` called whenever the module changes."""
        with config.lock:
            self.__dict__.setdefault("_owners", weakref.WeakSet()).add(owner)

    @partial(opaque, reason="torch.compile cannot see how ops are made")
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)

    # Dynamo puts changes off to the end of its graph, and plans are made of what is there.
    @partial(opaque, reason="torch.compile cannot see an op change")
    def touch(self) -> None:
        """Tell the owners that the module is not what it was."""
        if "_owners" in self.__dict__:
            with config.lock:
                for owner in tuple(self.__dict__["_owners"]):
                    owner._forget()

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter | nn.Module):  # nn.Module's would pass the check by
            slot = getattr(type(self), name, None)
            if isinstance(slot, Checked):
                slot.__set__(self, value)
                self.touch()
                return
        alone = "_owners" not in self.__dict__ and not torch.compiler.is_dynamo_compiling()
        if alone or (name in MODULE_ATTRIBUTES and name not in HOOKS):
            super().__setattr__(name, value)
            return
        old = self.__dict__.get(name, self._modules.get(name, _same))
        weight = name in self._parameters or isinstance(value, nn.Parameter)
        super().__setattr__(name, value)
        if weight and name not in self.__dict__:
            return  # a call sees it
        constant = name in getattr(self, "constants", ())  # a tensor counts as the one that it is
        if old is not value and (constant or not _same(old, value)):
            self.touch()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self.touch()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As nn.Module's; what appears or disappears is a change of the structure."""
        if param is not None and param.is_nested:
            raise OpError(type(self).__name__, f"a nested tensor for {name}", "a dense one")
        before = self._parameters.get(name, self)
        super().register_parameter(name, param)
        if before is self or (before is None) != (param is None):
            self.touch()
        lazy = UninitializedParameter
        if isinstance(before, lazy) and param is not None and not isinstance(param, lazy):
            self.sizes_from(name, param.shape)

    def sizes_from(self, name: str, shape: torch.Size) -> None:
        """Take sizes that were left out from a parameter that was loaded or assigned."""

    register_forward_hook = _telling(nn.Module.register_forward_hook)
    register_forward_pre_hook = _telling(nn.Module.register_forward_pre_hook)
    register_full_backward_hook = _telling(nn.Module.register_full_backward_hook)
    register_full_backward_pre_hook = _telling(nn.Module.register_full_backward_pre_hook)
    register_backward_hook = _telling(nn.Module.register_backward_hook)

    def __getstate__(self) -> dict[str, Any]:
        return own_state(self, PRIVATE)

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        for name in PRIVATE:
            replica.__dict__.pop(name, None)
        return replica


def whole(edit: F) -> F:
    """A method that edits a list of modules, and leaves it as it was if that raises half-way."""

    @wraps(edit)
    def whole_or_nothing(self: Any, *args: Any) -> Any:
        before = self._modules.copy()
        try:
            return edit(self, *args)
        except BaseException:
            self.__dict__["_modules"] = before
            raise
        finally:
            self._forget()

    return whole_or_nothing  # type: ignore[return-value]


def own_state(module: nn.Module, dropped: frozenset[str]) -> dict[str, Any]:
    """A module's state for copies, which replace parameters, children and hooks on their own."""
    return {
        key: value.copy() if key in MODULE_ATTRIBUTES and isinstance(value, dict) else value
        for key, value in module.__dict__.items()
        if key not in dropped
    }
