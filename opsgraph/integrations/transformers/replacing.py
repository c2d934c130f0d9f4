"""What stands in the place of a module's forward, until it is removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A module's own forward."""
    return type(module).forward(module, *args, **kwargs)


PLAIN = int, float, bool, str, type(None), torch.dtype, tuple
"""Of attributes that are compared by their values; of others the object is to be the same."""


class Settings(NamedTuple):
    """What a module computes by, besides the values of its parameters, when it was patched."""

    module: nn.Module
    kind: type[nn.Module]
    own: Any
    """What `forward` is in its `__dict__`."""
    names: list[str]
    values: list[Any]
    """Its plain attributes."""
    others: list[tuple[str, Any]]
    """Its other attributes, and the modules in it."""
    parameters: list[str]

    @staticmethod
    def of(module: nn.Module) -> Settings:
        """Those that a module has now. Nothing in the code of nn.Linear reads its attributes."""
        skipped = {"training", "forward", "in_features", "out_features"}
        read = {k: v for k, v in module.__dict__.items() if k[0] != "_" and k not in skipped}
        plain = {k: v for k, v in read.items() if type(v) in PLAIN}
        others = [(k, v) for k, v in read.items() if k not in plain]
        own, names = module.__dict__.get("forward"), present(module)
        others += [(k, v) for k, v in module._modules.items()]
        return Settings(module, type(module), own, [*plain], [*plain.values()], others, names)

    def hold(self) -> bool:
        """Whether they are as they were."""
        module, attributes = self.module, self.module.__dict__
        if type(module) is not self.kind or attributes.get("forward") is not self.own:
            return False
        if self.names and [*map(attributes.get, self.names)] != self.values:
            return False
        if present(module) != self.parameters:
            return False
        return not self.others or all(
            attributes.get(k) is v or module._modules.get(k) is v for k, v in self.others
        )


def present(module: nn.Module) -> list[str]:
    """Names of a module's own parameters that are there."""
    return [name for name, value in module._parameters.items() if value is not None]


class Replacing:
    """What has a forward that takes the place of a module's."""

    module: nn.Module
    forward: Callable[..., Any]

    def install(self) -> None:
        self.module.forward = self.forward

    def remove(self) -> None:
        if getattr(self.module.__dict__.get("forward"), "__self__", None) is self:
            del self.module.__dict__["forward"]
