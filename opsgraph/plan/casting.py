"""Where autocast's dtype begins: casts after the start of a residual stream.

Under torch.autocast a run computes in autocast's dtype from its input on. A residual stream is
older than that: in `x + f(x)` PyTorch's sum has the dtype of x. So what only passes the stream on,
Tee and Add, leaves it in the dtype it comes in, and a `Cast` stands before each op that computes on
it. Where no stream is in another dtype, the input is cast once and nothing is inserted.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..op import FORWARD, Op, Spec
from ..op.functions import identity, promotes
from .names import root
from .program import Request
from .run import Run


class Cast(Op):
    """`y = x` in another dtype; the gradient goes back into the one before."""

    constants = ("to", "back")

    def __init__(self, to: torch.dtype, back: torch.dtype) -> None:
        super().__init__()
        self.to_dtype, self.back_dtype = to, back

    def constant(self, name: str, x: Spec) -> Any:
        return self.to_dtype if name == "to" else self.back_dtype

    def out(self, x: Spec) -> Spec:
        return x.like(dtype=self.to_dtype)

    def fwd(self, x: Tensor, to: torch.dtype) -> tuple[Tensor, tuple[()]]:
        return x.to(to), ()

    def bwd(self, dy: Tensor, back: torch.dtype) -> tuple[Tensor, tuple[()]]:
        return dy.to(back), ()


def with_casts(run: Run, request: Request) -> tuple[Run, Request]:
    """The run and the request with a Cast wherever a stream of another dtype is computed on."""
    compute = request.compute
    if compute is None or not any(kind.taps or promotes(kind) for kind in run.kinds):
        return run, request
    casts, after_stream = _casts(run, request, compute)
    if not after_stream:
        return run, request
    before = sorted(casts)

    def moved(i: int) -> int:
        return i + bisect_right(before, i)

    weights = {(moved(i), name): spec for (i, name), spec in request.weights.items()}
    training = list(request.training)
    for i in reversed(before):
        training.insert(i, False)
    return _inserted(run, casts, moved), replace(request, weights=weights, training=tuple(training))


def _casts(run: Run, request: Request, compute: torch.dtype) -> tuple[dict[int, Cast], bool]:
    """Casts by the op that they stand before, and whether any stream is in another dtype."""
    extras = {
        (i, name): spec.dtype for (i, name, _), spec in zip(run.inputs, request.extras, strict=True)
    }
    dtype, dtypes, casts, stream = request.x.dtype, [], dict[int, Cast](), False
    for i, (kind, op) in enumerate(zip(run.kinds, run.ops, strict=True)):
        dtypes.append(dtype)
        for name in promotes(kind):
            source = run.sources.get((i, name))
            other = extras[i, name] if source is None else dtypes[source]
            dtype = torch.promote_types(dtype, other)
        passed = bool(promotes(kind)) or identity(kind, op, FORWARD, request.training[i])
        if dtype != compute and not passed:
            casts[i], dtype = Cast(compute, dtype), compute
        stream = stream or (dtype != compute and (kind.taps or bool(promotes(kind))))
    return casts, stream


def _inserted(run: Run, casts: Mapping[int, Cast], moved: Callable[[int], int]) -> Run:
    """The run with casts before some ops; all others keep their numbers, and their names."""
    made = copy(run)
    made.kinds, made.ops, made.labels, made.numbers = [], [], [], []
    made.edges, made.factors, made.places = [], [], []
    prefix = _prefix(run, casts)
    for i in range(len(run.kinds)):
        edge = run.edges[i]
        if i in casts:
            made.kinds.append(Cast)
            made.ops.append(casts[i])
            made.numbers.append(f"{prefix}{edge}")
            made.edges.append(edge)
            edge = f"{prefix}{edge}"
        made.kinds.append(run.kinds[i])
        made.ops.append(run.ops[i])
        made.numbers.append(run.numbers[i])
        made.edges.append(edge)
        twice = 1 + (i in casts)
        made.labels += [run.labels[i]] * twice
        made.factors += [run.factors[i]] * twice
        made.places += [i] * twice
    made.edges.append(run.edges[-1])
    made.factors.append(run.factors[-1])
    made.quantizers = {(moved(i), name): q for (i, name), q in run.quantizers.items()}
    made.overrides = {moved(i): how for i, how in run.overrides.items()}
    made.slots = [(moved(i), name) for i, name in run.slots]
    made.sources = {(moved(i), name): moved(tee) for (i, name), tee in run.sources.items()}
    made.inputs = [(moved(i), name, channel) for i, name, channel in run.inputs]
    made.outputs = [moved(i) for i in run.outputs]
    made.name = names = copy(run.name)
    names.numbers = made.numbers
    names.roots = run.name.roots | _roots(prefix, run, casts)
    names.table = {(moved(i), name): text for (i, name), text in run.name.table.items()}
    names.origins = {text: place for place, text in names.table.items()}
    made.streams = True
    return made


def _roots(prefix: str, run: Run, casts: Mapping[int, Cast]) -> set[str]:
    """The roots of what casts add to the source."""
    numbers = [f"{prefix}{run.edges[i]}" for i in casts]
    return {root(f"{word}{number}") for number in numbers for word in ("x", "d", "dy")}


def _prefix(run: Run, casts: Mapping[int, Cast]) -> str:
    """What stands before a cast's number: "c", or more of them where a name has that already."""
    prefix = "c"
    while not run.name.roots.isdisjoint(_roots(prefix, run, casts)):
        prefix += "c"
    return prefix
