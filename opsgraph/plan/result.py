"""`Plan`: the immutable result of planning, which can be run, printed, drawn and asked why."""

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
from ..op import BACKWARD, FORWARD, Spec
from .basic_ops import BasicOps
from .casting import with_casts
from .claims import Claim, Space
from .codegen import Functions, write
from .definitions import Input
from .lines import Line
from .planner import PLANNERS, Cover
from .prepare import Bind, Prepared, prepared, write_prepare
from .program import Program, Request
from .rejection import Rejection

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
    prepare_source: str
    """Empty without quantized weights."""
    run_forward: Callable[..., Any]
    run_backward: Callable[..., Any]
    run_prepare: Callable[..., Any]
    """Of weights and delayed scales: returns parts of quantized weights, and amaxes."""
    forward_lines: tuple[Line, ...] = field(repr=False, compare=False)
    """What `run_forward` does, as data."""
    backward_lines: tuple[Line, ...] = field(repr=False, compare=False)
    prepare_lines: tuple[Line, ...] = field(repr=False, compare=False)
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
    prepared: tuple[Prepared, ...]
    """Weights that are handed in quantized."""
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


def _signature(space: Space, cover: Cover, functions: Functions) -> Signature:
    program, definitions = space.program, functions.definitions
    run, request, inputs = program.run, program.request, definitions.inputs
    places = {argument.name: k for k, argument in enumerate(inputs)}
    last = (program.count, *run.outputs)
    outputs = [Output(s, s.factor.as_integer_ratio()) for s in (program.specs[g] for g in last)]
    same_rows = all(output.rows == (1, 1) for output in outputs)
    outputs += [Output(program.spec(name), (1, 1)) for name in program.reports]
    steps = (*cover.forward, *cover.backward, *run.outputs)
    identity = not steps and request.x == program.specs[-1] and program.x(program.count) == "x0"
    kinds = zip(program.kinds, program.still(FORWARD), strict=True)
    first = len(program.activations)
    saved = [Saved(n, definitions.spec(n), places.get(n)) for n in functions.saved]
    accumulated = {first + k for k in program.elsewhere.accumulated}
    return Signature(
        inputs,
        tuple(outputs),
        tuple(saved),
        first_weight=first,
        same_rows=same_rows,
        taps=tuple(k for k, i in enumerate(run.outputs, 1) if i in program.tapped),
        reports=len(program.reports),
        reported=tuple(k for k, argument in enumerate(inputs) if argument.amax),
        late=tuple(program.elsewhere.late),
        into_main_grad=tuple(
            (place, s.argument - first)
            for place, s in enumerate(saved)
            if s.argument in accumulated
        ),
        prepared=tuple(prepared(definitions)),
        training=bool(request.gradients) and program.flows[-1] and not identity,
        autocast=request.compute is not None,
        identity=identity,
        random=any(kind.random for kind, still in kinds if not still),
    )


def make_plan(
    run: BasicOps,
    request: Request,
    order: tuple[str, ...],
    planner: str,
    config: Config,
    bind: Bind,
) -> Plan:
    """Plan a run for one kind of call. Raises OpError or PlanError for what cannot be planned.

    bind: chooses what quantizes a weight, of the backends in `order`.
    """
    start = time.perf_counter()
    if planner not in PLANNERS:
        raise PlanError(f"got planner {planner!r}, expected one of {', '.join(PLANNERS)}")
    run = with_casts(run, request)
    program = Program(run, request)
    space = Space(program, order, config.fuel)
    cover = PLANNERS[planner](space)
    functions = write(space, cover, config.check)
    prepare = write_prepare(functions.definitions, bind)
    kept = sorted(cover.keeper.kept, key=lambda n: (space.place(n), n))
    plan = Plan(
        tuple(_step(claim, cover, space) for claim in cover.forward),
        tuple(_step(claim, cover, space) for claim in cover.backward),
        tuple(r for r in space.rejected.values() if not _taken(r, cover)),
        {name: space.size(name) for name in kept},
        cover.costs,
        functions.forward.source,
        functions.backward.source,
        prepare.source,
        functions.forward.call,
        functions.backward.call,
        prepare.call,
        functions.forward.lines,
        functions.backward.lines,
        prepare.lines,
        _signature(space, cover, functions),
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
        sources = plan.prepare_source, plan.forward_source, plan.backward_source
        print(*filter(None, sources), file=sys.stderr)


__all__ = ["Plan", "Step", "make_plan"]
