"""The Triton dropout equals the plain PyTorch formula bit for bit."""

from typing import NamedTuple

import pytest
import torch
from kernel_checks import DTYPES, INTERPRETING, laid_out, normal, twice
from torch import Tensor

from opsgraph.kernels.reference.dropout import keep_mask
from opsgraph.kernels.triton.dropout import dropout


class Case(NamedTuple):
    rows: int
    width: int
    p: float
    seed: int
    bias: bool = False
    residual: bool = False
    layout: str = "contiguous"


CASES = [
    Case(1, 1, 0.5, 7),
    Case(5, 3, 0.1, -1, bias=True, layout="strided"),
    Case(33, 17, 0.3, 2**40 + 5, residual=True, layout="offset"),
    Case(2, 431, 0.5, -(2**63), bias=True, residual=True, layout="transposed"),
    Case(9, 1000, 0.9, 2**63 - 1, bias=True, residual=True, layout="expanded"),
    Case(3, 100, 0.0, 1, bias=True, residual=True, layout="scalar"),
    Case(3, 2500, 1.0, 1, bias=True, residual=True),
]
if not INTERPRETING:
    CASES += [
        Case(3000, 4096, 0.1, 11, bias=True, residual=True),
        Case(100, 65536, 0.2, 12, residual=True, layout="strided"),
        Case(7, 100003, 0.2, 13, bias=True, layout="offset"),
    ]


def expected(x: Tensor, case: Case, residual: Tensor | None, bias: Tensor | None) -> Tensor:
    if bias is not None:
        x = (x.float() + bias.float()).to(x.dtype)
    keep = keep_mask(torch.tensor(case.seed, device=x.device), *x.shape, case.p)
    scale = 1 / (1 - case.p) if case.p < 1 else 0.0
    y = torch.where(keep, x.float() * scale, 0.0).to(x.dtype)
    return y if residual is None else (y.float() + residual.float()).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_reference(case: Case, dtype: torch.dtype, device: str) -> None:
    x, residual = (
        laid_out(normal(case.rows, case.width, dtype=dtype, device=device, seed=i), case.layout)
        for i in (0, 1)
    )
    bias = normal(case.width, dtype=dtype, device=device, seed=2) if case.bias else None
    added = residual if case.residual else None
    seed = torch.tensor(case.seed, device=device)
    y = twice(dropout, x, seed, case.p, residual=added, bias=bias)
    assert torch.equal(y, expected(x, case, added, bias))


def test_the_seed_is_read_by_the_kernel(device: str) -> None:
    """Written in place between launches, as a CUDA graph's replays do."""
    x, seed = torch.ones(4, 100, device=device), torch.tensor([5], device=device)
    first = dropout(x, seed, 0.5)
    second = dropout(x, seed.add_(1), 0.5)
    assert not torch.equal(first, second)
    assert torch.equal(first, dropout(x, seed.sub_(1), 0.5))


def test_gradient(device: str) -> None:
    """`dropout(dy, seed, p)` is autograd's gradient of the formula."""
    case = Case(5, 100, 0.25, 3)
    x = normal(5, 100, dtype=torch.float32, device=device).requires_grad_()
    dy = normal(5, 100, dtype=torch.float32, device=device, seed=1)
    (dx,) = torch.autograd.grad(expected(x, case, None, None), x, dy)
    assert torch.equal(dropout(dy, torch.tensor(3, device=device), 0.25), dx)


def test_empty_and_errors(device: str) -> None:
    seed = torch.tensor(0, device=device)
    for shape in ((0, 5), (5, 0)):
        assert dropout(torch.ones(*shape, device=device), seed, 0.5).shape == shape
    x = torch.ones(2, 3, device=device)
    for p in (-0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match=f"between 0 and 1, got {p}"):
            dropout(x, seed, p)
    for wrong in (seed.float(), torch.zeros(2, dtype=torch.int64, device=device)):
        with pytest.raises(ValueError, match="seed must be one int64 on"):
            dropout(x, wrong, 0.5)
