"""`Rejection`: why a fuser, or a backend, is not used somewhere."""

from typing import Any, NamedTuple


class _Rejection(NamedTuple):
    ops: tuple[int, ...]
    name: str
    direction: str
    reason: str


class Rejection(_Rejection):
    """Why a fuser that fits somewhere is not used there.

    backend: the fuser's; empty where the whole backend is refused. No item of the tuple.
    """

    backend: str

    def __new__(cls, *items: Any, backend: str = "") -> "Rejection":
        rejection = super().__new__(cls, *items)
        rejection.backend = backend
        return rejection
