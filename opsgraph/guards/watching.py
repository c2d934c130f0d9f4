"""Who watches the kernels that a thread runs: nobody, or a recorder of a pass."""

import threading
from typing import Any


class _Watching(threading.local):
    recorder: Any = None
    """What is told of every kernel; None, but while a line of a pass is recorded."""
    modes: int = 0
    """How many dispatch modes are recorders, from which kernels have nothing to hide."""


watching = _Watching()
