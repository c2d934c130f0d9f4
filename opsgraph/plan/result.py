"""`Plan`: the immutable result of planning, which can be run, printed, drawn and asked why."""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import Config
from ..errors import PlanError
from ..guards.cached import cached_property
from ..op import BACKWARD, FORWARD, STORED, Spec
from .casting import with_casts
from .check import reference_calls
from .claims import Claim, Space
from .codegen import write_backward, write_forward
from .planner import PLANNERS, Cover
from .program import Program, Request
from .quantized import Packing
from .rejection import Rejection
from .run import Run

if TYPE_CHECKING:
    import networkx as nx

_handles: Counter[str] = Counter()


class Step(NamedTuple):
    """One step of a plan. `ops` are the positions it covers; `again` maps remade needs to ops."""

    name: str
    backend: str
    direction: str
    ops: tuple[int, ...]
    needs: tuple[str, ...]
    saves: tuple[str, ...]
    again: Mapping[str, tuple[int, ...]]
    edges: tuple[Spec, Spec]
    where: str
    """The ops as plans show them: `3`, `3-5`, `1-q2`."""


@dataclass(frozen=True)
class Plan:
    """What runs, forward and backward, what is saved, and what was refused and why."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    rejected: tuple[Rejection, ...]
    saved: Mapping[str, int]
    """Bytes per row of every value that the forward keeps; parameters are not counted."""
    costs: Mapping[str, float]
    """Cost in weighted bytes per row of what each planner would have chosen."""
    forward_source: str
    backward_source: str
    run_forward: Callable[..., Any]
    run_backward: Callable[..., Any]
    specs: "Signature"
    labels: tuple[str, ...]
    """What errors call the op at each position: the one the user wrote."""
    kinds: tuple[str, ...]
    """The class of the basic op at each position."""
    numbers: tuple[str, ...]
    """What plans and sources call each op: its number, or "q2", "g2" for what a recipe adds."""

    @property
    def saved_bytes_per_row(self) -> int:
        """Bytes kept for the backward, for each row of the input."""
        return sum(self.saved.values())

    @cached_property
    def handle(self) -> str:
        """By which the opaque ops of torch.compile find the plan.

        It tells what the plan is: compilers keep graphs on disk, for other processes.
        """
        content = repr((self.kinds, self.forward_source, self.backward_source, self.specs))
        digest = sha256(content.encode()).hexdigest()[:16]
        _handles[digest] += 1
        return f"{digest}-{_handles[digest]}"

    @property
    def graph(self) -> "nx.DiGraph[Any]":
        """Gaps as nodes, an edge for every claim taken or refused."""
        from .show import graph

        return graph(self)

    def draw(self, path: str | Path) -> None:
        """Write a picture: ops, steps taken, steps refused. The ending (.svg, .html) decides."""
        from .show import draw

        draw(self, Path(path))

    def __str__(self) -> str:
        from .show import table

        return table(self)


class Signature(NamedTuple):
    """Specs of what the generated functions return, for those who must know before running."""

    outputs: tuple[Spec, ...]
    saved: tuple[tuple[str, Spec], ...]
    """Saved values and weights, in order; those that are inputs are in `inputs` too."""
    names: tuple[str, ...]
    """The forward's arguments after `ops`."""
    ratios: tuple[tuple[int, int], ...] | None
    """Rows of each output for rows of the input, None where they are the same."""
    dims: tuple[int | None, ...]
    """Of the input and the extra inputs: dimensions inside the plan, None for as they are."""
    absent: tuple[bool, ...]
    """Which of them are None: parameters that a module does not have."""
    inputs: tuple[str, ...]
    """Arguments that the plan uses as they are, not cast."""
    gradients: tuple[Spec | None, ...]
    taps: tuple[int, ...]
    """Which outputs' gradients, the first apart, the backward takes."""
    training: bool
    autocast: bool
    late: tuple[int, ...]
    """Which weights' gradients wait for `backward_dw`: places among the weights."""
    stored: tuple[tuple[int, int], ...]
    """Saved weights whose gradients go into main_grad: places among what is saved, and weights."""
    packed: tuple[tuple[int, tuple[str, ...]], ...] = ()
    """Weights that are handed in quantized: their places among the weights, and the copies."""
    parts: tuple[str, ...] = ()
    """The last arguments: the parts of those weights."""
    reports: int = 0
    """How many amaxes follow the outputs."""
    reported: tuple[int, ...] = ()
    """Which of the arguments get an amax in the place of their gradient."""
    identity: bool = False
    """Whether the only output is the input, and so are their gradients: nothing is to be run."""
    random: bool = False
    """Whether the forward draws random numbers."""


def _step(claim: Claim, cover: Cover, space: Space) -> Step:
    again = {
        name: cover.keeper.again[name].claim.ops
        for name in claim.needs
        if claim.direction == BACKWARD and name in cover.keeper.again
    }
    program = space.program
    start, stop = program.x(claim.start), program.x(claim.stop)
    named = {start, stop} if claim.direction == FORWARD else set()
    return Step(
        claim.fuser.name,
        claim.fuser.backend,
        claim.direction,
        claim.ops,
        tuple(n for n in claim.needs if n not in named),
        tuple(sorted(claim.gives & cover.keeper.kept)),
        again,
        (program.specs[claim.start], program.specs[claim.stop]),
        claim.where,
    )


