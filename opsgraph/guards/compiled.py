"""Generated source made callable; tracebacks and pdb show its lines for as long as it lives."""

import itertools
import linecache
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, FunctionType
from typing import Any
from weakref import finalize

_serial = itertools.count()


@lru_cache(maxsize=256)
def _code(source: str) -> CodeType:
    """Compiled once: plans for other widths and dtypes often have the same text."""
    return compile(source, "<opsgraph>", "exec")


def compiled(name: str, source: str, namespace: dict[str, Any]) -> Callable[..., Any]:
    """The function of that name which the source defines."""
    file = f"<opsgraph plan {next(_serial)} {name}>"
    defined: dict[str, FunctionType] = {}  # else the function would hold itself in its globals
    exec(_code(source), namespace, defined)
    function = defined[name]
    function.__code__ = function.__code__.replace(co_filename=file)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    finalize(function, linecache.cache.pop, file, None).atexit = False
    return function


def raise_at(function: Callable[..., Any], row: int, error: Exception) -> None:
    """Raise an error as if that row of a compiled function's source had raised it."""
    code = function.__code__
    raising = compile("\n" * (row - 1) + "raise error", code.co_filename, "exec")
    exec(raising.replace(co_name=code.co_name), {"error": error})
