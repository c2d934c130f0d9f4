"""The one error family: every message says where, what came and what was expected."""

from typing import TYPE_CHECKING


class OpsgraphError(ValueError):
    """Base of all errors that opsgraph raises for a user's mistake."""


class OpError(OpsgraphError):
    """An op cannot take what it was given, e.g. `1:Linear: got width 64, expected 128`.

    Made of where, what came and what was expected, which are its `args`. It can be pickled, and
    raised under torch.compile: of a traced error Dynamo reports the args, which it loses in some
    versions where the class has an `__init__`; to the first of another's it adds its own lines.
    """

    if TYPE_CHECKING:

        def __init__(self, where: str, got: str, expected: str) -> None: ...

    def __str__(self) -> str:
        where, got, expected = self.args
        where, newline, more = where.partition("\n")
        return f"{where}: got {got}, expected {expected}{newline}{more}"


class RegisterError(OpsgraphError):
    """A fuser's declaration is wrong, e.g. it needs a name that nobody has."""


class PlanError(OpsgraphError):
    """A sequence that cannot be planned, e.g. a channel that is read but never written."""
