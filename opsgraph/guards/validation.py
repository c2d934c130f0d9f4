"""Checks of constructors' arguments: each returns the value as plain Python has it.

NumPy's numbers and tensors of one element are taken as the numbers that they are. Anything else
raises OpError, which names the op, what came and what was expected.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from difflib import get_close_matches
from math import isfinite
from numbers import Integral, Real
from operator import index
from typing import TYPE_CHECKING, Any

import torch
from torch import SymInt, Tensor, nn

from ..base.errors import OpError, PlanError

TRAINED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""The dtypes of parameters."""
_TRAINED = ", ".join(str(dtype) for dtype in TRAINED)


def shown(value: Any, most: int = 80) -> str:
    """A value in an error, on one line."""
    if isinstance(value, Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    text = " ".join(repr(value).split())
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _plain(who: str, name: str, value: Any) -> Any:
    """The one element of a tensor, or of a NumPy scalar or array; other values as they are."""
    if isinstance(value, Tensor):
        if value.requires_grad:  # the gradient would be lost
            expected = "a constant, for it gets no gradient: detach() it"
            raise OpError(who, f"{name} as a tensor that requires a gradient", expected)
        return value if value.is_meta or value.numel() != 1 else value.item()
    return value.item() if getattr(value, "size", 0) == 1 and hasattr(value, "item") else value


def number(
    who: str,
    name: str,
    value: Any,
    expected: str = "a number",
    allowed: Callable[[float], bool] = lambda value: True,
) -> float:
    """A float for which `allowed` is true; `expected` says so in words."""
    plain = _plain(who, name, value)
    try:
        if not isinstance(plain, bool) and isinstance(plain, Real) and allowed(float(plain)):
            return float(plain)
    except OverflowError:  # of a whole number that no float holds
        pass
    raise OpError(who, f"{name}={shown(value)}", expected)


def finite(who: str, name: str, value: Any) -> float:
    """A finite number."""
    return number(who, name, value, "a finite number", isfinite)


def positive(who: str, name: str, value: Any) -> float:
    """A finite number above 0."""
    return number(who, name, value, "a finite number above 0", lambda v: v > 0 and isfinite(v))


def epsilon(who: str, name: str, value: Any) -> float:
    """What is added below a square root: finite, and not negative."""
    return number(who, name, value, "a finite number, 0 or above", lambda v: v >= 0 and isfinite(v))


def whole(who: str, name: str, value: Any, least: int = 1, other: str = "") -> int:
    """A whole number, at least `least`. other: what else would do, for the message."""
    plain = _plain(who, name, value)
    if isinstance(plain, bool) or not isinstance(plain, Integral | SymInt) or plain < least:
        raise OpError(who, f"{name}={shown(value)}", f"a whole number, {least} or above{other}")
    return int(plain)


def size(who: str, name: str, value: Any, least: int = 1) -> Any:
    """A size, or None where it is left out."""
    return None if value is None else whole(who, name, value, least, ", or None")


def features(who: str, name: str, value: Any) -> Any:
    """A width, which may be 0, or None where it is left out."""
    return size(who, name, value, 0)


def flag(who: str, name: str, value: Any) -> bool:
    """True or False; 1 and 0 will do."""
    plain = _plain(who, name, value)
    if not isinstance(plain, Integral) or plain not in (0, 1):
        raise OpError(who, f"{name}={shown(value)}", "True or False")
    return bool(plain)


def choice(who: str, name: str, value: Any, known: Collection[str | None]) -> Any:
    """One of some names."""
    if not isinstance(value, str | None) or value not in known:
        *most, last = map(repr, known)
        expected = f"{', '.join(most)} or {last}" if most else last
        raise OpError(who, f"{name}={shown(value)}", expected)
    return value


def text(who: str, name: str, value: Any) -> str | None:
    """A name, or None."""
    if value is not None and not isinstance(value, str):
        raise OpError(who, f"{name}={shown(value)}", "a str or None")
    return value


def integers(who: str, name: str, value: Any, count: int) -> list[int]:
    """So many integers of 64 bits, one for each group, in no tensor."""
    expected = f"{count} integers, one for each group: a tensor or a list"
    if isinstance(value, str | bytes) or not hasattr(value, "__iter__"):
        raise OpError(who, f"{name} {value!r}", expected)
    listed = list(value)
    if not all(map(_is_index, listed)):
        raise OpError(who, f"{name} {listed}", expected)
    whole_numbers = [index(item) for item in listed]
    if len(listed) != count or not all(-(2**63) <= item < 2**63 for item in whole_numbers):
        raise OpError(who, f"{len(listed)} {name} {listed}", expected)
    return whole_numbers


def _is_index(value: Any) -> bool:
    # Dynamo knows that a symbol of its is an int, and not which attributes it has.
    return type(value) is not bool and (isinstance(value, int) or hasattr(value, "__index__"))


def names(who: str, name: str, value: Any) -> tuple[str, ...]:
    """A collection of names, sorted."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise OpError(who, f"{name}={shown(value)}", "a list of names")
    listed = tuple(value)
    if not all(isinstance(item, str) for item in listed):
        raise OpError(who, f"{name}={shown(value)}", "a list of names")
    return tuple(sorted(listed))


def listed(who: str, name: str, value: Any) -> tuple[str, ...] | None:
    """A collection of names in their order, or None."""
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Collection):
        one = value if isinstance(value, str) else "name"
        raise PlanError(
            f'{who}: got {name}={shown(value)}, expected a tuple of names: {name}=("{one}",)'
        )
    return tuple(value)


def known(
    who: str,
    what: str,
    names: Collection[Any] | None,
    there: Collection[str],
    expected: str = "some of",
) -> None:
    """Raises PlanError for a name that is not there, with the nearest that is."""
    for name in names or ():
        if not isinstance(name, str) or name not in there:
            near = get_close_matches(str(name), there, 1)
            nearest = f" (the nearest is {near[0]!r})" if near else ""
            all_there = f"{', '.join(there)}{nearest}"
            raise PlanError(f"{who}: got {what} {name!r}, expected {expected} {all_there}")


def function(who: str, name: str, value: Any) -> Any:
    """Something to call, or None."""
    if value is not None and not callable(value):
        raise OpError(who, f"{name}={shown(value)}", "a function or None")
    return value


def module(who: str, value: Any) -> Any:
    """A module."""
    if not isinstance(value, nn.Module):
        got = f"the class {value.__name__}" if isinstance(value, type) else shown(value)
        raise OpError(who, got, "a torch.nn.Module")
    return value


def mapping(who: str, name: str, value: Any) -> Any:
    """A dict, or what is like one."""
    if not isinstance(value, Mapping):
        raise OpError(who, f"{name}={shown(value)}", "a dict")
    return value


def place(who: str, device: Any, dtype: Any) -> None:
    """Where parameters go: a device and a float dtype, or None for the default."""
    if dtype is not None and dtype not in TRAINED:
        raise OpError(who, f"dtype={dtype!r}", f"a float dtype of torch or None: {_TRAINED}")
    try:
        torch.device(device) if device is not None else None
    except (RuntimeError, TypeError) as error:
        raise OpError(who, f"device={device!r}", "a device of torch or None") from error


def computed(where: str, what: str, dtype: torch.dtype) -> None:
    """Raises OpError for a dtype that nothing computes in; what: "other ", or nothing."""
    if dtype not in TRAINED:
        expected = f"one of {_TRAINED}" if dtype.is_floating_point else "a float"
        raise OpError(where, f"{what}dtype {dtype}", expected)


class Checked:
    """An attribute of an op that a check of this file sees whenever it is set.

    Reading it costs nothing: the value is in the op's `__dict__`, where Python looks for it.
    """

    def __init__(self, check: Callable[[str, str, Any], Any]) -> None:
        self.check, self.name = check, ""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    if TYPE_CHECKING:

        def __get__(self, op: Any, kind: Any = None) -> Any: ...

    def __set__(self, op: Any, value: Any) -> None:
        op.__dict__[self.name] = self.check(type(op).__name__, self.name, value)


class Fixed(Checked):
    """An attribute that only the constructor takes. instead: what to use later."""

    def __init__(self, instead: str) -> None:
        self.instead, self.name = instead, ""

    def __set__(self, op: Any, value: Any) -> None:
        if op.__dict__.setdefault(self.name, value) != value:
            raise OpError(type(op).__name__, f"{self.name} after construction", self.instead)
