"""What functions of ops and fusers have to return. The first results of a user's are checked.

Otherwise a bare tensor in the place of `(y, saved)` would be taken apart into its rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..base.errors import OpError

_NAMES = {"fwd": "y", "bwd": "dx"}
"""What comes first of the results of functions that return more than one."""
FUNCTIONS = ("fwd", "bwd", "dgrad", "wgrad", "again")


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, tuple | list) and not hasattr(value, "row"):
        return f"({', '.join(map(_shown, value))})"
    return f"a {type(value).__name__}" if value is not None else "None"


def _is_value(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "row")  # or quantized


def verify(result: Any, where: str, function: str, counts: Sequence[int]) -> Any:
    """The result of a function; raises OpError if it has another form.

    counts: how many values or gradients may follow y or dx.
    """
    many = " or ".join(map(str, sorted(counts)))
    if function in ("dgrad", "again"):
        right, expected = _is_value(result), "a tensor"
    elif function == "wgrad":
        right, expected = result is None or _is_value(result), "a tensor or None"
    else:
        expected = f"(y, saved), y a tensor and saved a tuple of {many}"
        if function == "bwd":
            expected = f"(dx, gradients), dx a tensor or None and gradients a tuple of {many}"
        right = isinstance(result, tuple | list) and len(result) == 2 and not _is_value(result)
        if right:
            first, rest = result
            right = _is_value(first) or (first is None and function == "bwd")
            right = right and isinstance(rest, tuple | list) and not _is_value(rest)
            right = right and len(rest) in counts
            right = right and all(value is None or _is_value(value) for value in rest)
    if not right:
        raise OpError(where, f"{_shown(result)} from {function}", expected)
    return result


class First:
    """Stands for a class or a fuser until each of its functions has returned what it should.

    From then on the function itself is there, and a call costs nothing more.
    """

    def __init__(self, target: Any, where: str) -> None:
        self.counts: dict[str, set[int]] = {name: set() for name in FUNCTIONS}
        self.widths: dict[str, set[int]] = {name: set() for name in FUNCTIONS}
        for name in FUNCTIONS:
            implementation = getattr(target, name, None)
            if implementation is not None:
                setattr(self, name, self._checked(name, implementation, where))

    def expect(self, call: Any, x: Any) -> None:
        """A call that a plan makes: how many follow y or dx. x: the spec that dx has."""
        self.counts[call.function].add(len(call.results))
        self.widths[call.function].add(x.width)

    def _checked(
        self, name: str, implementation: Callable[..., Any], where: str
    ) -> Callable[..., Any]:
        def first(*args: Any, **kwargs: Any) -> Any:
            result = verify(implementation(*args, **kwargs), where, name, tuple(self.counts[name]))
            value = result[0] if name in _NAMES and isinstance(result, tuple | list) else result
            called = _NAMES.get(name, "dx" if name == "dgrad" else "y")
            if name != "wgrad" and isinstance(value, Tensor) and value.dim() != 2:
                raise OpError(where, f"{_shown(value)} for {called} from {name}", "[rows, width]")
            widths = self.widths[name] if called == "dx" and isinstance(value, Tensor) else ()
            if widths and value.shape[1] not in widths:
                expected = f"[rows, {' or '.join(map(str, sorted(widths)))}]"
                raise OpError(where, f"{_shown(value)} for {called} from {name}", expected)
            setattr(self, name, implementation)
            return result

        return first
