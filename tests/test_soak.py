"""Long training while everything changes leaves no memory, files, threads or plans behind."""

import pytest

from benchmarks.soak import SLACK, grown, soak
from opsgraph.kernels.cpu.activations import row

linux = pytest.mark.skipif("sys.platform != 'linux'", reason="reads /proc")
pytestmark = [pytest.mark.usefixtures("unpoisoned")]


def test_what_grows_is_said() -> None:
    flat = [{"files": 6, "MiB": 300 + k} for k in range(9)]
    assert grown(flat) == []
    flat[6]["files"] = flat[7]["files"] = flat[8]["files"] = 7
    assert grown(flat) == ["files: 6 at most, then 7 at least"]
    flat[6]["MiB"] = flat[7]["MiB"] = flat[8]["MiB"] = 305 + SLACK["MiB"] + 1
    assert len(grown(flat)) == 2


def test_kinds_of_activations_are_kept_for_a_while() -> None:
    for k in range(300):
        row("leaky_relu", (k / 300,))
    assert row.cache_info().currsize <= 256


@linux
def test_a_short_soak_leaves_nothing() -> None:
    assert soak(0, 9) == []


@linux
@pytest.mark.slow
def test_three_minutes_leave_nothing() -> None:
    assert soak(1, 60, minutes=3, every=4) == []
