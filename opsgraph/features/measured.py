"""Plans by measured times: the planners by name, of which `optimal` takes what was measured best.

`python -m opsgraph tune` measures whole plans: those of `greedy` and of the shortest path, and each
of these with one fuser left out. The best one's name is kept under a key of all that the plan is
made from (`key`). A plan holds for every number of rows, so the key has none. The planner `optimal`
looks there first. A name that makes no plan here is as none.
"""

import re
from collections.abc import Mapping
from copy import copy
from hashlib import sha256

import torch

from ..kernels.choices import Choices, Measure, gpu, store
from ..kernels.cpu.choices import fastest, machine
from ..kernels.timing import fastest_on_cuda
from ..op import BACKWARD, FORWARD
from ..plan.claims import Claim, Space
from ..plan.planner import Cover, Planner, greedy
from .optimal import shortest, weighted

RULES = "rules 1"
"""Of keys and names: other rules' choices are not read."""
WITHOUT = " without "
MOST = 8
"""Plans that are measured for one key."""
_MADE: Mapping[str, Planner] = {"optimal": shortest, "greedy": greedy}
"""The first is the usual one."""


def optimal(space: Space) -> Cover:
    """The plan that was measured to be the fastest, else that of the shortest path."""
    kept = plans(space.program.request.x.device)
    name = kept.known(key(space)) if kept is not None and kept.all() else None
    if name is None or (found := named(space, name)) is None:
        return shortest(space)
    costs = {**shortest(space).costs, "measured": weighted(space, found)}
    base, _, left_out = name.partition(WITHOUT)
    for claim in _claims(_MADE[base](space)) if left_out else ():
        if claim.fuser.name == left_out:
            space.reject(claim, claim.direction, "plans without it were measured to be faster")
    return found._replace(costs=costs)


PLANNERS: Mapping[str, Planner] = {"greedy": greedy, "optimal": optimal}


def plans(device: torch.device) -> Choices | None:
    """The choices between plans on a device; None where there can be none."""
    measure: Measure
    if device.type == "cpu":
        where, measure = machine(), fastest
    elif device.type == "cuda" and torch.cuda.is_available():
        where, measure = gpu(device), fastest_on_cuda
    else:
        return None
    return store("plan", (*where, RULES), measure)


def key(space: Space) -> str:
    """All that a plan is made from: ops and their settings, the request, the fusers that fit."""
    program = space.program
    run, request = program.run, program.request
    ops = [kind.__qualname__ for kind in run.kinds], [op.settings() for op in run.ops]
    wiring = run.inputs, run.outputs, sorted(run.sources.items())
    recipe = sorted((where, repr(q)) for where, q in run.quantizers.items()), run.overrides
    asked = sorted(request.weights.items()), request.extras, sorted(request.gradients)
    modes = request.training, request.compute, sorted(request.late), sorted(request.accumulated)
    options = {k: v for k, v in request.options.items() if k != "planner"}
    claims = [
        (c.fuser.name, c.fuser.backend, c.level, c.rank, c.ops, way)
        for way in (FORWARD, BACKWARD)
        for gap in space.starting[way]
        for c in gap
    ]
    given = request.x, modes, sorted(options.items())
    whole = ops, wiring, recipe, asked, given, claims
    text = re.sub(r"(cuda', )index=\d+", r"\1", repr(whole))  # any of several GPUs
    digest = sha256(text.encode()).hexdigest()[:16]
    names = [kind.__name__ for kind in run.kinds]
    way = "training" if request.gradients else "inference"
    threads = f" threads {torch.get_num_threads()}" if request.x.device.type == "cpu" else ""
    return f"{', '.join(names)} {way} {request.x}{threads} {digest}"


def named(space: Space, name: str) -> Cover | None:
    """The cover of a name; None where it means nothing here."""
    base, _, left_out = name.partition(WITHOUT)
    if base not in _MADE:
        return None
    if not left_out:
        return _MADE[base](space)
    if left_out not in _fused(_MADE[base](space)):
        return None
    return _MADE[base](_without(space, left_out))


def candidates(space: Space) -> list[str]:
    """Names of covers that differ, the usual one first.

    A fuser of one op is left out only where another one, or PyTorch's product, stands in for it.
    """
    found: list[str] = []
    seen: list[object] = []
    for base, make in _MADE.items():
        whole = make(space)
        for fuser in (None, *_fused(whole)):
            cover = whole if fuser is None else make(_without(space, fuser))
            what = [(c.direction, c.fuser, c.ops) for c in _claims(cover)], cover.keeper.kept
            if what not in seen and not _worse(cover, whole) and len(found) < MOST:
                seen.append(what)
                found.append(base if fuser is None else f"{base}{WITHOUT}{fuser}")
    return found


def _worse(cover: Cover, whole: Cover) -> bool:
    """Whether an op runs by itself in a cover that has a kernel of its own in the whole one."""
    kernels = {(c.direction, c.ops) for c in _claims(whole) if not c.is_reference}
    alone = (c for c in _claims(cover) if c.is_reference)
    return any((c.direction, c.ops) in kernels and not _multiplies(c) for c in alone)


def _multiplies(claim: Claim) -> bool:
    return claim.program.kinds[claim.start].gemm


def _claims(cover: Cover) -> list[Claim]:
    return [*cover.forward, *cover.backward]


def _fused(cover: Cover) -> dict[str, None]:
    """Names of a cover's fusers, in order; ops that run by themselves have none."""
    return {claim.fuser.name: None for claim in _claims(cover) if not claim.is_reference}


def _without(space: Space, fuser: str) -> Space:
    """The space without a fuser's claims."""
    made = copy(space)
    made.rejected = {}
    for there in ("starting", "ending"):
        claims: dict[str, list[list[Claim]]] = getattr(space, there)
        left = {
            way: [[c for c in at if c.is_reference or c.fuser.name != fuser] for at in gaps]
            for way, gaps in claims.items()
        }
        setattr(made, there, left)
    return made
