"""What formulas say of a call: the fp64 answer, and how far off a dtype may be."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import formulas
from .compare import Answer, anything, worse
from .low import (
    SHARES,
    in_low_precision,
    with_activations_rounded_once,
    with_inputs_of_bands,
    with_norms_of_pytorch,
    with_roundings,
)

WAYS = ((False, None), (True, None), (False, 1), (False, -1))
"""Of products in FP8: whether the backward is exact, and which way results are off besides."""
NARROW = 1.0
"""No band is narrower: that of ClampedSwiGLU within 0.5."""


class Question(NamedTuple):
    """A call of a module."""

    module: Any
    """A Sequential of ops, or a LayerNormMLP."""
    inputs: Sequence[Tensor]
    """x and the extra inputs."""
    seed: int
    """Of dropout, and of the outputs' gradients."""
    training: bool
    random: Callable[[Sequence[int], int], Tensor]
    """Values of a shape, from a seed."""
    quiet: bool = False
    """Whether no gradient comes to the outputs after the first."""


class Allowed:
    """How far off a call's results may be; see `plain_answer`.

    Worked out when a result asks, or by `keep`, before what the question holds changes.
    """

    def __init__(self, question: Question, exact: Answer, dtype: torch.dtype, low: bool) -> None:
        self.question, self.exact, self.dtype, self.low = question, exact, dtype, low
        self.answer: Answer | None = None

    def keep(self) -> Answer:
        """The answer by plain formulas."""
        if self.answer is None:
            self.answer = plain_answer(self.question, self.exact, self.dtype, self.low)
        return self.answer

    def anything(self) -> None:
        """Allow any result of the right shape."""
        self.answer = anything(self.exact)


def draw_from(seed: int, device: str) -> None:
    """`torch.manual_seed`, which asks after every kind of device, for one that is there."""
    torch.default_generator.manual_seed(seed)
    if device == "cuda":
        torch.cuda.manual_seed(seed)


def dys_of(question: Question, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the outputs that get one, for the backward of a call."""
    some = outputs[:1] if question.quiet else outputs
    return [question.random(y.shape, question.seed + 7 + k) for k, y in enumerate(some)]


def answer(question: Question, dtype: torch.dtype) -> Answer:
    """Outputs and gradients by the formulas, in a dtype."""
    with torch.enable_grad():
        wide = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in question.inputs]
        draw_from(question.seed, question.inputs[0].device.type)
        outputs, parameters = by_formulas(question.module, dtype, wide)
        leaves = {f"input {k}": x for k, x in enumerate(wide)} | parameters
        wanted = {id(leaf): leaf for leaf in leaves.values() if leaf.requires_grad}
        pairs = zip(outputs, dys_of(question, outputs), strict=not question.quiet)
        moving = [(y, dy.to(dtype)) for y, dy in pairs if y.requires_grad]
        found: Sequence[Tensor | None] = [None] * len(wanted)
        if question.training and wanted and moving:
            ys, dys = zip(*moving, strict=True)
            found = torch.autograd.grad(ys, list(wanted.values()), dys, allow_unused=True)
    by_leaf = dict(zip(wanted, found, strict=True))
    gradients = {name: by_leaf.get(id(leaf)) for name, leaf in leaves.items()}
    return Answer([y.detach() for y in outputs], gradients)


def plain_answer(question: Question, exact: Answer, dtype: torch.dtype, low: bool) -> Answer:
    """The worst answer that formulas give in a dtype; low: also with products in FP8.

    A value that is rounded may be on the other side of a bound, and an error of terms that cancel
    may be small by chance. Inputs that are off by a few roundings, and results on the way that are
    off by one, show both. Where those move what goes into a function that is level on both sides of
    a band by as much as a band is wide, which values have a gradient is chance: none is compared.
    """
    worst, right, moved = exact, list[Tensor](), False
    with with_inputs_of_bands(right):
        answer(question, torch.float64)

    def look(around: AbstractContextManager[None], asked: Question = question) -> None:
        nonlocal worst, moved
        seen: list[Tensor] = []
        with around, with_inputs_of_bands(seen):
            found = answer(asked, dtype)
        worst = found if worst is exact else worse(exact, worst, found)
        pairs = zip(seen, right, strict=True)
        moved |= any(bool(((a - b).abs() > NARROW).any()) for a, b in pairs)

    look(nullcontext())
    look(with_norms_of_pytorch())
    look(with_activations_rounded_once(dtype))
    for k in range(1, 9):
        near = [
            _near(question, x, dtype, k).requires_grad_(x.requires_grad) for x in question.inputs
        ]
        look(with_roundings(dtype, k), question._replace(inputs=near))
    for share, (backward, way) in product(SHARES, WAYS) if low else ():
        look(in_low_precision(share, backward, way))
    return worst._replace(gradients=anything(exact).gradients) if moved else worst


def _near(question: Question, x: Tensor, dtype: torch.dtype, k: int) -> Tensor:
    noise = question.random(x.shape, question.seed + k).double() * 2 * torch.finfo(dtype).eps
    return (x.detach().double() * (1 + noise)).requires_grad_(x.requires_grad)


def by_formulas(
    module: nn.Module,
    dtype: torch.dtype,
    inputs: Sequence[Tensor],
    record: Callable[[torch.Size], None] | None = None,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """All outputs, and the copies of the parameters in a dtype, by all their names.

    record: told of the shape of each extra input, none of which is then given.
    """
    made: dict[int, Tensor] = {}
    parameters = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        if id(p) not in made:
            made[id(p)] = p.detach().to(dtype).requires_grad_(p.requires_grad)
        parameters[name] = made[id(p)]
    rest = iter(inputs[1:])

    def extra(x: Tensor) -> Tensor:
        if record is None:
            return next(rest)
        record(x.shape)
        return x

    y, outputs = formulas.run(module, inputs[0].to(dtype), parameters, extra)
    return [y, *outputs], parameters
