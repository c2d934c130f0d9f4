"""Ranks that all distributed tests of a process share: starting them takes seconds."""

from collections.abc import Iterator

import pytest

from opsgraph.testing.distributed import Ranks


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks.run(body, size, *args)` calls `body(rank, size, *args)` on `size` Gloo ranks."""
    with Ranks() as ranks:
        yield ranks
