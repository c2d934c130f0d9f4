"""Checking fusers without writing a test for each: `check_fuser` compares one with the reference.

Ops come from each class's `sample()`, which leaves out sizes that the neighbours tell. The same
modules run twice, once with that fuser alone and once with the reference ops.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import cycle, product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..fuser import Fuser, Variant, variants
from ..op import Op
from ..ops import BasicLinear, GroupedLinear, Quantize, QuantizeGrad
from ..ops.quantized_grouped import QuantizedGroupedLinear
from ..precision.autocast import autocast
from ..precision.recipe import Float8CurrentScaling, Format, MXFP8BlockScaling, Recipe
from ..run.sequential import Sequential

TOLERANCES = {
    torch.float64: (1e-9, 1e-9),
    torch.float32: (1e-3, 1e-5),
    torch.float16: (1e-2, 4e-3),
    torch.bfloat16: (3.2e-2, 3.2e-2),
}
"""(rtol, atol times the largest magnitude) between implementations that round in other places."""


RECIPES = (
    Float8CurrentScaling(),
    MXFP8BlockScaling(),
    Float8CurrentScaling(row_wise=True, fp8_format=Format.E4M3),
)
"""What fusers of quantized values are compared under, with sizes that all recipes take."""
QUANTIZED_WIDTH = 256


def quantizing(fuser: Fuser) -> bool:
    """Whether a fuser is for plans under a recipe alone."""
    kinds = {kind for variant in variants(fuser.pattern) for _, kind in variant}
    return fuser.quantized or not kinds.isdisjoint((Quantize, QuantizeGrad, QuantizedGroupedLinear))


def _covering(found: Iterable[Variant]) -> Iterator[Variant]:
    """Variants in which every alternative of every entry of a pattern occurs."""
    seen: set[tuple[str, type[Op] | None]] = set()
    for variant in found:
        if not seen.issuperset(variant):
            seen.update(variant)
            yield variant


def samples(fuser: Fuser, few: bool = False) -> Iterator[list[Op]]:
    """Fresh ops for every variant of the pattern and every sample of its ops.

    Under a recipe a linear layer stands for the Quantize or QuantizeGrad that it brings, and a
    GroupedLinear for what it becomes. few: only enough variants for every alternative to occur, one
    sample of each class, and of many classes of a kind, as activations are, a few that differ from
    one fuser to the next.
    """
    linear = partial(BasicLinear, out_features=QUANTIZED_WIDTH)

    def stand_in(kind: type[Op]) -> Op:
        groups = issubclass(kind, QuantizedGroupedLinear)
        return GroupedLinear(2, out_features=QUANTIZED_WIDTH) if groups else linear()

    def instances(kind: type[Op]) -> list[Op]:
        each = list(kind.sample()) or [stand_in(kind)]
        if not few:
            return each
        classes = list({type(op): op for op in reversed(each)}.values())
        step = -(-len(classes) // 6)
        return classes[fuser.serial % step :: step]

    every = list(variants(fuser.pattern))
    for variant in _covering(every) if few else every:
        kinds = [kind for _, kind in variant if kind is not None]
        pairs = zip(kinds, [*kinds[1:], None], strict=True)
        kinds = [kind for kind, after in pairs if (kind, after) != (Quantize, BasicLinear)]
        for k in range(max(len(instances(kind)) for kind in kinds)):
            chosen = [instances(kind) for kind in kinds]
            if fuser.quantized:
                chosen = [
                    [linear()] if kind is BasicLinear else c
                    for kind, c in zip(kinds, chosen, strict=True)
                ]
            yield [found[k % len(found)] for found in chosen]


def exchanges(fuser: Fuser) -> bool:
    """Whether a fuser's ops exchange tensors with other ranks, so that checking it takes some."""
    return any(k is not None and k.collective for v in variants(fuser.pattern) for _, k in v)


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _run(module: Any, inputs: Sequence[Tensor], training: bool) -> list[Tensor]:
    """Outputs, and in training every gradient: of the inputs, then of the parameters."""
    torch.manual_seed(1)
    if not training:
        with torch.no_grad():
            return _listed(module(*inputs))
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = _listed(module(*inputs))
    wanted = [*(x for x in inputs if x.requires_grad), *module.parameters()]
    torch.manual_seed(2 + _rank())
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


