"""The reductions of partial results: an amax of amaxes has the bits of PyTorch's."""

import pytest
import torch
from kernel_checks import bits, normal, twice

from opsgraph.kernels.triton.launch import max_partials

SHAPES = [(1,), (5,), (8192,), (8191,), (20000,), (1, 40), (32, 128), (70, 33)]


@pytest.mark.parametrize("shape", SHAPES)
def test_max_partials(shape: tuple[int, ...], device: str) -> None:
    partials = normal(*shape, dtype=torch.float32, device=device).abs()
    assert torch.equal(twice(max_partials, partials), partials.amax(0))


@pytest.mark.parametrize("special", [0.0, 1e-45, float("inf"), float("nan")])
@pytest.mark.parametrize("shape", [(9001,), (40, 3)])
def test_special_numbers(shape: tuple[int, ...], special: float, device: str) -> None:
    """The last partial decides; a NaN is the largest, even beside an infinity."""
    partials = torch.zeros(shape, device=device)
    if special != special:
        partials[0] = torch.inf
    partials[-1] = special
    assert torch.equal(bits(max_partials(partials)), bits(partials.amax(0)))
