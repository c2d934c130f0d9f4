"""Random fusers over random sequences: whatever is registered, the results are the reference's.

The fusers need and hand out random inner values, and some are pairs with a private one; backends
are random too, so that every competition for a place is met.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.fuser import Handle
from opsgraph.ops import QGELU, Add, Identity, Linear, SiLU, SReLU, Tee

KINDS: dict[type[og.Op], Callable[[Tensor], Tensor]] = {
    SiLU: nn.functional.silu,
    SReLU: lambda x: torch.relu(x).square(),
    QGELU: lambda x: x * torch.sigmoid(1.702 * x),
}


def chain(kinds: Sequence[type[og.Op]], x: Tensor) -> list[Tensor]:
    """The values before, between and after some activations."""
    values = [x]
    for kind in kinds:
        values.append(KINDS[kind](values[-1]))
    return values


def random_fuser(draw: random.Random, number: int) -> type[og.Fuser]:
    kinds = draw.choices(list(KINDS), k=draw.choice([1, 2, 2, 3]))
    inner = [f"k{i}_x" for i in range(1, len(kinds))]
    mode = draw.choice(["forward", "backward", "both"])
    private = mode == "both" and draw.random() < 0.5
    saves = [name for name in inner if draw.random() < 0.4] + ["private"] * private
    needs = [name for name in inner if draw.random() < 0.3]

    def fwd(self: Any, x: Tensor) -> Any:
        values = chain(kinds, x)
        return values[-1], tuple(
            x.clone() if name == "private" else values[int(name[1])] for name in saves
        )

    def bwd(self: Any, dy: Tensor, first: Tensor, *more: Tensor) -> Any:
        with torch.enable_grad():
            x = first.detach().requires_grad_()
            values = chain(kinds, x)
            for name, value in zip(needs, more, strict=True):
                torch.testing.assert_close(value, values[int(name[1])].detach())
            return torch.autograd.grad(values[-1], x, dy)[0], ()

    bwd.declared_arguments = ("dy", "private" if private else "k0_x", *needs)  # type: ignore[attr-defined]
    members: dict[str, Any] = {
        "backend": draw.choice(["aten", "reference"]),
        "pattern": {f"k{i}": kind for i, kind in enumerate(kinds)},
        "saves": tuple(saves),
        "saved": lambda self, ops, x: {"private": x},
    }
    members |= {"fwd": fwd} if mode != "backward" else {}
    members |= {"bwd": bwd} if mode != "forward" else {}
    return type(f"Random{number}", (og.Fuser,), members)


def random_ops(draw: random.Random) -> list[nn.Module]:
    ops: list[nn.Module] = []
    tees: list[str] = []
    for k in range(draw.randrange(2, 8)):
        choice = draw.random()
        if choice < 0.65:
            ops.append(draw.choice(list(KINDS))())
        elif choice < 0.75:
            ops.append(Linear(4, 4, bias=False))
        elif choice < 0.85:
            tees.append(f"r{k}")
            ops.append(Tee(tees[-1], to_caller=draw.random() < 0.3))
        elif choice < 0.95 and tees:
            ops.append(Add(draw.choice(tees)))
        else:
            ops.append(Identity())
    return ops


def results(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Outputs, gradients of all that needs one, and the outputs of inference."""
    found = module(x)
    outputs = found if isinstance(found, tuple) else (found,)
    moving = [(k, y) for k, y in enumerate(outputs, 1) if y.requires_grad]
    leaves = [leaf for leaf in (x, *module.parameters()) if leaf.requires_grad]
    total = sum((k * y.square().sum() for k, y in moving), torch.zeros((), dtype=x.dtype))
    gradients: Sequence[Tensor] = ()
    if moving:
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    with torch.no_grad():
        found = module(x)
    return [*outputs, *gradients, *(found if isinstance(found, tuple) else (found,))]


@pytest.mark.parametrize("seed", range(150))
def test_results_do_not_depend_on_the_fusers(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    ops = random_ops(draw)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=draw.random() < 0.7)
    reference = og.Sequential(*ops, backends=("reference",), fusers=(), dtype=torch.float64)
    expected = results(reference, x)
    handles: list[Handle] = []
    try:
        for number in range(draw.randrange(1, 6)):
            handles.append(og.register(random_fuser(draw, number)))
        for planner in ("greedy", "optimal"):
            module = og.Sequential(*ops, planner=planner)
            torch.testing.assert_close(results(module, x), expected)
            for plan in module._stages[0].plans.values():
                if planner == "optimal":
                    assert plan.costs["optimal"] <= plan.costs["greedy"]
    finally:
        for handle in handles:
            handle.unregister()