def assert_near(found: Tensor, expected: Tensor, what: str) -> None:
    """Equal but for values on the other side of a quantizer's rounding, or of an activation's bend.

    Up to 2% of the norm; up to 5% in 16 bits, where a product's last bit decides more often, and to
    which Triton's interpreter truncates. Raises AssertionError that says what differs.
    """
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype), what
    size, error = expected.double().norm(), (found.double() - expected.double()).norm()
    part = 0.05 if expected.element_size() == 2 else 0.02
    assert float(error) <= part * float(size), f"{what}: differs by {error:.3g} of {size:.3g}"


def check_fuser(
    fuser: Fuser,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shape: Sequence[int] = (5, 16),
    compiled: bool = False,
    few: bool = False,
) -> int:
    """Compare a fuser with the reference ops, in training and in inference.

    In a process group each rank has an input, weights and gradients of its own, as shards are.
    Returns in how many plans it was taken; where it is refused there is nothing to compare. Raises
    AssertionError where outputs or gradients differ. A fuser for quantized values is compared under
    `RECIPES` in turn, and each sample under another until it is taken, at `QUANTIZED_WIDTH`.
    few: with fewer samples, for where each takes long. compiled: under torch.compile, until it was
    taken in three plans: training and inference of a sample, and training of another.
    """
    recipes: Sequence[Recipe | None] = (None,)
    if quantizing(fuser):
        shape, recipes = (*shape[:-1], QUANTIZED_WIDTH), RECIPES
    taken = 0
    for turn in range(len(recipes)):
        pairs = zip(samples(fuser, few or compiled), cycle((*recipes[turn:], *recipes[:turn])))
        for (ops, recipe), training in product(pairs, (True, False)):
            if compiled and taken == 3:
                break
            with autocast(recipe is not None, recipe):
                taken += _check(fuser, ops, training, dtype, device, shape, compiled)
        if taken:
            break
    return taken


def _check(
    fuser: Fuser, ops: Sequence[Op], training: bool, dtype: torch.dtype,
    device: torch.device | str, shape: Sequence[int], compiled: bool,
) -> bool:  # fmt: skip
    """Compare one instance; whether the fuser was taken."""
    torch.manual_seed(_rank())
    order = tuple(dict.fromkeys((fuser.backend, "reference")))
    place: Any = {"device": device, "dtype": dtype}
    recompute = fuser.recomputes is not False
    module = Sequential(*ops, backends=order, fusers=(fuser.name,), recompute=recompute, **place)
    reference = Sequential(*module, backends=("reference",), fusers=())
    x = torch.randn(*shape, device=device, dtype=dtype)
    plan = module.plan(training, x=x)
    if fuser.name not in [step.name for step in (*plan.forward, *plan.backward)]:
        return False
    for parameter in module.parameters():
        size = 0.1 if quantizing(fuser) else 0.5  # at their width, fp16 would overflow
        nn.init.normal_(parameter.data, size, size)
    extras = module.example_extras(x)
    inputs = [x, *(torch.randn_like(e) if e.is_floating_point() else e for e in extras)]
    run: Any = module
    if compiled:
        torch.compiler.reset()
        run = torch.compile(module, fullgraph=True, backend="aot_eager")
    label = f"{fuser.name} over {[type(op).__name__ for op in ops]}, training={training}"
    found, expected = _run(run, inputs, training), _run(reference, inputs, training)
    compare = assert_near if quantizing(fuser) else assert_same
    for k, (one, other) in enumerate(zip(found, expected, strict=True)):
        compare(one, other, f"{label}: result {k}")
    return True
