"""The model of `benchmarks/parallel.py` against bounds worked out by hand."""

import math

import pytest

from benchmarks.parallel import (
    GPUS,
    NODE,
    REACHED_FLOPS,
    REACHED_LINK,
    Block,
    Machine,
    beside,
    pieced,
    predictions,
    step,
)


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
@pytest.mark.parametrize("length", [2048, 131072])
def test_a_step_is_never_quicker_than_its_flops(ranks: int, length: int) -> None:
    block = Block(8192, 28672, length)
    for gpu in GPUS:
        found = step(Machine(gpu, ranks), block)
        flops = 18 * block.hidden * block.ffn * length / ranks
        least = flops / (gpu.flops * REACHED_FLOPS)
        assert least <= found["overlapped"]
        assert least <= found["plain"]
        assert ranks == 2 or found["overlapped"] <= found["plain"]  # two have little to hide
        assert (found["collectives"] == 0) == (ranks == 1)


def test_large_gathers_run_at_the_bandwidth_of_the_links() -> None:
    size = 1e10
    inside = size * 7 / 8 / (NODE.nvlink * REACHED_LINK)
    assert Machine(GPUS[0], 8).gather(size) == pytest.approx(inside, rel=0.01)
    across = size * 15 / 16 / (NODE.gpus * NODE.network * REACHED_LINK)
    assert Machine(GPUS[0], 16).gather(size) == pytest.approx(across, rel=0.01)
    assert Machine(GPUS[0], 1).gather(size) == 0


def test_small_gathers_cost_the_latency_of_every_step() -> None:
    assert Machine(GPUS[0], 8).gather(0) == pytest.approx(6.6e-6 + 7 * 0.6e-6)
    assert Machine(GPUS[0], 16).gather(0) == pytest.approx(6.6e-6 + 14 * 0.6e-6 + 2.7e-6)


def test_products_take_whole_waves_of_tiles() -> None:
    machine = Machine(GPUS[0], 1)
    one = machine.product(128 * 12, 256 * 11, 8192)  # a tile for each of 132 multiprocessors
    assert machine.product(128 * 12 + 1, 256 * 11, 8192) == pytest.approx(2 * one)
    assert one == pytest.approx(2 * 128 * 132 * 256 * 8192 / (GPUS[0].flops * REACHED_FLOPS))


def test_overlap_hides_the_shorter_of_two() -> None:
    assert beside(10.0, 4.0, share=0.0) == 10
    assert beside(10.0, 4.0, share=0.25) == 11
    assert beside(1.0, 4.0, share=0.25) == 4
    assert pieced(2.0, 1.0, 4, share=0.0) == 2 + 1 + 3 * 2  # all but the first piece is hidden
    assert pieced(2.0, 1.0, 1, share=0.0) == 3


def test_more_memory_bandwidth_is_never_slower() -> None:
    h100, h200 = ([r for r in predictions(4096, 14336) if r["gpu"] == g.name] for g in GPUS)
    assert len(h100) == 49
    assert all(b["plain"] <= a["plain"] for a, b in zip(h100, h200, strict=True))
    assert all(math.isfinite(r["overlapped"]) for r in h100)
