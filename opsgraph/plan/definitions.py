"""What variables mean that no step makes: the arguments of a plan, and their casts.

Under autocast an argument in another dtype is `weight2_stored`, and `weight2` is its cast.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from ..op import FORWARD, ROWS, STORED, Spec
from .claims import Claim, Space
from .lines import Function, Line, literal, value
from .planner import Cover
from .writer import Writer

After: TypeAlias = Callable[[Writer, Claim, Sequence[Line], bool], Sequence[Line]]
"""Makes other lines of those of a step. The last argument: whether it makes values again."""
NOTHING = Function("", lambda: ((), ()), (), ())
"""The function `prepare` of a plan without quantized weights."""


class Input(NamedTuple):
    """An argument of the forward after `ops`: x, an extra input, a weight, or a part of one."""

    name: str
    """Its variable."""
    spec: Spec | None
    """None for a parameter that the module does not have."""
    dims: int | None
    """Its dimensions inside the plan; None for as they are."""
    gradient: str | None
    """The variable of the gradient that the backward returns in its place, if it does."""
    amax: bool
    """Whether that is an amax."""


class Definitions:
    """Defines variables in both passes of a cover; knows the arguments and the specs of all."""

    prepared: tuple[Any, ...] = ()
    """Weights that are handed in quantized."""

    def __init__(self, space: Space, cover: Cover, after: Sequence[After] = ()) -> None:
        self.space, self.cover, self.program = space, cover, space.program
        self.after = after
        """What makes other lines of those of a step."""
        self.inputs = tuple(self._inputs())
        """The arguments of the forward after `ops`."""
        self.specs = {argument.name: argument.spec for argument in self.inputs}

    def _inputs(self) -> Iterator[Input]:
        program = self.program
        dims = {"x0": 2}
        for i, name, _ in program.run.inputs:
            inside = program.kinds[i].extra_spec(program.ops[i], name, program.specs[i])
            if inside is not None and ROWS in inside.shape:
                dims[program.name(name, i)] = len(inside.shape)
        for name, spec in program.arguments.items():
            amax = name in program.reported
            wanted = amax or (spec is not None and name in program.request.gradients)
            gradient = None if not wanted else "dx" if name == "x0" else f"d{name}"
            variable = name + STORED * (name in program.casts)
            yield Input(variable, spec, dims.get(name), gradient, amax)

    def spec(self, name: str) -> Spec:
        """The spec of a variable that the forward may save."""
        return self.specs.get(name) or self.program.spec(name)

    def define(self, name: str, direction: str, writer: Writer) -> Sequence[Line]:
        """The line that makes a variable in a pass, if it is defined here."""
        program = self.program
        # Activations are cast by the forward alone, which saves the cast.
        if name in program.casts and (direction == FORWARD or name not in program.activations):
            arguments = value(name + STORED), literal(program.request.compute)
            return [Line("cast", arguments, name, note="autocast")]
        return ()

    def wanted(self, name: str, direction: str) -> list[str]:
        """The copies of a quantized value that the step which makes it in a pass hands out."""
        return []

    def gradient(self, gap: int) -> list[str]:
        """The copies of the gradient at a gap that the linear layer before it reads."""
        return []

    def prepare(self) -> Function:
        """The function that quantizes the weights of a plan."""
        return NOTHING
