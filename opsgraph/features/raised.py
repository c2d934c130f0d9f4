"""Errors that ops raise as they run say which op it was. The hook is in `Stage.__call__`."""

import linecache
import re
import traceback
from collections.abc import Sequence

from ..base.errors import OpError

_OP = re.compile(r"ops\[([0-9]+)\]")


def place(error: OpError, labels: Sequence[str]) -> None:
    """Give an error that an op raised as it ran the op's position, by the line that called it."""
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        called = file.startswith("<opsgraph plan") and _OP.search(linecache.getline(file, line))
        if called and str(error.args[0]).isidentifier():
            error.args = (labels[int(called[1])], *error.args[1:])
