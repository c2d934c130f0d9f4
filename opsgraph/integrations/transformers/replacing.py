"""What stands in the place of a module's forward, until it is removed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A module's own forward."""
    return type(module).forward(module, *args, **kwargs)


class Replacing:
    """What has a forward that takes the place of a module's."""

    module: nn.Module
    forward: Callable[..., Any]

    def install(self) -> None:
        self.module.forward = self.forward

    def remove(self) -> None:
        if getattr(self.module.__dict__.get("forward"), "__self__", None) is self:
            del self.module.__dict__["forward"]
