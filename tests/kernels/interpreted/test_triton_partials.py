"""Small kernels beside the large ones: an amax of amaxes and `1 / scale` have PyTorch's bits."""

import pytest
import torch
from kernel_checks import bits, normal, twice

from opsgraph.kernels.triton.inverse import inverse
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


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("rows", "cols", "width"), [(1, 1, 1), (3, 5, 8), (4, 130, 144), (9, 256, 256), (33, 3, 4)]
)
def test_inverse(rows: int, cols: int, width: int, transposed: bool, device: str) -> None:
    """fp32 division rounded to nearest, of the smallest and the largest scales too."""
    scale = normal(rows, cols, dtype=torch.float32, device=device).mul(20).exp2()
    scale[0, 0], scale[-1, -1] = 2.0**-126, torch.finfo(torch.float32).max
    laid = scale.t().contiguous().t() if transposed else scale
    expected = torch.ones(rows, width, device=device)
    expected[:, :cols] = scale.reciprocal()
    assert torch.equal(twice(inverse, laid, width), expected)
