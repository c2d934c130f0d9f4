"""Triton's xIELU against the formula in fp64 and its autograd."""

from types import SimpleNamespace

import pytest
import torch
from kernel_checks import DTYPES, close, laid_out, normal, twice

from opsgraph.kernels.triton.xielu import xielu_backward, xielu_forward
from opsgraph.testing.formulas import xielu as formula

BETA, EPS = 0.5, -1e-6


@pytest.mark.parametrize("shape", [(1, 1), (33, 17), (2, 431), (9, 64)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_xielu_is_the_formula(dtype: torch.dtype, shape: tuple[int, int], device: str) -> None:
    x = laid_out(normal(*shape, dtype=dtype, device=device) * 3, "strided")
    dy = normal(*shape, dtype=dtype, device=device, seed=1)
    alphas = [normal(1, dtype=dtype, device=device, seed=k) for k in (2, 3)]
    y = twice(xielu_forward, x, *alphas, BETA, EPS)
    found = twice(xielu_backward, dy, x, *alphas, BETA, EPS)
    leaves = [t.cpu().double().requires_grad_() for t in (x, *alphas)]
    names = dict(zip(("alpha_p", "alpha_n"), leaves[1:], strict=True))
    y64 = formula(SimpleNamespace(beta=BETA, eps=EPS), leaves[0], names.get)
    expected = torch.autograd.grad(y64, leaves, dy.cpu().double())
    terms = dy.cpu().double().abs() * (1 + leaves[0].detach().square())
    close(y, y64.detach(), 1 + leaves[0].detach().square())
    close(found[0], expected[0], terms)
    for got, right in zip(found[1:], expected[1:], strict=True):
        close(got, right, terms.sum())


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_empty(shape: tuple[int, int], device: str) -> None:
    x, alpha = torch.empty(shape, device=device), torch.ones(1, device=device)
    assert xielu_forward(x, alpha, alpha, BETA, EPS).shape == shape
    dx, above, below = xielu_backward(x, x, alpha, alpha, BETA, EPS)
    assert dx.shape == shape
    assert above == below == 0
