"""Takes from PyTorch what costs a test's time and shows nothing there, wherever this is imported.

`conftest.py` imports it, and the process that `fresh.py` forks others from. The names are those of
PyTorch: where a version has others, tests run as before and take longer.
"""

import sys
from types import SimpleNamespace

import torch


def leave_out() -> None:
    """Call it again when more of PyTorch may have been imported."""
    # torch.manual_seed keeps, for each kind of device that has not started, where it was called
    # from as text: nearly a millisecond, for an error of a device that does not start. To ask for
    # devices here could start CUDA in the process that others are forked from.
    for kind in (torch.cuda, torch.mtia, torch.xpu):
        if hasattr(kind, "traceback"):
            kind.traceback = SimpleNamespace(format_stack=list)
    # Each compilation empties the processor's caches to measure what its guards take, for a log.
    guards = sys.modules.get("torch._dynamo.guards")
    if hasattr(guards, "profile_guard_manager"):
        guards.profile_guard_manager = lambda *_: 0.0


leave_out()
