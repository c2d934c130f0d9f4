"""Kernel modules that are imported at their first use, so that importing opsgraph stays cheap."""

import importlib
from typing import Any


class Lazy:
    """Stands for a module of `opsgraph.kernels`; keeps attributes once they were asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        module = importlib.import_module(f".{self._name}", __package__)
        value = getattr(module, attribute)
        setattr(self, attribute, value)
        return value
