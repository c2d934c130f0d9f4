"""What `benchmarks.gpu` calls of the kernels exists, and takes what it is called with."""

from functools import partial

import pytest

from benchmarks import gpu_bandwidth as benchmark

GROUPS = {
    "norms": partial(benchmark.norms, 4, 64),
    "activations": partial(benchmark.activations, 4, 64),
} | {scaling: partial(benchmark.casts, 128, 128, scaling) for scaling in benchmark.SCALINGS}


@pytest.mark.usefixtures("device")
@pytest.mark.sampled(4)
@pytest.mark.parametrize("group", GROUPS)
def test_functions_run(group: str) -> None:
    for name, each in GROUPS[group]().items():
        assert each.call() is not None, name
        assert each.moved > 0
