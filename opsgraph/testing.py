"""Checking fusers without writing a test for each: `check_fuser` compares one with the reference.

Ops come from each class's `sample()`, which leaves out sizes that the neighbours tell. The same
modules run twice, once with that fuser alone and once with the reference ops.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .fuser import Fuser, variants
from .op import Op
from .ops import Add, Tee
from .sequential import Sequential

TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-3, 1e-5),
    torch.float16: (1e-2, 4e-3),
    torch.bfloat16: (3.2e-2, 3.2e-2),
}
"""(rtol, atol times the largest magnitude) between implementations that round in other places."""


def samples(fuser: Fuser) -> Iterator[list[Op]]:
    """Fresh ops for every variant of the pattern and every sample of its ops."""
    for variant in variants(fuser.pattern):
        kinds = [kind for _, kind in variant if kind is not None]
        for k in range(max(len(list(kind.sample())) for kind in kinds)):
            chosen = [list(kind.sample()) for kind in kinds]
            yield [found[k % len(found)] for found in chosen]


def _closed(ops: Sequence[Op]) -> list[nn.Module]:
    """The ops, followed by an Add for every Tee, so that a gradient arrives there."""
    ends: list[nn.Module] = []
    for k, op in enumerate(ops):
        if isinstance(op, Tee):
            op.channels["d"] = f"tee {k}"
            ends.append(Add(f"tee {k}"))
    return [*ops, *ends]


def _run(module: Sequential, inputs: Sequence[Tensor], dy: Tensor | None) -> list[Tensor]:
    """y, and with dy every gradient: of the inputs, then of the parameters."""
    torch.manual_seed(1)
    if dy is None:
        with torch.no_grad():
            return [module(*inputs)]
    inputs = [x.detach().requires_grad_() for x in inputs]
    y = module(*inputs)
    wanted = [*inputs, *module.parameters()]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal up to the tolerance of their dtype. Raises AssertionError that says what differs."""
    assert found.shape == expected.shape, f"{what}: {found.shape} is not {expected.shape}"
    assert found.dtype == expected.dtype, f"{what}: {found.dtype} is not {expected.dtype}"
    if expected.numel():
        rtol, atol = TOLERANCES[expected.dtype]
        size = float(expected.abs().max().nan_to_num())
        torch.testing.assert_close(
            found, expected, rtol=rtol, atol=atol * max(1.0, size), msg=lambda m: f"{what}: {m}"
        )


def check_fuser(
    fuser: Fuser,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shape: Sequence[int] = (5, 16),
    compiled: bool = False,
) -> int:
    """Compare a fuser with the reference ops, in training and in inference.

    Returns in how many plans it was taken; where it declined there is nothing to compare. Raises
    AssertionError where outputs or gradients differ.
    """
    taken = 0
    for ops, training in product(samples(fuser), (True, False)):
        torch.manual_seed(0)
        order = tuple(dict.fromkeys((fuser.backend, "reference")))
        module = Sequential(
            *_closed(ops), backends=order, fusers=(fuser.name,), device=device, dtype=dtype
        )
        reference = Sequential(*module, backends=("reference",), fusers=())
        x = torch.randn(*shape, device=device, dtype=dtype)
        plan = module.plan(training, x=x)
        if fuser.name not in [step.name for step in (*plan.forward, *plan.backward)]:
            continue
        taken += 1
        for parameter in module.parameters():
            nn.init.normal_(parameter.data, 0.5, 0.5)
        inputs = [x, *(torch.randn_like(e) for e in module.example_extras(x))]
        dy = torch.randn_like(reference(*inputs)) if training else None
        run: Any = module
        if compiled:
            torch.compiler.reset()
            run = torch.compile(module, fullgraph=True, backend="aot_eager")
        label = f"{fuser.name} over {[type(op).__name__ for op in ops]}, training={training}"
        names = ["y", *(f"d{k}" for k in range(len(inputs))), *dict(module.named_parameters())]
        found, expected = _run(run, inputs, dy), _run(reference, inputs, dy)
        for name, one, other in zip(names, found, expected, strict=False):
            assert_same(one, other, f"{label}: {name}")
    return taken
