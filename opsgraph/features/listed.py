"""nn.Sequential's list protocol, where it would return or forget something else."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from torch import nn

from ..guards.watched import whole
from .declared_ops import verify_added


class Listed(nn.Sequential):
    """A list of modules that is told of its changes; slices and sums of it are its like.

    An edit that raises half-way changes nothing.
    """

    def _forget(self) -> None:
        """Called after every change."""
        raise NotImplementedError

    def _like(self, *modules: Any) -> Any:
        """A sequence of other modules, with the same options."""
        raise NotImplementedError

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._like(OrderedDict(list(self._modules.items())[index]))
        return super().__getitem__(index)

    def __add__(self, other: nn.Sequential) -> Any:
        return self._like(*super().__add__(other))

    def __mul__(self, count: int) -> Any:
        return self._like(*super().__mul__(count))

    __rmul__ = __mul__

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if isinstance(value, nn.Module) or name in self.__dict__.get("_modules", {}):
            self._forget()

    def __delattr__(self, name: str) -> None:
        super().__delattr__(name)
        self._forget()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As nn.Module's. Raises PlanError for an op that cannot be planned."""
        verify_added(module, name)
        super().add_module(name, module)
        self._forget()

    def insert(self, index: int, module: nn.Module) -> Any:
        """As nn.Sequential's, likewise."""
        verify_added(module, str(index))
        self._insert(index, module)
        return self

    _insert = whole(nn.Sequential.insert)
    append = whole(nn.Sequential.append)
    extend = whole(nn.Sequential.extend)
    pop = whole(nn.Sequential.pop)
    __setitem__ = whole(nn.Sequential.__setitem__)
    __delitem__ = whole(nn.Sequential.__delitem__)
    __iadd__ = whole(nn.Sequential.__iadd__)
    __imul__ = whole(nn.Sequential.__imul__)
