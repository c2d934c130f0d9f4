"""Two ops of one's own: one with a hand-written backward, one with a parameter and none.

Argument names are the declaration. `bwd(self, dy, x)` says that the backward needs the op's input,
so the plan keeps it or makes it again; a parameter is an argument of the same name. An op without
`bwd` gets autograd's derivative of its `fwd`.

    python examples/custom_op.py
"""

import math

import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Linear, RMSNorm


class SquaredReLU(og.Op):
    """y = relu(x)**2"""

    def fwd(self, x):
        return torch.relu(x).square(), ()

    def bwd(self, dy, x):
        return 2 * torch.relu(x) * dy, ()


class Snake(og.Op):
    """y = x + sin(alpha x)**2 / alpha, with an alpha to learn for every column."""

    def __init__(self, width: int, device=None, dtype=None) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def fwd(self, x, alpha):
        return x + (alpha * x).sin().square() / alpha, ()


def make_model(dtype: torch.dtype) -> og.Sequential:
    """A small network that uses both."""
    return og.Sequential(
        Linear(2, 32, dtype=dtype),
        SquaredReLU(),
        RMSNorm(32, dtype=dtype),
        Linear(32, 32, dtype=dtype),
        Snake(32, dtype=dtype),
        Linear(32, 1, dtype=dtype),
    )


def check_gradients() -> None:
    """Compare the gradients of the whole network with finite differences, in fp64."""
    model = make_model(torch.float64)
    x = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    weights = list(model.parameters())
    # gradcheck changes each number of its inputs in place, and the weights are read at each call.
    assert torch.autograd.gradcheck(lambda x, *_: model(x), (x, *weights))
    count = x.numel() + sum(weight.numel() for weight in weights)
    print(f"gradcheck: {count} gradients agree with finite differences")


def make_waves(count: int) -> tuple[Tensor, Tensor]:
    """Points of the square [-1, 1]^2 and a function of them to learn, which varies about 0."""
    points = 2 * torch.rand(count, 2) - 1
    return points, (math.pi * points[:, :1]).sin() * (math.pi * points[:, 1:]).cos()


def train(steps: int = 300) -> tuple[float, float]:
    """Fit the waves; the mean squared error on new points before and after."""
    model = make_model(torch.float32)
    print(f"\n{model.plan(training=True)}\n")
    points, heights = make_waves(512)
    new_points, new_heights = make_waves(512)

    def error() -> float:
        with torch.no_grad():
            return nn.functional.mse_loss(model(new_points), new_heights).item()

    before = error()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for step in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(points), heights).backward()
        optimizer.step()
        if step % 100 == 99:
            print(f"step {step + 1:>4}  error on new points {error():.5f}")
    return before, error()


def main() -> None:
    """Check, then train."""
    torch.manual_seed(0)
    check_gradients()
    before, after = train()
    print(f"the mean squared error on new points fell from {before:.3f} to {after:.5f}")
    assert after < before / 20


if __name__ == "__main__":
    main()
