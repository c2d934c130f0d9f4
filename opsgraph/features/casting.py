"""Where autocast's dtype begins: casts after the start of a residual stream.

Under torch.autocast a run computes in autocast's dtype from its input on. A residual stream is
older than that: in `x + f(x)` PyTorch's sum has the dtype of x. So what only passes the stream on,
Tee and Add, leaves it in the dtype it comes in. A norm reads it so, and rounds y alone; a `Cast`
stands before each other op that computes on it. Where no stream is in another dtype, the input is
cast once and nothing is inserted.

What an op promotes with, as a sum of two dtypes does, gets a gradient of its own dtype, as x does.

The hooks are `Request.casts`, the run that `make_plan` is given and `Definitions.after`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ..guards.names import root
from ..op import BACKWARD, FORWARD, Op, Placed, Spec
from ..op.functions import identity, passes, promotes, said
from ..ops.norms import LayerNorm, RMSNorm
from ..ops.quantize import Quantize
from ..plan.basic_ops import BasicOps
from ..plan.claims import Claim
from ..plan.lines import Line, literal, value
from ..plan.program import Program, Request
from ..plan.writer import Writer


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
    streams = _streams(run, request, compute)
    changes = _changes(run, request, compute, request.x.dtype if streams else compute)
    run = _changed(run, changes) if changes else run
    return run, replace(request, casts=_cast_arguments(run, request, compute, streams))


def _changed(run: BasicOps, changes: Mapping[int, Op]) -> BasicOps:
    prefix, entries = _prefix(run, changes), list[Placed]()
    for i, entry in enumerate(run.entries):
        change = changes.get(i)
        if isinstance(change, Cast):
            entries.append(Placed(Cast, change, entry.label, prefix))
        elif change is not None:
            entry = entry._replace(op=change)
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


def _streams(run: BasicOps, request: Request, compute: torch.dtype) -> bool:
    """Whether a Tee or an Add passes on what has another dtype."""
    if not any(kind.taps or promotes(kind) for kind in run.kinds):
        return False
    found = list[bool]()
    _changes(run, request, compute, request.x.dtype, found)
    return any(found)


def _changes(
    run: BasicOps, request: Request, compute: torch.dtype, dtype: torch.dtype,
    streams: list[bool] | None = None,
) -> dict[int, Op]:  # fmt: skip
    """Casts by the op that they stand before, and norms that take the place of an op.

    dtype: of x where the run begins. streams: takes whether each op passes another dtype on. A norm
    reads a stream as it is, as under PyTorch's autocast, and rounds its y to autocast's dtype.
    """
    extras = {
        (i, name): spec.dtype for (i, name, _), spec in zip(run.inputs, request.extras, strict=True)
    }
    dtypes, changes = list[torch.dtype](), dict[int, Op]()
    quantized = Quantize in run.kinds  # whose kernels read norms of their own dtype
    for i, (kind, op) in enumerate(zip(run.kinds, run.ops, strict=True)):
        dtypes.append(dtype)
        for name in promotes(kind):
            source = run.sources.get((i, name))
            other = extras[i, name] if source is None else dtypes[source]
            dtype = torch.promote_types(dtype, other)
        passed = bool(promotes(kind)) or identity(kind, op, FORWARD, request.training[i])
        ours = kind.fwd in _NORMS and not quantized
        if dtype != compute and not passed and not ours:
            changes[i], dtype = Cast(compute, dtype), compute
        if promotes(kind):  # a weight may do so, too
            dtype = _result(run, request, i, dtype)
        if streams is not None:
            streams.append(dtype != compute and (kind.taps or bool(promotes(kind))))
        if not passed:
            made = _result(run, request, i, dtype)
            if ours and (made != compute or dtype != compute):
                changes[i], made = cast(Any, op).rounded_once(compute), compute
            dtype = made
    return changes


_NORMS = {RMSNorm.fwd, LayerNorm.fwd}


def _result(run: BasicOps, request: Request, i: int, dtype: torch.dtype) -> torch.dtype:
    """The dtype of what an op makes of such an x."""
    kind = run.kinds[i]
    own = {name: request.weights.get(run.name(name, i)) for name in said(kind, "typed_by")}
    others = {name: spec.dtype for name, spec in own.items() if spec}
    return kind.result(run.ops[i], dtype, others) if others else dtype


def _roots(prefix: str, run: BasicOps, changes: Mapping[int, Op]) -> set[str]:
    """The roots of what casts add to the source."""
    casts = (i for i, change in changes.items() if isinstance(change, Cast))
    numbers = [f"{prefix}{run.edges[i]}" for i in casts]
    return {root(f"{word}{number}") for number in numbers for word in ("x", "d", "dy")}


def _prefix(run: BasicOps, changes: Mapping[int, Op]) -> str:
    """What stands before a cast's number: "c", or more of them where a name has that already."""
    prefix = "c"
    while not run.name.roots.isdisjoint(_roots(prefix, run, changes)):
        prefix += "c"
    return prefix


def promoted(program: Program, i: int) -> dict[str, torch.dtype]:
    """What an op's gradients are cast to behind its backward, by their names, `dx` among them."""
    kind = program.kinds[i]
    if passes(kind) or not promotes(kind):
        return {}
    dtypes: dict[str | None, torch.dtype] = {"dx": program.specs[i].dtype}
    for name in promotes(kind):
        dtypes[program.gradient(i, name)] = program.spec(program.extra(i, name)).dtype
    made = program.specs[i + 1].dtype
    return {name: dtype for name, dtype in dtypes.items() if name and dtype != made}


def in_their_dtypes(
    writer: Writer, claim: Claim, lines: Sequence[Line], again: bool = False
) -> Sequence[Line]:
    """The lines of a step, and casts of gradients behind what has promoted."""
    if writer.direction != BACKWARD or again:
        return lines
    dtypes = {i: promoted(writer.program, i) for i in claim.ops}
    if not any(dtypes.values()):
        return lines
    made, casts = {name for line in lines for name in line.makes}, list[Line]()
    for i, own in dtypes.items():
        for name, dtype in own.items():
            if name == "dx" and i != claim.start:
                continue
            there = made & {name, f"{name}_more"}
            casts += (Line("cast", (value(n), literal(dtype)), n) for n in sorted(there))
    return [*lines, *casts]
