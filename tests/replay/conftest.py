"""Every test makes plans of its own; results of replays are poisoned as other fresh memory is."""

import weakref
from functools import partial

import pytest
import torch

from opsgraph.replay import record
from opsgraph.run import table


@pytest.fixture(autouse=True)
def new_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans, with what is recorded of them, are shared by modules of the same structure."""
    monkeypatch.setattr(table, "_tables", weakref.WeakValueDictionary())


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `torch.empty_strided` allocate what native calls write to: it fills what it gives."""
    monkeypatch.setattr(record, "empty_strided", _slow)


def _slow(device: torch.device) -> object:
    def allocate(sizes: object, strides: object, dtype: torch.dtype) -> torch.Tensor:
        return partial(torch.empty_strided, device=device)(sizes, strides, dtype=dtype)

    return allocate
