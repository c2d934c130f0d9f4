"""The CPU's scales by columns against PyTorch's own operations, bit for bit."""

from itertools import product

import pytest
import torch

from opsgraph.kernels.cpu import build, scales
from opsgraph.kernels.reference import scales as reference

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(build.reason("scales") is not None, reason=str(build.reason("scales"))),
]
BOTH = torch.float32, torch.bfloat16


@pytest.mark.parametrize("shape", [(5, 1), (37, 431), (300, 64), (0, 8), (3, 0)], ids=str)
@pytest.mark.parametrize("dtypes", [*product(BOTH, BOTH, (None, *BOTH))], ids=str)
def test_scales_are_those_of_pytorch(
    dtypes: tuple[torch.dtype, ...], shape: tuple[int, int]
) -> None:
    x, weight = torch.randn(shape).to(dtypes[0]), torch.randn(shape[1]).to(dtypes[1])
    other = None if dtypes[2] is None else torch.randn(shape).to(dtypes[2])
    expected = x * weight if other is None else x * weight + other
    y = scales.scale_forward(x, weight, other)
    assert y.dtype == expected.dtype
    assert torch.equal(y, expected)
    dy = torch.randn(shape).to((x * weight).dtype)
    dx, dweight = scales.scale_backward(dy, x, weight)
    assert torch.equal(dx, (dy.float() * weight.float()).to(x.dtype))
    assert dweight.dtype == weight.dtype
    torch.testing.assert_close(
        dweight.double(), (dy.double() * x.double()).sum(0), rtol=8e-3, atol=1e-4
    )
    assert scales.scale_backward(dy, x, weight, ("x",))[1] is None
    assert torch.equal(scales.scale_backward(dy, x, weight, ("weight",))[1], dweight)


def test_strided_and_expanded_rows() -> None:
    x, weight = torch.randn(6, 40)[:, 8:24], torch.randn(32)[::2]
    other = torch.randn(1, 16).expand(6, 16)
    assert torch.equal(scales.scale_forward(x, weight, other), x * weight + other)
    dy = torch.randn(16, 6).t()
    for got, expected in zip(
        scales.scale_backward(dy, x, weight), reference.scale_backward(dy, x, weight), strict=True
    ):
        torch.testing.assert_close(got, expected)


def test_sums_are_the_same_bits_for_any_number_of_threads() -> None:
    x, dy, weight = torch.randn(700, 200), torch.randn(700, 200), torch.randn(200)
    found = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found.append(scales.scale_backward(dy, x, weight)[1])
    torch.set_num_threads(1)
    assert torch.equal(*found)
