"""Generated source made callable; tracebacks and pdb show its lines for as long as it lives."""

import itertools
import linecache
import re
import traceback
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import inf, nan
from types import CodeType, FunctionType
from typing import Any
from weakref import finalize

import torch

from ..base.errors import OpError
from .expected import compare, compare_ranks, run_reference

_serial = itertools.count()
_OP = re.compile(r"ops\[([0-9]+)\]")


def base_namespace() -> dict[str, Any]:
    """What generated code may name besides its fusers."""
    checks = {"check": compare, "check_ranks": compare_ranks, "run_reference": run_reference}
    return {"torch": torch, "inf": inf, "nan": nan, **checks}


@lru_cache(maxsize=256)
def _code(source: str) -> CodeType:
    """Compiled once: plans for other widths and dtypes often have the same text."""
    return compile(source, "<opsgraph>", "exec")


def compiled(name: str, source: str, namespace: dict[str, Any]) -> Callable[..., Any]:
    """The function of that name which the source defines."""
    file = f"<opsgraph plan {next(_serial)} {name}>"
    exec(_code(source), namespace)
    # Else the function would hold itself, and live until the next collection.
    function: FunctionType = namespace.pop(name)
    function.__code__ = function.__code__.replace(co_filename=file)
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    finalize(function, linecache.cache.pop, file, None).atexit = False
    return function


def place(error: OpError, labels: Sequence[str]) -> None:
    """Give an error that an op raised as it ran the op's position, by the line that called it."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        called = file.startswith("<opsgraph plan") and _OP.search(linecache.getline(file, line))
        if called and str(error.args[0]).isidentifier():
            error.args = (labels[int(called[1])], *error.args[1:])
