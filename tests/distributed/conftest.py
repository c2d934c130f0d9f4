"""Ranks that all distributed tests of a process share, and that start without imports."""

from collections.abc import Iterator

import fresh
import pytest
import torch

from opsgraph.testing import distributed
from opsgraph.testing.distributed import Ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `--dist loadgroup` one process runs them all, and its ranks serve all."""
    for item in items:
        if {"ranks", "own"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session", autouse=True)
def forked() -> Iterator[None]:
    """Fork ranks from a process that has imported all; without CUDA, which a fork may not share."""
    with pytest.MonkeyPatch.context() as patch:
        if not torch.cuda.is_available():
            patch.setattr(distributed, "get_context", lambda method: fresh.context)
        yield


@pytest.fixture(scope="session")
def ranks(forked: None) -> Iterator[Ranks]:
    """`ranks.run(body, size, *args)` calls `body(rank, size, *args)` on `size` Gloo ranks."""
    with Ranks() as ranks:
        yield ranks
