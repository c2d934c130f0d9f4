"""Constants of ops: attributes whose values stand in generated source, as literals or by name.

A literal is written only where reading it gives the same value of the same type. Anything else
is handed to the source under a name. A value that could change unnoticed is refused. Lists, sets
and dicts are not: they are looked into at each call, see `watched`.
"""

import sys
from dataclasses import fields, is_dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import OpError

_EXACT = frozenset({bool, str, bytes, type(None), type(...)}) | frozenset(
    {torch.dtype, torch.layout, torch.memory_format}
)
_PLAIN = _EXACT | {int, float}
_LONGEST = 1000  # bits of an int: Python refuses to read far longer ones


def plain(value: Any) -> Any:
    """NumPy's numbers, and tensors of no dimension, as Python's; also inside tuples."""
    if type(value) in _PLAIN:
        return value
    if type(value) is tuple:
        return tuple(map(plain, value))
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic | numpy.ndarray):
        return value.item() if value.shape == () else value
    if isinstance(value, Tensor) and not value.dim() and not value.requires_grad:
        return value if value.is_meta else value.item()
    return value


def verify(value: Any, where: str, name: str) -> None:
    """Raises OpError for a value that could change unnoticed."""
    if isinstance(value, tuple | list | set | dict):  # in-place changes of these are noticed
        items = [*value, *value.values()] if isinstance(value, dict) else value
        for item in items:
            verify(item, where, name)
        return
    if isinstance(value, bytearray):
        return
    if isinstance(value, Tensor | nn.Module):
        expected = "a parameter or buffer, which is no constant"
    else:
        try:
            hash(value)
            return
        except TypeError:
            expected = "a constant that cannot change unnoticed"
    shown = " ".join(repr(value).split())[:60]
    raise OpError(where, f"{name} = {shown}, a {type(value).__name__}", expected)


def literal(value: Any) -> str | None:
    """Source text that stands for a value exactly, or None if it has none."""
    if type(value) is tuple:
        items = [literal(item) for item in value]
        if None in items:
            return None
        return f"({', '.join(map(str, items))}{',' * (len(items) == 1)})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if type(value) is int:
        return repr(value) if value.bit_length() < _LONGEST else None
    if type(value) is complex:
        finite = isfinite(value.real) and isfinite(value.imag)
        return f"complex({value.real!r}, {value.imag!r})" if finite else None
    return repr(value) if type(value) is float or type(value) in _EXACT else None


def called(value: Any) -> str:
    """What to call a value that has no literal."""
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) else type(value).__name__.lower()


def key(value: Any) -> Any:
    """A value as part of a plan's key: equal for those alone that may share a plan.

    `1`, `1.0` and `True` may not, nor `0.0` and `-0.0`; nan may with itself. Raises TypeError for
    what cannot be compared.
    """
    kind = type(value)
    if kind is int or kind in _EXACT:
        return kind, value
    if kind is float:
        return kind, value.hex()
    if kind is complex:
        return kind, value.real.hex(), value.imag.hex()
    if isinstance(value, tuple | list):
        return kind, tuple(map(key, value))
    if isinstance(value, frozenset):
        return kind, frozenset(map(key, value))
    if isinstance(value, dict):
        return kind, tuple((key(k), key(item)) for k, item in value.items())
    if isinstance(value, Tensor | nn.Module):
        raise TypeError
    hash(value)
    if is_dataclass(value) and not isinstance(value, type):
        return kind, value, tuple(key(getattr(value, f.name)) for f in fields(value))
    return kind, value
