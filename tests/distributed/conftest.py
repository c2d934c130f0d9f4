"""Ranks that all distributed tests of a process share: starting them takes seconds."""

from collections.abc import Iterator

import pytest

from opsgraph.testing.distributed import Ranks


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `--dist loadgroup` one process runs them all, and its ranks serve all."""
    for item in items:
        if {"ranks", "own"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.xdist_group("ranks"))


@pytest.fixture(scope="session")
def ranks() -> Iterator[Ranks]:
    """`ranks.run(body, size, *args)` calls `body(rank, size, *args)` on `size` Gloo ranks."""
    with Ranks() as ranks:
        yield ranks
