"""`make_plan` and `Plan`: the immutable result of planning."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from ..op import BACKWARD, FORWARD, Op, Spec
from .basic_ops import BasicOps
from .claims import Claim, Space
from .codegen import write
from .planner import Cover, Planner
from .program import Program, Request
from .rejection import Rejection
from .writer import Definitions, Input


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
    """What runs in both passes, what is saved, what was refused and why; the functions as data."""

    forward: tuple[Step, ...]
    backward: tuple[Step, ...]
    rejected: tuple[Rejection, ...]
    saved: Mapping[str, int]
    """Bytes per row of every value that the forward keeps; parameters are not counted."""
    costs: Mapping[str, float]
    """Cost in weighted bytes per row of what each planner would have chosen."""
    labels: tuple[str, ...]
    """What errors call the op at each position: the one the user wrote."""
    kinds: tuple[str, ...]
    """The class of the basic op at each position."""
    numbers: tuple[str, ...]
    """What plans and sources call each op: its number, or "q2", "g2" for what a recipe adds."""
    planning_seconds: float = field(compare=False)
    """How long planning took."""
    ops: tuple[Op, ...] = field(repr=False, compare=False)
    """What the functions call `ops`: skeletons that hold no parameters."""
    functions: "Passes" = field(repr=False, compare=False)
    """The generated functions, which are `Function`s."""
    specs: "Signature"
    passes: "Passes" = field(repr=False, compare=False)
    """The same functions as calls run them: as they are, or replayed."""
    elsewhere: Any = None
    """Which weights' gradients go elsewhere, where features send some."""
    joined: Any = field(default=None, repr=False, compare=False)
    """Passes that also do what a recipe does around them, where features join them."""
    few: Any = field(default=None, repr=False, compare=False)
    """The backward of calls with few rows, where features order one (`features.ordered`)."""

    # Features set these: the texts of its functions, the last empty without quantized weights; a
    # picture, a networkx graph, its name to torch.compile; and `__str__`.
    forward_source: ClassVar[str]
    backward_source: ClassVar[str]
    prepare_source: ClassVar[str]
    draw: ClassVar[Callable[..., None]]
    graph: ClassVar[Any]
    handle: ClassVar[str]

    @property
    def saved_bytes_per_row(self) -> int:
        """Bytes kept for the backward, for each row of the input."""
        return sum(self.saved.values())


class Passes(NamedTuple):
    """What runs the passes of a plan."""

    forward: Any
    backward: Any
    prepare: Any
    """Of weights and delayed scales: returns parts of quantized weights, and amaxes."""


class Saved(NamedTuple):
    """A tensor that the forward keeps. argument: which of its inputs it is, None for none."""

    name: str
    spec: Spec
    argument: int | None


class Signature(NamedTuple):
    """What the generated functions take and return, for those who must know before they run."""

    inputs: tuple[Input, ...]
    outputs: tuple[Spec, ...]
    """y, the extra outputs, the amaxes that a recipe wants."""
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
    prepared: tuple[Any, ...]
    """Weights that are handed in quantized."""
    training: bool
    autocast: bool
    identity: bool
    """Whether the only output is the input, and so are their gradients: nothing is to be run."""
    random: bool
    """Whether the forward draws random numbers."""


def _step(claim: Claim, cover: Cover, space: Space) -> Step:
    program, backward = space.program, claim.direction == BACKWARD
    again = cover.keeper.again if backward else {}
    ends = set() if backward else {program.x[claim.start], program.x[claim.stop]}
    return Step(
        claim.fuser.name,
        claim.fuser.backend,
        claim.direction,
        claim.ops,
        tuple(name for name in claim.needs if name not in ends),
        tuple(sorted(claim.gives & cover.keeper.kept)),
        {name: again[name].claim.ops for name in claim.needs if name in again},
        (program.specs[claim.start], program.specs[claim.stop]),
        claim.where,
    )


def _signature(definitions: Definitions, taken: Sequence[str]) -> Signature:
    """taken: the variables that are saved."""
    program, inputs, cover = definitions.program, definitions.inputs, definitions.cover
    run, request = program.run, program.request
    places = {argument.name: k for k, argument in enumerate(inputs)}
    outputs = [program.specs[gap] for gap in (program.count, *run.outputs)]
    steps = (*cover.forward, *cover.backward, *run.outputs)
    identity = not steps and request.x == program.specs[-1] and program.x[-1] == "x0"
    kinds = zip(program.kinds, program.still[FORWARD], strict=True)
    return Signature(
        inputs,
        (*outputs, *map(program.spec, program.reports)),
        tuple(Saved(name, definitions.spec(name), places.get(name)) for name in taken),
        first_weight=len(program.activations),
        same_rows=all(spec.factor == 1 for spec in outputs),
        taps=tuple(k for k, i in enumerate(run.outputs, 1) if i in program.tapped),
        reports=len(program.reports),
        reported=tuple(k for k, argument in enumerate(inputs) if argument.amax),
        prepared=definitions.prepared,
        training=bool(request.gradients) and program.flows[-1] and not identity,
        autocast=request.compute is not None,
        identity=identity,
        random=any(kind.random for kind, still in kinds if not still),
    )


def make_plan(
    run: BasicOps,
    request: Request,
    order: tuple[str, ...],
    planner: Planner,
    fuel: int | None = None,
    definitions: Callable[[Space, Cover], Definitions] = Definitions,
) -> Plan:
    """Plan a run for one kind of call. Raises OpError or PlanError for what cannot be planned.

    order: backends, the preferred one first. fuel: how many fused claims may be admitted.
    definitions: with what features have to say, see `codegen`.
    """
    start = time.perf_counter()
    program = Program(run, request)
    space = Space(program, order, fuel)
    cover = planner(space)
    defined = definitions(space, cover)
    forward, backward, saved = write(defined)
    functions = Passes(forward, backward, defined.prepare())
    kept = sorted(cover.keeper.kept, key=lambda name: (program.values[name].place, name))
    return Plan(
        forward=tuple(_step(claim, cover, space) for claim in cover.forward),
        backward=tuple(_step(claim, cover, space) for claim in cover.backward),
        rejected=tuple(space.rejected.values()),
        saved={name: space.size(name) for name in kept},
        costs=cover.costs,
        labels=tuple(run.labels),
        kinds=tuple(kind.__name__ for kind in run.kinds),
        numbers=tuple(run.numbers),
        functions=functions,
        passes=functions,
        specs=_signature(defined, saved),
        ops=tuple(dict(zip(run.places, run.ops, strict=True)).values()),
        planning_seconds=time.perf_counter() - start,
    )
