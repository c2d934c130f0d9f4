"""The proof of a plan: values and gradients beside those of the model's own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import OpsgraphError
from ...plan import Plan
from ...run.sequential import Sequential
from .build import CannotBuild, Places, ops_of
from .deferred import Unit
from .learn import Noted
from .replacing import original
from .states import Kind, State, Vector, units_of

ROWS, FEWER, WIDE = 24, 8, 512
"""Of probe values, and of those as wide as `WIDE`, which suffice for less time."""
DRAWS = 32
"""Of probe values at most: the errors of 16-bit values are summed over them until they suffice."""
SAMPLED = 2**16
"""Of a result, so many values' errors in 16 bits are summed at each draw."""
EXACT = 1e-5
"""How far fp32 values may differ, relative to the largest of their tensor."""
WORSE = 1.1
"""How much larger than the model's own the error of 16-bit values may be."""
HOPELESS = 1.5
"""Where no further draws are made."""
HALF = torch.float16, torch.bfloat16


@dataclass
class Proof:
    """What was measured. reason: why the plan is not taken, or None."""

    shown: list[str]
    reason: str | None = None
    fp32: float = 0.0
    """The largest difference in fp32, relative."""
    half: float = 0.0
    """The largest quotient of errors in 16 bits, that of the plan by that of the modules."""
    steps: str = ""
    saved: int = 0
    """Bytes that the plan keeps for each row."""
    saved_before: int = 0
    like: dict[Kind, list[tuple[int, torch.dtype]]] = field(default_factory=dict)
    """The width and dtype of each value on the way, by the kind of call."""


class Prover:
    """Builds and proves plans; what has the signature of a proven one is compared once.

    casts: whether fp32 values are to be taken under bf16 autocast.
    """

    def __init__(self, dtypes: Sequence[torch.dtype], casts: bool) -> None:
        self.dtypes, self.casts = dtypes, casts
        self.proofs: dict[Any, Proof] = {}
        self.of: dict[State, Proof] = {}

    def __call__(self, noted: Noted) -> str | None:
        """Build and prove the plan of a state, and give it to it; or the reason against it."""
        state = noted.state
        try:
            made = Sequential(*ops_of(state))
        except (CannotBuild, OpsgraphError) as error:
            return str(error)
        key = _signature(state, noted)
        if key not in self.proofs:
            self.proofs[key] = self._prove(noted)
        proof = self.of[state] = self.proofs[key]
        if proof.reason is not None:
            return proof.reason
        state.plan = made
        for kind, likes in proof.like.items():
            for before, like in zip(state.before(), likes, strict=True):
                before.like[kind] = like
        return None

    def _prove(self, noted: Noted) -> Proof:
        proof = Proof(_shown(noted.state))
        for dtype in self.dtypes:
            proof.reason = self._reason(noted, (dtype, None), proof)
            if proof.reason is not None:
                return proof
        if self.casts:  # without a reason against it: otherwise the modules run under autocast
            self._reason(noted, (torch.float32, torch.bfloat16), proof)
        return proof

    def _reason(self, noted: Noted, kind: Kind, proof: Proof) -> str | None:
        try:
            reason = _compare(noted, kind, proof)
        except Exception as error:  # whatever either raises, the plan is not taken
            reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            proof.like.pop(kind, None)
            return f"{kind[0]}".removeprefix("torch.") + f": {reason}"
        return None


def _shown(state: State) -> list[str]:
    shown: list[str] = []
    for op in ops_of(state):
        name = type(op).__name__
        home = next(iter(op._homes.values()), (None,))[0]
        if len(getattr(home, "layers", ())) > 1:
            name += "(gate, up)"
        if name == "Add":
            name = "add" if op.channels["other"] is None else ")"
        shown.append("residual(" if name == "Tee" else name)
    return shown


def steps_of(plan: Plan) -> str:
    backends = sorted({step.backend for step in (*plan.forward, *plan.backward)})
    return f"{len(plan.forward)}+{len(plan.backward)} steps: {', '.join(backends)}"


