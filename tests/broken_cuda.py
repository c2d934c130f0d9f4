"""A kernel that reads where it must not breaks CUDA for the rest of its process.

Every later call there fails. `conftest.py` calls these functions, so that one fault hides no other
result: pytest-xdist runs the remaining tests in a new process; without it they are skipped, and
say why.
"""

import os

import pytest
import torch

_reason: str | None = None
"""Why nothing on CUDA runs in this process any more; None while it does."""


def look_after(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Look whether CUDA still works, after a part of a test that raised something."""
    global _reason
    if _reason is not None or call.excinfo is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        _reason = f"{item.nodeid} broke CUDA: {str(error).splitlines()[0]}"


def skip_unless_whole(item: pytest.Item) -> None:
    """Skip a test that needs CUDA where that is broken."""
    if _reason is not None and item.get_closest_marker("gpu"):
        pytest.skip(_reason)


def leave_if_broken() -> None:
    """End a process of pytest-xdist, once its test is reported; another one takes its place."""
    if _reason is not None and "PYTEST_XDIST_WORKER" in os.environ:
        os._exit(1)
