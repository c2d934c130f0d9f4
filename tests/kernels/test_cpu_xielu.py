"""The CPU's xIELU against the formula in fp64 and its autograd."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from opsgraph.kernels.cpu import build, xielu
from opsgraph.testing.formulas import xielu as formula

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(build.reason("xielu") is not None, reason=str(build.reason("xielu"))),
]
TOLERANCES = {torch.float32: (2e-6, 2e-6), torch.bfloat16: (8e-3, 1e-5)}
EPS = -1e-6


def expected(x: Tensor, dy: Tensor, alphas: tuple[Tensor, Tensor], beta: float) -> list[Tensor]:
    leaves = [t.double().requires_grad_() for t in (x, *alphas)]
    names = dict(zip(("alpha_p", "alpha_n"), leaves[1:], strict=True))
    y = formula(SimpleNamespace(beta=beta, eps=EPS), leaves[0], names.get)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.double())]


@pytest.mark.parametrize("shape", [(1, 1), (37, 431), (300, 64)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_xielu_is_the_formula(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = (torch.randn(shape) * 3).to(dtype)
    x.view(-1)[: min(4, x.numel())] = torch.tensor([0.0, -0.5, -1e-3, 40.0])[: min(4, x.numel())]
    dy, beta = torch.randn(shape).to(dtype), 0.5
    alphas = torch.randn(1).to(dtype), torch.randn(1).to(dtype)
    found = [
        xielu.xielu_forward(x, *alphas, beta, EPS),
        *xielu.xielu_backward(dy, x, *alphas, beta, EPS),
    ]
    for got, right, sums in zip(found, expected(x, dy, alphas, beta), (0, 0, 1, 1), strict=True):
        rtol, atol = TOLERANCES[dtype]
        assert got.dtype == dtype
        size = float((dy.double() * x.double().square()).abs().sum()) if sums else 4.0
        torch.testing.assert_close(got.double(), right, rtol=rtol, atol=atol * size)


def test_extreme_values() -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[inf, -inf, nan, -1e30, 1e-40, -1e-40]])
    y = xielu.xielu_forward(x, torch.zeros(1), torch.zeros(1), 0.5, EPS)
    n = 0.5 + torch.nn.functional.softplus(torch.zeros(1))
    assert y[0, 0] == inf
    assert y[0, 2].isnan()
    torch.testing.assert_close(y[0, 3], (n * 1e30 - 0.5e30)[0])
    assert y[0, 4] < 1e-39
    torch.testing.assert_close(y[0, 5], (n * EPS)[0])  # eps stands for all above it
    dx = xielu.xielu_backward(torch.ones_like(x), x, torch.zeros(1), torch.zeros(1), 0.5, EPS)[0]
    torch.testing.assert_close(dx[0, 3], 0.5 - n[0])


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=str)
def test_empty(shape: tuple[int, int]) -> None:
    x, alpha = torch.empty(shape), torch.ones(1)
    assert xielu.xielu_forward(x, alpha, alpha, 0.5, EPS).shape == shape
    dx, above, below = xielu.xielu_backward(x, x, alpha, alpha, 0.5, EPS)
    assert dx.shape == shape
    assert above == below == 0
    assert xielu.xielu_backward(x, x, alpha, alpha, 0.5, EPS, ("x",))[1:] == (None, None)