def _signature(state: State, noted: Noted) -> tuple[Any, ...]:
    """Equal for states that compute the same on parameters of equal shapes and dtypes."""
    order = {unit: k for k, unit in enumerate(units_of(state))}
    numbers: dict[State, int] = {}

    def step(state: State | None) -> Any:
        if state is None:
            return None
        if state in numbers:
            return numbers[state]
        numbers[state] = len(numbers)
        kind, what = state.step
        shown = order[what] if kind in ("module", "vector") else what
        return kind, shown, *map(step, state.inputs)

    leaves = [
        (id(getattr(unit, "leaf", None)), *[(tuple(p.shape), p.dtype, p.device) for p in held])
        for unit, held in ((unit, _held(unit)) for unit in order)
    ]
    return step(state), *leaves, noted.root.shape[-1]


def _held(unit: Any) -> list[Tensor]:
    return [unit.now()] if isinstance(unit, Vector) else list(unit.module.parameters())


def _examples(noted: Noted, dtype: torch.dtype, draw: int) -> list[Tensor]:
    """A root and extra inputs: the model's own rows, and larger ones."""
    found = []
    device = noted.root.device
    count = ROWS if noted.root.shape[-1] < WIDE else FEWER
    for k, tensor in enumerate((noted.root, *noted.extras)):
        generator = torch.Generator().manual_seed(8 * draw + k)
        rows = torch.randn(count, tensor.shape[-1], generator=generator)
        rows[count // 3 : count // 2] *= 10
        own = tensor.detach().reshape(-1, tensor.shape[-1])[: count // 3].float().cpu()
        rows[: len(own)] = own
        found.append(rows.to(device, dtype))
    return found


Results = list[Tensor | None]


def _results(
    f: Callable[..., Tensor], given: Sequence[Tensor], parameters: Sequence[Tensor],
    kept: AbstractContextManager[Any] | None = None,
) -> Results:  # fmt: skip
    """The result and its gradients. kept: is entered while the result is computed."""
    inputs = [tensor.clone().requires_grad_() for tensor in given]
    with torch.enable_grad(), kept or nullcontext():
        y = f(*inputs)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=torch.float64)
    dy = weights[torch.randperm(y.numel(), generator=torch.Generator().manual_seed(1))]
    with torch.enable_grad():
        # A sum, because a gradient that is given has torch import sympy, which takes a second.
        loss = (y * dy.view(y.shape).to(y.dtype)).sum()
        gradients = torch.autograd.grad(loss, [*inputs, *parameters], allow_unused=True)
    return [y.detach(), *gradients]


def _compare(noted: Noted, kind: Kind, proof: Proof) -> str | None:
    state, (dtype, cast) = noted.state, kind
    half = dtype in HALF or cast is not None
    device = noted.root.device.type
    units = units_of(state)
    ours, exact = _copies(units, dtype), _copies(units, torch.float64) if half else {}
    parameters, precise = _parameters(units, ours), _parameters(units, exact) if half else []
    plan = Sequential(*ops_of(state, ours))
    names = ["the result", "the input's gradient"]
    names += ["an added value's gradient"] * len(noted.extras)
    names += [f"the gradient of {name}" for name, _ in _named(units, ours)]
    errors = [Errors(cast or dtype) for _ in names]
    for draw in range(DRAWS if half else 1):
        given = _examples(noted, dtype, draw)
        kept = Kept(parameters)
        with torch.autocast(device, cast, enabled=cast is not None):
            hooks = torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda x: x)
            theirs = _results(_own(state, ours), given, parameters, hooks)
            found = _results(plan, given, parameters)
        doubles = [tensor.double() for tensor in given]
        true = _results(_own(state, exact), doubles, precise) if half else theirs
        if draw == 0:
            if cast is None:
                proof.saved_before = kept.bytes // len(given[0])
                made = plan.plan(True, given[0])
                proof.saved, proof.steps = made.saved_bytes_per_row, steps_of(made)
            with torch.no_grad(), torch.autocast(device, cast, enabled=cast is not None):
                values = state.run(given[0], given[1:], _Calls(ours))
            proof.like[kind] = [(values[s].shape[-1], values[s].dtype) for s in state.before()]
        for k, error in enumerate(errors):
            if (reason := error.add(found[k], theirs[k], true[k])) is not None:
                return f"{names[k]} {reason}"
        worst = max(error.worse for error in errors)
        if worst <= WORSE or (draw >= 3 and worst > HOPELESS):
            break
    for name, error in zip(names, errors, strict=True):
        if error.difference > EXACT and not half:
            return f"{name} differs by {error.difference:.1e}"
        if error.worse > WORSE and half:
            return f"{name} has {error.worse:.2f} of the module's error"
    if half:
        proof.half = max(proof.half, *(error.worse for error in errors))
    else:
        proof.fp32 = max(proof.fp32, *(error.difference for error in errors))
    return None


