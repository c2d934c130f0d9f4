"""Generated functions as data: a `Line` is one call, from which its text is printed.

`Writer` collects the lines of one function. It gives objects names in the source, and has every
variable defined that a line reads. Lines hold no program and no op: a plan outlives modules.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

from ..guards.results import First
from ..op import BACKWARD, STORED
from ..op.functions import backward_functions
from .claims import Call, Claim, Space
from .compiled import base_namespace, compiled
from .names import free
from .program import Argument

Given: TypeAlias = "Argument | tuple[Given, ...]"
Results: TypeAlias = "str | tuple[Results, ...]"

EXPRESSIONS = {
    "bind": "{0}",
    "cast": "{0}.to({1})",
    "cast unless None": "None if {0} is None else {0}.to({1})",
    "add": "{0} + {1}",
    "clear": "{0}.clear()",
    "pass": "pass",
}
"""What is no call in the source."""
_VARIABLES = frozenset({"value", "weight", "gradient", "view"})
"""Categories of arguments that read a variable. A view is another tensor of the same memory."""


class Line(NamedTuple):
    """One statement: `results = function(arguments)`, after which some variables are let go."""

    function: str
    """As the source spells it, `RMSNormKernel.fwd`; "return", or one of `EXPRESSIONS`."""
    arguments: tuple[Given, ...] = ()
    results: Results = ()
    """The variables of what it returns, in that form; "_" for what nothing reads."""
    target: Any = None
    """The fuser, class of ops or quantizer whose function it is, or the function itself."""
    keywords: tuple[tuple[str, Given], ...] = ()
    note: str = ""
    dead: tuple[str, ...] = ()
    """What is let go after it. An argument that is `moved` and dead is the callee's alone, which
    may overwrite it."""

    @property
    def reads(self) -> list[str]:
        """Its variables on the right, in order."""
        given = [*_flat(self.arguments), *_flat(value for _, value in self.keywords)]
        return [a.text for a in given if a.category in _VARIABLES]

    @property
    def makes(self) -> list[str]:
        """Its variables on the left, in order."""
        return [name for name in _names(self.results) if name != "_"]

    def __str__(self) -> str:
        given = [self._spelled(argument) for argument in self.arguments]
        given += [f"{name}={self._spelled(value)}" for name, value in self.keywords]
        if self.function == "return":
            return f"return {', '.join(given)}"
        expression = EXPRESSIONS.get(self.function)
        right = expression.format(*given) if expression else f"{self.function}({', '.join(given)})"
        if not self.results:
            return right
        left = self.results if isinstance(self.results, str) else _tuple(self.results)[1:-1]
        return f"{left.removesuffix(',') if len(self.results) > 1 else left} = {right}"

    def _spelled(self, given: Given) -> str:
        if not isinstance(given, Argument):
            return f"({_commas(map(self._spelled, given))})"
        if given.category == "view":
            return f"{given.text}.view_as({given.text})"
        return f"[{given.text}]" if given.moved and given.text not in self.dead else given.text

    def text(self) -> Iterator[str]:
        """Its lines of source."""
        for given in self.arguments:  # so that the list alone has it
            if isinstance(given, Argument) and given.moved and given.text in self.dead:
                yield f"    {given.text} = [{given.text}]"
        yield f"{f'    {self}':<70}  # {self.note}" if self.note else f"    {self}"
        if self.dead:
            yield f"    del {', '.join(self.dead)}"


def _flat(given: Iterable[Given]) -> Iterator[Argument]:
    for item in given:
        if isinstance(item, Argument):
            yield item
        else:
            yield from _flat(item)


def _names(results: Results) -> Iterator[str]:
    if isinstance(results, str):
        yield results
    else:
        for item in results:
            yield from _names(item)


def _commas(items: Iterable[str]) -> str:
    return "".join(f"{item}, " for item in items).strip()


def _tuple(results: Results) -> str:
    return results if isinstance(results, str) else f"({_commas(map(_tuple, results))})"


class Function(NamedTuple):
    """A generated function: its text, itself, and what it does as data."""

    source: str
    call: Any
    parameters: tuple[str, ...]
    lines: tuple[Line, ...]


class Writer:
    """Writes one function. `free`: the variables that it reads and that nothing defines, in order.

    A subclass says in `define` what defines a variable.
    """

    def __init__(self, space: Space, parameters: Sequence[str]) -> None:
        self.space, self.program = space, space.program
        self.parameters = parameters
        self.lines: list[Line] = []
        self.available = set(parameters)
        self.free: dict[str, None] = {}
        self.namespace = base_namespace()
        self._bound: dict[str, Any] = {}

    def define(self, name: str) -> Sequence[Line]:
        """The lines that make a variable; none: it is free."""
        raise NotImplementedError

    def add(self, *lines: Line) -> None:
        """Append lines, each after what defines its variables."""
        for line in lines:
            self.need(line.reads)
            self.lines.append(line)
            self.available.update(line.makes)

    def need(self, names: Iterable[str]) -> None:
        """Have variables available. On a stack of its own, for what defines them may go deep."""
        waiting: list[str | Sequence[Line]] = [*reversed([*names])]
        while waiting:
            name = waiting.pop()
            if not isinstance(name, str):
                self.lines += name
            elif name not in self.available:
                self.available.add(name)
                lines = self.define(name)
                if not lines:
                    self.free[name] = None
                makes = {made for line in lines for made in line.makes}
                self.available |= makes
                waiting.append(lines)
                reads = [read for line in lines for read in line.reads if read not in makes]
                waiting += reversed(reads)

    # -- what objects are called --

    def bind(self, name: str, target: Any) -> str:
        """What an object is called in the source; a number is added where two share a name."""
        for text in free(name, self.program.roots):
            if self._bound.setdefault(text, target) is target:
                self.namespace.setdefault(text, target)
                return text
        raise AssertionError

    def quantizer(self, quantizer: Any) -> tuple[str, Any]:
        """A quantizer's name in the source, and the first one that is equal."""
        same = (known for known in self._bound.values() if type(known) is type(quantizer))
        target = next((known for known in same if known == quantizer), quantizer)
        return self.bind(quantizer.storage.name.upper(), target), target

    def _name_of(self, claim: Claim, target: Any) -> str:
        """A fuser's name in the source. The first results of a user's are checked."""
        name = self.bind(claim.fuser.name, target)
        module = target.__module__ if claim.is_reference else type(target).__module__
        if self.namespace[name] is target and not module.startswith("opsgraph."):
            where = self.program.labels[claim.start] if claim.is_reference else claim.label
            self.namespace[name] = First(target, where)
        return name

    def call(
        self, claim: Claim, call: Call, want: Iterable[str], results: Results, note: str = ""
    ) -> Line:
        """The line of a claim's call. want: what it is to hand out, by the names it declares."""
        target: Any = claim.fuser.kind if claim.is_reference else claim.fuser  # type: ignore[attr-defined]
        name = self._name_of(claim, target)
        if isinstance(bound := self.namespace[name], First):
            bound.counts[call.function].add(len(call.results))
        spelled, arguments = f"{name}.{call.function}", tuple(map(self._named, call.arguments))
        function = getattr(target, call.function)
        if claim.is_reference and claim.direction == BACKWARD:
            given, function = function, backward_functions(target)[call.function]
            if function is not given:  # derived from fwd
                suffix = "" if call.function == "bwd" else f"_{call.function}"
                spelled = self.bind(f"{target.__name__}_vjp{suffix}", function)
                target = function
        if call.function == "wgrad":
            product = Argument("object", spelled, value=function)
            spelled, arguments = self._weighed(claim, call, product, arguments)
        keywords: tuple[tuple[str, Given], ...] = ()
        if call.wants:
            words = tuple(claim.fuser.wants.get(word, word) for word in want)
            keywords = (("want", Argument("literal", repr(words), value=words)),)
        return Line(spelled, arguments, results, target, keywords, note)

    def _weighed(
        self, claim: Claim, call: Call, product: Argument, arguments: tuple[Argument, ...]
    ) -> tuple[str, tuple[Argument, ...]]:
        """The call of a weight gradient's product: by the op, if the gradient goes elsewhere."""
        gradient, program = call.results[0], self.program
        (i,) = (i for i in claim.ops if gradient in program.gradient_names(i))
        op, stored = program.resolve(i, ""), program.resolve(i, "weight" + STORED)
        if gradient in program.elsewhere.added and stored and not claim.is_reference:
            return f"{op.text}.wgrad_by", (product, *arguments, stored)  # type: ignore[union-attr]
        if gradient in program.elsewhere.waits:
            return f"{op.text}.weigh", (product, *arguments)  # type: ignore[union-attr]
        return product.text, arguments

    def _named(self, argument: Argument) -> Argument:
        """An argument with the text that stands for it in the source."""
        if argument.category != "object":
            return argument
        return argument._replace(text=self.bind(argument.text.strip("<>"), argument.value))

    # -- the end --

    def finish(
        self, name: str, *results: tuple[Argument, ...], held: Iterable[str] = ()
    ) -> Function:
        """The function, which returns `results`. Each variable is let go after its last use.

        held: variables that the caller holds in any case.
        """
        self.add(Line("return", results))
        last: dict[str, int] = {}
        made: set[str] = set()
        for number, line in enumerate(self.lines):
            makes = line.makes
            made.update(makes)
            last |= dict.fromkeys((*line.reads, *makes), number)
        dying: dict[int, list[str]] = {}
        for variable in sorted(made.difference(held)):
            dying.setdefault(last[variable], []).append(variable)
        dying.pop(len(self.lines) - 1, None)
        lines = [line._replace(dead=tuple(dying.get(k, ()))) for k, line in enumerate(self.lines)]
        head = f"def {name}({', '.join(self.parameters)}):"
        source = "\n".join((head, *(text for line in lines for text in line.text()))) + "\n"
        call = compiled(name, source, self.namespace)
        return Function(source, call, tuple(self.parameters), tuple(lines))
