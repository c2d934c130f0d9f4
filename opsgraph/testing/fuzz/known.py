"""Faults of PyTorch and Triton that lives meet: such lives end there, and are counted apart."""

from collections.abc import Callable


def _scalars(error: BaseException) -> bool:
    """The interpreter of Triton 3.6 makes numbers of arrays that NumPy 2.4 makes none of."""
    said = "only 0-dimensional arrays can be converted to Python scalars"
    return type(error).__name__ == "InterpreterError" and said in str(error)


KNOWN: dict[str, Callable[[BaseException], bool]] = {
    "Triton's interpreter with NumPy 2.4": _scalars
}
"""By the name under which docs/reliability.md tells of a fault, whether an error is it."""


def known(error: BaseException) -> str | None:
    """The name of the fault that an error is, if it is known."""
    return next((name for name, is_it in KNOWN.items() if is_it(error)), None)
