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

Nested: TypeAlias = "Argument | tuple[Nested, ...]"
Results: TypeAlias = "str | tuple[Results, ...]"
_LEAF = (str, Argument)

EXPRESSIONS = {
    "bind": "{0}",
    "cast": "{0}.to({1})",
    "cast unless None": "None if {0} is None else {0}.to({1})",
    "add": "{0} + {1}",
    "clear": "{0}.clear()",
    "pass": "pass",
    "return": "return {every}",
}
"""What is no call in the source."""
_VARIABLES = frozenset({"value", "weight", "gradient", "view"})
"""Categories of arguments that read a variable. A view is another tensor of the same memory."""


class Line(NamedTuple):
    """One statement: `results = function(arguments)`, after which some variables are let go."""

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

    @property
    def reads(self) -> list[str]:
        """The variables that it reads, in order."""
        every = (*self.arguments, *(argument for _, argument in self.keywords))
        return [leaf.text for leaf in _leaves(every) if leaf.category in _VARIABLES]

    @property
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
        text = form.format(*arguments, every=every) if form else f"{self.function}({every})"
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
    return Argument("value", name)


def values(names: Iterable[str]) -> tuple[Argument, ...]:
    """Variables as arguments."""
    return tuple(map(value, names))


def literal(constant: Any) -> Argument:
    """A constant as an argument, which its repr spells."""
    return Argument("literal", repr(constant), value=constant)


def _leaves(nested: Iterable[Any]) -> list[Any]:
    leaves = []
    for item in nested:
        if isinstance(item, _LEAF):
            leaves.append(item)
        else:
            leaves += _leaves(item)
    return leaves


def _spelled(nested: Any, dead: Sequence[str] = ()) -> str:
    if isinstance(nested, str):
        return nested
    if not isinstance(nested, Argument):
        return f"({''.join(f'{_spelled(item)}, ' for item in nested).strip()})"
    if nested.category == "view":
        return f"{nested.text}.view_as({nested.text})"
    return f"[{nested.text}]" if nested.moved and nested.text not in dead else nested.text


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
                makes = {variable for line in lines for variable in line.makes}
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
        self,
        claim: Claim,
        call: Call,
        want: Iterable[str],
        first: str,
        names: Sequence[str],
        note: str = "",
    ) -> Line:
        """The line of a claim's call. want: what it is to hand out, by the names it declares.

        first: the variable of y or dx; names: those of what follows, "_" for what nothing reads.
        """
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
        keywords: tuple[tuple[str, Nested], ...] = ()
        if call.wants:
            words = tuple(claim.fuser.wants.get(word, word) for word in want)
            keywords = (("want", Argument("literal", repr(words), value=words)),)
        results: Results = first, tuple(names) if set(names) - {"_"} else "_"
        if call.function in ("again", "dgrad", "wgrad"):  # they return one thing
            results = names[0] if call.function == "wgrad" else first
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
        every: set[str] = set()
        for number, line in enumerate(self.lines):
            makes = line.makes
            every.update(makes)
            last |= dict.fromkeys((*line.reads, *makes), number)
        dying: dict[int, list[str]] = {}
        for variable in sorted(every.difference(held)):
            dying.setdefault(last[variable], []).append(variable)
        dying.pop(len(self.lines) - 1, None)
        for number, dead in dying.items():
            self.lines[number] = self.lines[number]._replace(dead=tuple(dead))
        head = f"def {name}({', '.join(self.parameters)}):"
        source = "\n".join((head, *(text for line in self.lines for text in line.text()))) + "\n"
        call = compiled(name, source, self.namespace)
        return Function(source, call, tuple(self.parameters), tuple(self.lines))