class Errors:
    """Of one result: the plan's and the modules', over draws."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.mine = self.own = self.size = self.difference = 0.0

    def add(self, mine: Tensor | None, own: Tensor | None, right: Tensor | None) -> str | None:
        """Take a draw; the reason where the plan's result is of another kind."""
        if mine is None or own is None or right is None:
            return None if mine is own is right else "is missing"
        if mine.shape != own.shape or mine.dtype != own.dtype:
            return f"has shape {tuple(mine.shape)} and {mine.dtype}, unlike the module's"
        if not bool(mine.isfinite().all()) and bool(own.isfinite().all()):
            return "is not finite"
        if self.dtype not in HALF:
            size = max(float(own.abs().max()), 1e-30)
            self.difference = max(self.difference, float((mine - own).abs().max()) / size)
            return None
        step = max(1, right.numel() // SAMPLED)
        mine, own, right = (t.reshape(-1)[::step].double() for t in (mine, own, right))
        self.mine += float((mine - right).abs().sum())
        self.own += float((own - right).abs().sum())
        self.size += float(right.abs().sum()) * torch.finfo(self.dtype).eps
        return None

    @property
    def worse(self) -> float:
        """The quotient of mean errors. Those far below the dtype's epsilon do not count."""
        floor = 0.02 * self.size
        return (self.mine + floor) / (self.own + floor) if self.own + floor else 1.0


def _copies(units: Sequence[Any], dtype: torch.dtype) -> Places:
    """Copies of what holds the parameters of units and vectors, in a dtype."""
    found: Places = {}
    for unit in units:
        if isinstance(unit, Vector):
            made = nn.Module()
            made.register_parameter(unit.attribute, nn.Parameter(unit.now().detach().to(dtype)))
        else:
            forward = unit.module.__dict__.pop("forward", None)
            try:
                made = copy.deepcopy(unit.module).to(dtype).eval()
            finally:
                if forward is not None:
                    unit.module.__dict__["forward"] = forward
        found[unit] = made.requires_grad_(True)
    return found


def _named(units: Sequence[Any], copies: Places) -> list[tuple[str, Tensor]]:
    return [
        (f"{unit.name}.{name}", parameter)
        for unit in units
        for name, parameter in copies[unit].named_parameters()
    ]


def _parameters(units: Sequence[Any], copies: Places) -> list[Tensor]:
    return [parameter for _, parameter in _named(units, copies)]


class _Calls:
    """Calls the copies in the place of units' modules."""

    def __init__(self, places: Places) -> None:
        self.places = places
        self.of = {unit.module: made for unit, made in places.items() if isinstance(unit, Unit)}

    def __call__(self, module: nn.Module, x: Tensor) -> Tensor:
        return original(self.of[module], x)  # type: ignore[no-any-return]


def _own(state: State, copies: Places) -> Callable[..., Tensor]:
    calls = _Calls(copies)
    return lambda root, *extras: state.run(root, extras, calls)[state]


class Kept:
    """How many bytes autograd keeps, parameters and views of the same memory apart."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self.seen = {p.untyped_storage().data_ptr() for p in parameters}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        where = tensor.untyped_storage().data_ptr()
        if where not in self.seen:
            self.seen.add(where)
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor
