"""Faults of PyTorch that lives meet: such lives end there, and are counted apart."""

from collections.abc import Callable

KNOWN: dict[str, Callable[[BaseException], bool]] = {}
"""By the name under which docs/reliability.md tells of a fault, whether an error is it."""


def known(error: BaseException) -> str | None:
    """The name of the fault that an error is, if it is known."""
    return next((name for name, is_it in KNOWN.items() if is_it(error)), None)
