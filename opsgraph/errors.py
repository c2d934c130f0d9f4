"""The one error family: every message says where, what came and what was expected."""


class OpsgraphError(ValueError):
    """Base of all errors that opsgraph raises for a user's mistake."""


class OpError(OpsgraphError):
    """An op cannot take what it was given, e.g. `1:Linear: got width 64, expected 128`."""

    def __init__(self, where: str, got: str, expected: str) -> None:
        super().__init__(f"{where}: got {got}, expected {expected}")


class RegisterError(OpsgraphError):
    """A fuser's declaration is wrong, e.g. it needs a name that nobody has."""


class PlanError(OpsgraphError):
    """A sequence that cannot be planned, e.g. a channel that is read but never written."""
