"""Results of replays are poisoned too: they are allocated past what fills fresh memory."""

from functools import partial

import pytest
import torch

from opsgraph.replay import record


@pytest.fixture(autouse=True)
def poisoned_results(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have PyTorch's own function allocate what a native call writes to."""
    monkeypatch.setattr(record, "empty_strided", _slow)


def _slow(device: torch.device) -> object:
    def allocate(sizes: object, strides: object, dtype: torch.dtype) -> torch.Tensor:
        return partial(torch.empty_strided, device=device)(sizes, strides, dtype=dtype)

    return allocate
