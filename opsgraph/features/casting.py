"""Where autocast's dtype begins: casts after the start of a residual stream.

Under torch.autocast a run computes in autocast's dtype from its input on. A residual stream is
older than that: in `x + f(x)` PyTorch's sum has the dtype of x. So what only passes the stream on,
Tee and Add, leaves it in the dtype it comes in, and a `Cast` stands before each op that computes on
it. Where no stream is in another dtype, the input is cast once and nothing is inserted.

The hooks are `Request.casts` and the run that `make_plan` is given.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..guards.names import root
from ..op import FORWARD, Op, Placed, Spec
from ..op.functions import identity, promotes
from ..plan.basic_ops import BasicOps
from ..plan.program import Request


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


def with_casts(run: BasicOps, request: Request) -> tuple[BasicOps, Request]:
    """The run with a Cast wherever a stream of another dtype is computed on.

    The request says which arguments are cast.
    """
    compute = request.compute
    if compute is None:
        return run, request
    streams = False
    if any(kind.taps or promotes(kind) for kind in run.kinds):
        casts, streams = _casts(run, request, compute)
        run = _inserted(run, casts) if streams else run
    return run, replace(request, casts=_cast_arguments(run, request, compute, streams))


def _inserted(run: BasicOps, casts: Mapping[int, Cast]) -> BasicOps:
    prefix, entries = _prefix(run, casts), list[Placed]()
    for i, entry in enumerate(run.entries):
        if i in casts:
            entries.append(Placed(Cast, casts[i], entry.label, prefix))
        entries.append(entry)
    return run.with_entries(entries)


def _cast_arguments(
    run: BasicOps, request: Request, compute: torch.dtype, streams: bool
) -> frozenset[str]:
    """The names of the inputs and weights that are cast before all else."""
    specs = {"x0": request.x, **request.weights}
    specs |= {run.name(n, i): s for (i, n, _), s in zip(run.inputs, request.extras, strict=True)}
    as_given = {"x0"} if streams else set()
    for i, name in (*run.slots, *(place[:2] for place in run.inputs)):
        if name in run.kinds[i].as_stored or name in promotes(run.kinds[i]):
            as_given.add(run.name(name, i))
    others = ((n, spec.dtype) for n, spec in specs.items() if spec and n not in as_given)
    return frozenset(n for n, dtype in others if dtype.is_floating_point and dtype != compute)


def _casts(run: BasicOps, request: Request, compute: torch.dtype) -> tuple[dict[int, Cast], bool]:
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


def _roots(prefix: str, run: BasicOps, casts: Mapping[int, Cast]) -> set[str]:
    """The roots of what casts add to the source."""
    numbers = [f"{prefix}{run.edges[i]}" for i in casts]
    return {root(f"{word}{number}") for number in numbers for word in ("x", "d", "dy")}


def _prefix(run: BasicOps, casts: Mapping[int, Cast]) -> str:
    """What stands before a cast's number: "c", or more of them where a name has that already."""
    prefix = "c"
    while not run.name.roots.isdisjoint(_roots(prefix, run, casts)):
        prefix += "c"
    return prefix
