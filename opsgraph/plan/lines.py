"""Generated functions as data: a `Line` is one call, from which its text is printed.

A line says all that is needed to do what it does: `tests/plan/test_lines.py` runs plans from their
lines alone. It holds no program and no op, for a plan outlives modules.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from ..guards.cached import cached_property
from ..guards.compiled import compiled
from .program import Argument, variable_of

Nested: TypeAlias = "Argument | tuple[Nested, ...]"
Results: TypeAlias = "str | tuple[Results, ...]"

EXPRESSIONS = {
    "bind": "{0}",
    "cast": "{0}.to({1})",
    "cast unless None": "None if {0} is None else {0}.to({1})",
    "add": "{0} + {1}",
    "clear": "{0}.clear()",
    "weigh": "{0}.weigh({rest})",
    "wgrad_by": "{0}.wgrad_by({rest})",
    "pass": "pass",
    "return": "return {every}",
}
"""What is no call of a fuser's or a quantizer's function; weight gradients that go elsewhere are
computed by the op, which is handed the product."""
_VARIABLES = frozenset({"value", "weight", "gradient", "view"})
"""Categories of arguments that read a variable. A view is another tensor of the same memory."""


class _Line(NamedTuple):
    function: str
    """As the source spells it, `RMSNormKernel.fwd`, or one of `EXPRESSIONS`."""
    arguments: tuple[Nested, ...] = ()
    results: Results = ()
    """The variables of what it returns, in that form; "_" for what nothing reads."""
    target: Any = None
    """The fuser, class of ops or quantizer whose function it is, or the function itself."""
    keywords: tuple[tuple[str, Nested], ...] = ()
    note: str = ""
    dead: tuple[str, ...] = ()
    """What is let go after it."""


class Line(_Line):
    """One statement: `results = function(arguments)`, after which some variables are let go."""

    @cached_property
    def reads(self) -> list[str]:
        """The variables that it reads, in order."""
        every = (*self.arguments, *(argument for _, argument in self.keywords))
        return [leaf.text for leaf in _leaves(every) if leaf.category in _VARIABLES]

    @cached_property
    def makes(self) -> list[str]:
        """The variables that it makes, in order."""
        return [name for name in _leaves((self.results,)) if name != "_"]

    @property
    def overwrites(self) -> list[str]:
        """What the callee may overwrite: it is handed over, and nothing reads it afterwards."""
        leaves = _leaves(self.arguments) if self.dead else ()
        return [leaf.text for leaf in leaves if leaf.moved and leaf.text in self.dead]

    def __str__(self) -> str:
        arguments = [_spelled(argument, self.dead) for argument in self.arguments]
        arguments += [f"{name}={_spelled(argument)}" for name, argument in self.keywords]
        every, form = ", ".join(arguments), EXPRESSIONS.get(self.function)
        text = f"{self.function}({every})"
        if form is not None:
            text = form.format(*arguments, every=every, rest=", ".join(arguments[1:]))
        if not self.results:
            return text
        left = _spelled(self.results)
        if isinstance(self.results, tuple) and len(self.results) > 1:
            left = left[1:-2]
        return f"{left} = {text}"

    def text(self) -> Iterator[str]:
        """Its lines of source."""
        for name in self.overwrites:  # so that the list alone has it
            yield f"    {name} = [{name}]"
        yield f"{f'    {self}':<70}  # {self.note}" if self.note else f"    {self}"
        if self.dead:
            yield f"    del {', '.join(self.dead)}"


def value(name: str) -> Argument:
    """A variable as an argument."""
    return variable_of("value", name)


def values(names: Iterable[str]) -> tuple[Argument, ...]:
    """Variables as arguments."""
    return tuple(map(value, names))


def literal(constant: Any) -> Argument:
    """A constant as an argument, which its repr spells."""
    return Argument("literal", repr(constant), value=constant)


def let_go(lines: list[Line], living: set[str]) -> None:
    """Have each of some variables let go after its last use."""
    for number, line in reversed([*enumerate(lines[:-1])]):
        if dead := living.intersection((*line.reads, *line.makes)):
            lines[number] = ending = line._replace(dead=tuple(sorted(dead)))
            ending.__dict__.update(line.__dict__)  # what it reads and makes stays
            living -= dead


def _leaves(nested: Iterable[Any]) -> list[Any]:
    leaves = []
    for item in nested:
        if type(item) is tuple:
            leaves += _leaves(item)
        else:
            leaves.append(item)
    return leaves


def _spelled(nested: Any, dead: Sequence[str] = ()) -> str:
    if type(nested) is tuple:
        return f"({''.join(f'{_spelled(item)}, ' for item in nested).strip()})"
    if isinstance(nested, str):
        return nested
    if nested.category == "view":
        return f"{nested.text}.view_as({nested.text})"
    return f"[{nested.text}]" if nested.moved and nested.text not in dead else nested.text


class Function:
    """A generated function as data; its text and itself are made when they are asked for.

    namespace: objects by what the lines call them. Without lines it returns two empty tuples.
    """

    def __init__(
        self, name: str, parameters: Sequence[str], lines: Iterable[Line], namespace: Any = None
    ) -> None:
        self.name, self.parameters, self.lines = name, (*parameters,), (*lines,)
        self.namespace: dict[str, Any] = namespace or {}

    @cached_property
    def source(self) -> str:
        """Its text; none without lines."""
        head = f"def {self.name}({', '.join(self.parameters)}):"
        text = "\n".join((head, *(text for line in self.lines for text in line.text()))) + "\n"
        return text if self.lines else ""

    @cached_property
    def call(self) -> Callable[..., Any]:
        """The function itself."""
        return compiled(self.name, self.source, self.namespace) if self.lines else lambda: ((), ())

    def __call__(self, *arguments: Any) -> Any:
        """Call it."""
        return self.call(*arguments)
