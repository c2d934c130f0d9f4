"""A fuser of one's own: a Linear and an activation in one step.

A fuser has the shape of an op and a pattern that says which ops it covers. What the backward needs
from between them it must be able to hand out (`saves`), or the plan cannot use it in training. Here
the backward of the activation needs the activation's input, `act_x`. The step is plain PyTorch, so
that it runs anywhere; a real one would call a kernel with the activation in the GEMM's epilogue.

    python examples/custom_fuser.py
"""

import torch
from torch import Tensor

import opsgraph as og
from opsgraph.ops import BasicLinear, Linear


class SquaredReLU(og.Op):
    """y = relu(x)**2"""

    def fwd(self, x):
        return torch.relu(x).square(), ()

    def bwd(self, dy, x):
        return 2 * torch.relu(x) * dy, ()


class LinearSquaredReLU(og.Fuser):
    """relu(x W^T)**2; works in the GEMM's output where a plan does not want that."""

    backend = "aten"
    pattern = dict(fc=BasicLinear, act=SquaredReLU)
    saves = ("act_x",)

    def reject(self, fc, act, x):
        if x.width % 16:
            return f"in_features {x.width} is not a multiple of 16"
        return None

    def fwd(self, x, fc_weight, want):
        pre = x @ fc_weight.t()
        if "act_x" in want:
            return torch.relu(pre).square_(), (pre,)
        return pre.relu_().square_(), (None,)


def make_mlp(in_features: int) -> og.Sequential:
    """Two Linears without biases around the activation."""
    layers = Linear(in_features, 64, bias=False), SquaredReLU(), Linear(64, 8, bias=False)
    return og.Sequential(*layers)


def results(mlp: og.Sequential, x: Tensor) -> list[Tensor]:
    """The output and all gradients of a training step, and the output in inference."""
    y = mlp(x)
    inputs = [x, *mlp.parameters()]
    with torch.no_grad():
        inference = mlp(x)
    return [y, *torch.autograd.grad(y.square().sum(), inputs), inference]


def steps(mlp: og.Sequential, training: bool) -> list[str]:
    """Names of the forward steps."""
    return [step.name for step in mlp.plan(training=training).forward]


def main() -> None:
    """Plan and run with the fuser and without it."""
    torch.manual_seed(0)
    mlp = make_mlp(32)
    x = torch.randn(10, 32, requires_grad=True)
    print(f"without the fuser\n{mlp.plan(training=True)}\n")
    before = steps(mlp, training=True)
    expected = results(mlp, x)

    # As a decorator, `@og.register` registers for good; a `with` block ends it. A fuser of
    # one's own goes before opsgraph's, of any backend; with `priority = 0` it is one among them.
    with og.register(LinearSquaredReLU):
        plan = mlp.plan(training=True)
        print(f"with it\n{plan}\n\n{plan.forward_source}")
        print(f"in inference, which does not want act_x\n{mlp.plan(training=False).forward_source}")
        assert "LinearSquaredReLU" in steps(mlp, training=True)
        assert "LinearSquaredReLU" in steps(mlp, training=False)
        found = results(mlp, x)
        refusals = [r for r in make_mlp(30).plan().rejected if r.name == "LinearSquaredReLU"]

    difference = max((a - b).abs().max().item() for a, b in zip(found, expected, strict=True))
    print(f"largest difference of outputs and gradients with and without it: {difference:.1e}")
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)

    for refusal in refusals:
        where = ", ".join(map(str, refusal.ops))
        print(f"30 wide: ops {where} not by {refusal.name} ({refusal.direction}): {refusal.reason}")
    assert any("in_features 30 is not a multiple of 16" in r.reason for r in refusals)
    assert steps(mlp, training=True) == before
    print("after the block the plan is the old one again")


if __name__ == "__main__":
    main()