def _saved_specs(space: Space, cover: Cover, check: bool) -> dict[str, Spec]:
    """Kept values by place, then the weights that backward calls read; quantized ones in parts."""
    program, copies = space.program, Packing(space, cover)
    found: dict[str, Spec] = {}
    for name in sorted(cover.keeper.kept, key=lambda n: (space.place(n), n)):
        found |= dict(copies.kept[name][1]) if name in copies.kept else {name: space.spec(name)}
    calls = [call for claim in cover.backward for call in claim.calls]
    calls += [remake.call for remake in cover.keeper.again.values()]
    if check:
        calls += [call for claim in cover.backward for call in reference_calls(space, claim)]
    read = {a.text for c in calls for a in c.arguments if a.category == "weight"}
    for (i, name), variable in program.weight_names.items():
        spec = program.request.weights[i, name]
        if spec is not None and not read.isdisjoint((variable, variable + STORED)):
            found[variable] = spec
        for parts in copies.weight_parts(i, name, BACKWARD).values():
            found |= dict(parts)
    return found


def _signature(space: Space, cover: Cover, saved: Mapping[str, Spec]) -> Signature:
    program, copies = space.program, Packing(space, cover)
    run, request = program.run, program.request
    last = (program.count, *run.outputs)
    weights = {v: request.weights[slot] for slot, v in program.weight_names.items()}
    weights |= dict(copies.parameters)
    given: dict[str, Any] = {"x0": request.x, **program.extra_specs, **weights}
    wanted = request.gradients | program.reported
    places = list(saved)
    ratios = tuple(program.specs[gap].factor.as_integer_ratio() for gap in last)
    cast = {
        name
        for name, spec in given.items()
        if request.compute is not None
        and name not in weights
        and name not in program.uncast
        and spec.dtype != request.compute
    }
    kinds = zip(program.kinds, program.still_forward, strict=True)
    steps = (*cover.forward, *cover.backward, *run.outputs)
    identity = not steps and request.x == program.specs[-1] and program.x(program.count) == "x0"
    return Signature(
        (*(program.specs[gap] for gap in last), *map(space.spec, program.reports)),
        tuple(saved.items()),
        tuple(given),
        None if set(ratios) == {(1, 1)} else ratios,
        (2, *(program.extra_dims(*place) for place in run.inputs)),
        tuple(spec is None for spec in given.values()),
        tuple(name for name in given if name not in cast),
        tuple(spec if name in wanted else None for name, spec in given.items()),
        tuple(k for k, i in enumerate(run.outputs, 1) if i in program.tapped),
        bool(request.gradients) and program.flows[-1] and not identity,
        request.compute is not None,
        program.late,
        tuple((places.index(v), k) for k, v in program.accumulated.items() if v in saved),
        tuple((run.slots.index((i, name)), which) for i, name, which in copies.weights()),
        tuple(name for name, _ in copies.parameters),
        len(program.reports),
        tuple(k for k, name in enumerate(given) if name in program.reported),
        identity,
        any(kind.random for kind, still in kinds if not still),
    )


def make_plan(
    run: Run, request: Request, order: tuple[str, ...], planner: str, config: Config
) -> Plan:
    """Plan a run for one kind of call. Raises OpError or PlanError for what cannot be planned."""
    if planner not in PLANNERS:
        raise PlanError(f"got planner {planner!r}, expected one of {', '.join(PLANNERS)}")
    run, request = with_casts(run, request)
    program = Program(run, request)
    space = Space(program, order, config.fuel)
    cover = PLANNERS[planner](space)
    saved = _saved_specs(space, cover, config.check)
    forward = write_forward(space, cover, list(saved), config.check)
    backward = write_backward(space, cover, list(saved), config.check)
    kept = sorted(cover.keeper.kept, key=lambda n: (space.place(n), n))
    plan = Plan(
        tuple(_step(claim, cover, space) for claim in cover.forward),
        tuple(_step(claim, cover, space) for claim in cover.backward),
        tuple(r for r in space.rejected.values() if not _taken(r, cover)),
        {name: space.size(name) for name in kept},
        cover.costs,
        forward.source,
        backward.source,
        forward.call,
        backward.call,
        _signature(space, cover, saved),
        tuple(run.labels),
        tuple(kind.__name__ for kind in run.kinds),
        tuple(run.numbers),
    )
    _log(plan, config)
    return plan


def _taken(rejection: Rejection, cover: Cover) -> bool:
    """A claim that was refused on the way and taken in the end is no refusal."""
    steps = cover.forward if rejection.direction == FORWARD else cover.backward
    which = rejection.ops, rejection.name, rejection.backend
    return any((c.ops, c.fuser.name, c.fuser.backend) == which for c in steps)


def _log(plan: Plan, config: Config) -> None:
    if "plan" in config.logs:
        print(plan, file=sys.stderr)
    if "reject" in config.logs:
        for refused in plan.rejected:
            ops, name, direction, reason = refused
            who = f"{name} of {refused.backend}" if refused.backend else name
            print(f"opsgraph: {ops} {who} ({direction}): {reason}", file=sys.stderr)
    if "code" in config.logs:
        print(plan.forward_source, plan.backward_source, file=sys.stderr)


__all__ = ["Plan", "Step", "make_plan"]
