"""The one error family: every message says where, what came and what was expected."""

from typing import TYPE_CHECKING


class OpsgraphError(ValueError):
    """Base of all errors that opsgraph raises for a user's mistake."""


class OpError(OpsgraphError):
    """An op cannot take what it was given, e.g. `1:Linear: got width 64, expected 128`.

    Its `args` are where, what came and what was expected. It can be pickled, and raised under
    torch.compile. Dynamo reports the args of an error that it traced. Some versions lose them where
    the class has an `__init__`, so this one has none; others add lines of their own to the first.
    """

    if TYPE_CHECKING:

        def __init__(self, where: str, got: str, expected: str) -> None: ...

    def __str__(self) -> str:
        where, got, expected = self.args
        where, newline, more = where.partition("\n")
        return f"{where}: got {got}, expected {expected}{newline}{more}"


class RegisterError(OpsgraphError):
    """A fuser's declaration is wrong, e.g. it needs a name that no op in its pattern has."""


class PlanError(OpsgraphError):
    """A sequence that cannot be planned, e.g. a channel that is read but never written."""
