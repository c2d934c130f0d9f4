"""The one error family: every message says where, what came and what was expected."""


class OpsgraphError(ValueError):
    """Base of all errors that opsgraph raises for a user's mistake."""


class OpError(OpsgraphError):
    """An op cannot take what it was given, e.g. `1:Linear: got width 64, expected 128`.

    Made of where, what came and what was expected. It can be pickled, and raised under
    torch.compile, where Dynamo cannot trace a call of `super().__init__`.
    """

    def __init__(self, where: str, got: str, expected: str) -> None:
        self.parts = where, got, expected
        self.args = (f"{where}: got {got}, expected {expected}",)

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return type(self), self.parts


class RegisterError(OpsgraphError):
    """A fuser's declaration is wrong, e.g. it needs a name that nobody has."""


class PlanError(OpsgraphError):
    """A sequence that cannot be planned, e.g. a channel that is read but never written."""
