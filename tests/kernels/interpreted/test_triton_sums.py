"""Sums with a bias and a residual have PyTorch's bits, sums of rows fp64's within rounding."""

import pytest
import torch
from kernel_checks import DTYPES, LAYOUTS, bits, close, laid_out, normal, twice

from opsgraph.kernels.triton.sums import add, sum_rows

SIZES = [(0, 16), (1, 1), (5, 33), (70, 256), (3, 2056)]


@pytest.mark.sampled(10)
@pytest.mark.parametrize("parts", ["other", "bias", "both"])
@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_add(dtype: torch.dtype, rows: int, width: int, parts: str, device: str) -> None:
    x, other = (normal(rows, width, dtype=dtype, device=device, seed=i) for i in (1, 2))
    bias = normal(width, dtype=dtype, device=device, seed=3)
    bias, other = bias if parts != "other" else None, other if parts != "bias" else None
    expected = x if bias is None else x + bias
    expected = expected if other is None else expected + other
    assert torch.equal(bits(twice(add, x, other, bias)), bits(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: str) -> None:
    x, other = (normal(9, 40, dtype=torch.bfloat16, device=device, seed=i) for i in (1, 2))
    x = laid_out(x, layout)
    assert torch.equal(twice(add, x, other), x + other)
    assert torch.equal(twice(add, other, x), x + other)
    close(twice(sum_rows, x, torch.float32), x.double().sum(0).cpu(), x)


@pytest.mark.parametrize(("rows", "width"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_rows(dtype: torch.dtype, rows: int, width: int, device: str) -> None:
    x = normal(rows, width, dtype=dtype, device=device)
    for into in (dtype, torch.float32):
        found = twice(sum_rows, x, into)
        assert found.dtype == into
        close(found, x.double().sum(0).cpu(), x.abs().amax(0) if rows else 0.0)
