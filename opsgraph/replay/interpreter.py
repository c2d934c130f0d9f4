"""Runs lines of generated functions from their data, as the functions would."""

from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from ..guards.compiled import raise_at
from ..plan.lines import Function, Line
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


def run_lines(function: Function, *arguments: Any, run: Callable[..., Any] = run_line) -> Any:
    """What a function returns, run line by line. An error's traceback shows the line's text.

    run: what runs a line.
    """
    variables = dict(zip(function.parameters, arguments, strict=True))
    del arguments
    ops, lines, number = variables.get("ops"), function.lines, 0
    try:
        for number in range(len(lines) - 1):
            run(lines[number], ops, variables)  # and what it returns dies with its variables
        return run(lines[-1], ops, variables)
    except Exception as error:
        above = [text for line in lines[:number] for text in line.text()]
        raise_at(function.call, len(above) + len(lines[number].overwrites) + 2, error)


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
