"""`Plan`: the immutable result of planning, which can be run, printed, drawn and asked why."""

import itertools
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
    planning_seconds: float = field(compare=False)
    """How long planning took, with the source written and compiled."""

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
    def graph(self) -> "nx.MultiDiGraph[Any]":
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


class Input(NamedTuple):
    """An argument of the forward after `ops`: x, an extra input, a weight, or a part of one."""

    name: str
    spec: Spec | None
    """None for a parameter that the module does not have."""
    dims: int | None
    """Its dimensions inside the plan; None for as they are."""
    cast: bool
    """Whether the plan casts it before all else: what it saves is then not the argument itself."""
    gradient: bool
    """Whether the backward returns its gradient."""
    amax: bool
    """Whether it returns an amax in that place."""


class Output(NamedTuple):
    """A result of the forward: y, an extra output, or an amax that a recipe wants."""

    spec: Spec
    rows: tuple[int, int]
    """Its rows for rows of the input."""


class Saved(NamedTuple):
    """A tensor that the forward keeps. argument: which of its inputs it is, None for none."""

    name: str
    spec: Spec
    argument: int | None


class Signature(NamedTuple):
    """What the generated functions take and return, for those who must know before they run."""

    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    saved: tuple[Saved, ...]
    first_weight: int
    """Where the weights begin among the inputs."""
    same_rows: bool
    """Whether every output has the rows of the input."""
    taps: tuple[int, ...]
    """Which outputs' gradients, the first apart, the backward takes."""
    reports: int
    """How many of the outputs, the last ones, are amaxes."""
    reported: tuple[int, ...]
    """Which of the inputs get an amax in the place of their gradient."""
    late: tuple[int, ...]
    """Which weights' gradients wait for `backward_dw`: places among the weights."""
    into_main_grad: tuple[tuple[int, int], ...]
    """Weights whose gradients go into main_grad: places among what is saved, and the weights."""
    packed: tuple[tuple[int, tuple[str, ...]], ...]
    """Weights that are handed in quantized: their places among the weights, and the copies."""
    training: bool
    autocast: bool
    identity: bool
    """Whether the only output is the input, and so are their gradients: nothing is to be run."""
    random: bool
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
        spec = program.request.weights[variable]
        if spec is not None and not read.isdisjoint((variable, variable + STORED)):
            found[variable] = spec
        for parts in copies.weight_parts(i, name, BACKWARD).values():
            found |= dict(parts)
    return found


def _signature(space: Space, cover: Cover, saved: Mapping[str, Spec]) -> Signature:
    program, copies = space.program, Packing(space, cover)
    run, request = program.run, program.request
    inputs = _inputs(program, copies)
    places = {argument.name: k for k, argument in enumerate(inputs) if not argument.cast}
    values = list(saved)
    last = (program.count, *run.outputs)
    outputs = [Output(s, s.factor.as_integer_ratio()) for s in (program.specs[g] for g in last)]
    same_rows = all(output.rows == (1, 1) for output in outputs)
    outputs += [Output(space.spec(name), (1, 1)) for name in program.reports]
    steps = (*cover.forward, *cover.backward, *run.outputs)
    identity = not steps and request.x == program.specs[-1] and program.x(program.count) == "x0"
    kinds = zip(program.kinds, program.still(FORWARD), strict=True)
    return Signature(
        tuple(inputs),
        tuple(outputs),
        tuple(Saved(name, spec, places.get(name)) for name, spec in saved.items()),
        first_weight=len(program.activations),
        same_rows=same_rows,
        taps=tuple(k for k, i in enumerate(run.outputs, 1) if i in program.tapped),
        reports=len(program.reports),
        reported=tuple(k for k, argument in enumerate(inputs) if argument.amax),
        late=tuple(program.late),
        into_main_grad=tuple(
            (values.index(v), k) for k, v in program.accumulated.items() if v in saved
        ),
        packed=tuple((run.slots.index((i, name)), which) for i, name, which in copies.weights()),
        training=bool(request.gradients) and program.flows[-1] and not identity,
        autocast=request.compute is not None,
        identity=identity,
        random=any(kind.random for kind, still in kinds if not still),
    )


def _inputs(program: Program, copies: Packing) -> list[Input]:
    """The forward's arguments, in order."""
    dims = (2, *(program.extra_dims(*place) for place in program.run.inputs))
    arguments = program.arguments | dict(copies.parameters)
    inputs: list[Input] = []
    for (name, spec), size in itertools.zip_longest(arguments.items(), dims):
        amax = name in program.reported
        wanted = name in program.request.gradients or amax
        cast = name in program.casts and len(inputs) < len(dims)  # a weight is saved as it comes
        inputs.append(Input(name, spec, size, cast, wanted, amax))
    return inputs


def make_plan(
    run: Run, request: Request, order: tuple[str, ...], planner: str, config: Config
) -> Plan:
    """Plan a run for one kind of call. Raises OpError or PlanError for what cannot be planned."""
    start = time.perf_counter()
    if planner not in PLANNERS:
        raise PlanError(f"got planner {planner!r}, expected one of {', '.join(PLANNERS)}")
    run = with_casts(run, request)
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
        time.perf_counter() - start,
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
        print(f"{plan}\nplanned in {plan.planning_seconds * 1e3:.1f} ms", file=sys.stderr)
    if "reject" in config.logs:
        for refused in plan.rejected:
            ops, name, direction, reason = refused
            who = f"{name} of {refused.backend}" if refused.backend else name
            print(f"opsgraph: {ops} {who} ({direction}): {reason}", file=sys.stderr)
    if "code" in config.logs:
        print(plan.forward_source, plan.backward_source, file=sys.stderr)


__all__ = ["Plan", "Step", "make_plan"]
