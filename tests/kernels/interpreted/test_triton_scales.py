"""Triton's scales by columns against PyTorch's own operations."""

import pytest
import torch
from kernel_checks import close, laid_out, normal, twice

from opsgraph.kernels.triton.scales import scale_backward, scale_forward

SHAPES = [(1, 1), (33, 17), (2, 431), (9, 64), (0, 8)]
PAIRS = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32), (torch.float16, torch.float16),
]  # fmt: skip


@pytest.mark.parametrize("dtypes", PAIRS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scales(
    shape: tuple[int, int], dtypes: tuple[torch.dtype, torch.dtype], device: str
) -> None:
    x = laid_out(normal(*shape, dtype=dtypes[0], device=device), "strided")
    weight = normal(shape[1], dtype=dtypes[1], device=device, seed=1)
    for added in (None, torch.float32, dtypes[0]):
        other = None if added is None else normal(*shape, dtype=added, device=device, seed=2)
        y = twice(scale_forward, x, weight, other)
        assert torch.equal(y, x * weight if other is None else x * weight + other)
    dy = normal(*shape, dtype=(x * weight).dtype, device=device, seed=3)
    dx, dweight = twice(scale_backward, dy, x, weight)
    assert torch.equal(dx, (dy.float() * weight.float()).to(x.dtype))
    terms = dy.double().cpu() * x.double().cpu()
    close(dweight, terms.sum(0), terms.abs().sum(0))


@pytest.mark.parametrize("want", [("x",), ("weight",), ()], ids=str)
def test_what_is_wanted(want: tuple[str, ...], device: str) -> None:
    x = normal(70, 33, dtype=torch.float32, device=device)
    weight = normal(33, dtype=torch.float32, device=device, seed=1)
    both, got = scale_backward(x, x, weight), scale_backward(x, x, weight, want)
    for name, value, expected in zip(("x", "weight"), got, both, strict=True):
        assert torch.equal(value, expected) if name in want else value is None
