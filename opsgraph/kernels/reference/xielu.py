"""xIELU (Huang and Schlag, 2024), as transformers computes it, in fp32, and its gradients.

    y = p * x^2 + beta * x                            where x > 0
    y = n * (exp(min(x, eps)) - 1 - x) + beta * x     elsewhere

with p = softplus(alpha_p), n = beta + softplus(alpha_n).
"""

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor

from . import wide


def _factors(alpha_p: Tensor, alpha_n: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    return F.softplus(wide(alpha_p)), beta + F.softplus(wide(alpha_n))


def xielu_forward(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float) -> Tensor:
    """y of x's dtype; alpha_p, alpha_n: `[1]`, of any float dtypes."""
    p, n = _factors(alpha_p, alpha_n, beta)
    h = wide(x)
    below = torch.expm1(torch.where(h > eps, eps, h)) - h
    return (torch.where(h > 0, p * h * h, n * below) + beta * h).to(x.dtype)


def xielu_backward(
    dy: Tensor, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float,
    want: Collection[str] = ("x", "alpha_p", "alpha_n"),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx and the sums dalpha_p, dalpha_n, each of its tensor's dtype; both sums or none."""
    p, n = _factors(alpha_p, alpha_n, beta)
    g, h, dx = wide(dy), wide(x), None
    if "x" in want:
        slope = torch.where(h > 0, 2 * p * h, n * torch.where(h < eps, torch.expm1(h), -1))
        dx = (g * (slope + beta)).to(x.dtype)
    if not {"alpha_p", "alpha_n"}.intersection(want):
        return dx, None, None
    below = torch.expm1(torch.where(h > eps, eps, h)) - h
    above = torch.where(h > 0, g * h * h, 0).sum() * torch.sigmoid(wide(alpha_p))
    under = torch.where(h > 0, 0, g * below).sum() * torch.sigmoid(wide(alpha_n))
    return dx, above.to(alpha_p.dtype), under.to(alpha_n.dtype)
