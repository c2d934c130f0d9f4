"""Runs a line of a generated function from its data, as the function would."""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from ..plan.lines import Line
from ..plan.program import Argument

_EXPRESSIONS: dict[str, Callable[..., Any]] = {
    "bind": lambda x: x,
    "cast": lambda x, dtype: x.to(dtype),
    "cast unless None": lambda x, dtype: None if x is None else x.to(dtype),
    "add": lambda x, y: x + y,
    "weigh": lambda op, *rest: op.weigh(*rest),
    "wgrad_by": lambda op, *rest: op.wgrad_by(*rest),
    "clear": lambda x: x.clear() or (),
    "pass": tuple,
    "return": lambda *results: results if len(results) > 1 else results[0],
}


def run_line(line: Line, ops: Any, variables: MutableMapping[str, Any]) -> Any:
    """What a line returns; `variables` gets its results, and loses what is let go after it."""
    arguments = [_value(argument, line.dead, ops, variables) for argument in line.arguments]
    keywords = {name: _value(argument, (), ops, variables) for name, argument in line.keywords}
    function = _EXPRESSIONS.get(line.function)
    if function is None:
        owner, _, name = line.function.rpartition(".")
        function = getattr(line.target, name) if owner else line.target
    result = function(*arguments, **keywords)
    if line.results and line.function != "return":
        _bind(line.results, result, variables)
    for name in line.dead:
        variables.pop(name, None)
    return result


def _value(
    argument: Any, dead: Sequence[str], ops: Any, variables: MutableMapping[str, Any]
) -> Any:  # fmt: skip
    if not isinstance(argument, Argument):
        return tuple(_value(item, dead, ops, variables) for item in argument)
    if argument.category == "op":
        return ops[argument.value]
    if argument.category in ("literal", "object"):
        return argument.value
    value = variables[argument.text]
    if argument.category == "view":
        return value.view_as(value)
    if not argument.moved:
        return value
    return [variables.pop(argument.text) if argument.text in dead else value]


def _bind(names: Any, values: Any, variables: MutableMapping[str, Any]) -> None:
    if isinstance(names, str):
        if names:
            variables[names] = values
    else:
        for name, value in zip(names, values, strict=True):
            _bind(name, value, variables)
