"""Errors that ops raise as they run say which op it was. The hook is in `Stage.__call__`."""

import linecache
import re
import traceback
from collections.abc import Sequence

from ..base.errors import OpError

_OP = re.compile(r"ops\[([0-9]+)\]")
_NOTE = re.compile(r"# (.+)")


def place(error: OpError, labels: Sequence[str]) -> None:
    """Give an error that an op raised as it ran the op's position, by the line that called it.

    What a kernel raised gets the plan's name of the step.
    """
    for frame, line in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if not file.startswith("<opsgraph plan") or not str(error.args[0]).isidentifier():
            continue
        text = linecache.getline(file, line)
        if called := _OP.search(text):
            error.args = (labels[int(called[1])], *error.args[1:])
        elif noted := _NOTE.search(text):
            error.args = (f"step {noted[1]}", *error.args[1:])
