"""Checking fusers without writing a test for each: `check_fuser` compares one with the reference.

Ops come from each class's `sample()`, which leaves out sizes that the neighbours tell. The same
modules run twice, once with that fuser alone and once with the reference ops.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .fuser import Fuser, Variant, variants
from .op import Op
from .sequential import Sequential

TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-3, 1e-5),
    torch.float16: (1e-2, 4e-3),
    torch.bfloat16: (3.2e-2, 3.2e-2),
}
"""(rtol, atol times the largest magnitude) between implementations that round in other places."""


MOST = 32
"""Of a pattern with more variants than that, only enough are run for each alternative to occur."""


def _covering(found: Iterable[Variant]) -> Iterator[Variant]:
    """Variants in which every alternative of every entry of a pattern occurs."""
    seen: set[tuple[str, type[Op] | None]] = set()
    for variant in found:
        if not seen.issuperset(variant):
            seen.update(variant)
            yield variant


def samples(fuser: Fuser, few: bool = False) -> Iterator[list[Op]]:
    """Fresh ops for every variant of the pattern and every sample of its ops.

    few: only so many variants that every alternative occurs, and one sample of each.
    """
    found = list(variants(fuser.pattern))
    for variant in _covering(found) if few or len(found) > MOST else found:
        kinds = [kind for _, kind in variant if kind is not None]
        for k in range(1 if few else max(len(list(kind.sample())) for kind in kinds)):
            chosen = [list(kind.sample()) for kind in kinds]
            yield [found[k % len(found)] for found in chosen]


def _run(module: Any, inputs: Sequence[Tensor], training: bool) -> list[Tensor]:
    """Outputs, and in training every gradient: of the inputs, then of the parameters."""
    torch.manual_seed(1)
    if not training:
        with torch.no_grad():
            return _listed(module(*inputs))
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = _listed(module(*inputs))
    wanted = [*(x for x in inputs if x.requires_grad), *module.parameters()]
    torch.manual_seed(2)
    grads = torch.autograd.grad(outputs, wanted, [torch.randn_like(y) for y in outputs])
    return [*(y.detach() for y in outputs), *grads]


def _listed(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


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

    compiled: under torch.compile, with fewer cases since each takes long. Returns in how many plans
    it was taken; where it declined there is nothing to compare. Raises AssertionError where outputs
    or gradients differ.
    """
    taken = 0
    for ops, training in product(samples(fuser, few=compiled), (True, False)):
        torch.manual_seed(0)
        order = tuple(dict.fromkeys((fuser.backend, "reference")))
        place: Any = {"device": device, "dtype": dtype}
        module = Sequential(*ops, backends=order, fusers=(fuser.name,), **place)
        reference = Sequential(*module, backends=("reference",), fusers=())
        x = torch.randn(*shape, device=device, dtype=dtype)
        plan = module.plan(training, x=x)
        if fuser.name not in [step.name for step in (*plan.forward, *plan.backward)]:
            continue
        taken += 1
        for parameter in module.parameters():
            nn.init.normal_(parameter.data, 0.5, 0.5)
        extras = module.example_extras(x)
        inputs = [x, *(torch.randn_like(e) if e.is_floating_point() else e for e in extras)]
        run: Any = module
        if compiled:
            torch.compiler.reset()
            run = torch.compile(module, fullgraph=True, backend="aot_eager")
        label = f"{fuser.name} over {[type(op).__name__ for op in ops]}, training={training}"
        found, expected = _run(run, inputs, training), _run(reference, inputs, training)
        for k, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_same(one, other, f"{label}: result {k}")
    return taken
