"""What a planner plans: a `Run` of lowered ops, and a `Program`, that run for one kind of call.

Values are variables. `x3` is the value before op 3, `rstd1` what op 1 saves, `weight3` its
parameter, `other5` its extra input, `dx` the gradient that flows, `d0` the one that Tee 0 collects.
Where ops are dropped, several gaps share one value, named after the first of them.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, NamedTuple

import torch

from ..errors import OpError
from ..guards.cached import cached_property
from ..guards.constants import called, literal, plain
from ..op import (
    BACKWARD,
    FORWARD,
    ROWS,
    STORED,
    Op,
    Spec,
    Storage,
    arguments,
    differentiable,
    weights,
)
from ..op.functions import checked_out, function, identity, passes, promotes, saved
from .names import root, variable
from .run import Run

INPUT, GAP, SAVED, PRIVATE = "input", "gap", "saved", "private"


class Value(NamedTuple):
    """A value by its name. place: where it comes into being, a position or gap of the program."""

    kind: str
    """INPUT: x0 or an extra input; GAP: between two ops; SAVED by an op; PRIVATE to a fuser."""
    place: int
    spec: Spec | None
    """None until somebody asks, of what an op saves."""


HIGH_PRECISION = "high_precision"
"""An override: the backward multiplies what the forward had before it quantized."""


class Argument(NamedTuple):
    """One argument of a call: its category and the text that stands in the source."""

    category: str  # "op", "value", "weight", "gradient", "literal" or "object"
    text: str
    moved: bool = False
    """Whether the callee is handed it in a list of one, from which it takes it."""
    value: Any = None
    """A constant without a literal, which gets a name in the source's globals."""


@dataclass(frozen=True)
class Request:
    """What distinguishes one kind of call from another: all that changes what is right."""

    x: Spec
    extras: tuple[Spec, ...]
    weights: Mapping[str, Spec | None]
    """By name, as `gradients`; None for a parameter that the module does not have."""
    gradients: frozenset[str]
    """Names of the inputs and weights that need gradients: x0, other5, weight3."""
    training: tuple[bool, ...]
    compute: torch.dtype | None = None
    """The dtype of an active autocast."""
    options: Mapping[str, Any] = field(default_factory=dict)


class Program:
    """A run as one request sees it: specs, dropped ops, and what every name means."""

    def __init__(self, run: Run, request: Request) -> None:
        self.run, self.request = run, request
        self.kinds, self.ops, self.labels = run.kinds, run.ops, run.labels
        count = len(self.kinds)
        training = [request.training[place] for place in run.places]
        identity = [
            {d: op_identity(run, i, d, training[i]) for d in (FORWARD, BACKWARD)}
            for i in range(count)
        ]
        self.still_forward = [entry[FORWARD] for entry in identity]
        self.numbers, self.name = run.numbers, run.name
        self.inputs = [self.name(name, i) for i, name, _ in run.inputs]
        self.uncast = {self.name(n, i) for i, n, _ in run.inputs if n in self.kinds[i].as_stored}
        self.uncast |= {self.name(n, i) for i, n, _ in run.inputs if n in promotes(self.kinds[i])}
        self.uncast |= {"x0"} if run.streams else set()
        self.extra_specs = dict(zip(self.inputs, request.extras, strict=True))
        self.weight_names = {(i, name): self.name(name, i) for i, name in run.slots}
        self.canonical = [0] * (count + 1)
        for gap in range(1, count + 1):
            still = self.still_forward[gap - 1]
            self.canonical[gap] = self.canonical[gap - 1] if still else gap
        self.specs = self._propagate()
        self.flows = self._flow()
        self.gaps = {f"x{run.edges[gap]}": gap for gap in range(count, -1, -1)}
        self.values = {name: Value(GAP, gap, self.specs[gap]) for name, gap in self.gaps.items()}
        self.values["x0"] = Value(INPUT, 0, self.specs[0])
        for name, spec in self.extra_specs.items():
            self.values[name] = Value(INPUT, 0, spec)
        for i, kind in enumerate(self.kinds):
            for name in kind.saves:
                self.values[self.name(name, i)] = Value(SAVED, i, None)
        self.roots = set(run.name.roots)
        """Roots of all variables, see `names`."""
        self._private: dict[Hashable, str] = {}
        self._resolved: dict[tuple[int, str, str], Argument | None] = {}
        self.tapped = self._taps()
        self.still_backward = [
            entry[BACKWARD] or bool(passes(kind)) or (kind.taps and i not in self.tapped)
            for i, (entry, kind) in enumerate(zip(identity, self.kinds, strict=True))
        ]

    @property
    def count(self) -> int:
        """The number of lowered ops."""
        return len(self.kinds)

    def still(self, direction: str) -> list[bool]:
        """Which ops do nothing in a pass."""
        return self.still_forward if direction == FORWARD else self.still_backward

    def _propagate(self) -> list[Spec]:
        x = self.request.x
        if not x.dtype.is_floating_point:
            raise OpError(self.labels[0] if self.labels else "input", f"dtype {x.dtype}", "a float")
        if self.request.compute is not None and not self.run.streams:
            x = x.like(dtype=self.request.compute)
        specs = [x]
        for i, (kind, op) in enumerate(zip(self.kinds, self.ops, strict=True)):
            if reason := kind.reject(op, x):
                raise OpError(self.labels[i], *reason.removeprefix("got ").split(", expected ", 1))
            for name in weights(kind):
                self._check_weight(i, kind, name, x)
            for name in kind.extra_inputs:
                self._check_extra(i, kind, name, x, specs)
            if not self.still_forward[i]:
                made = checked_out(kind, op, x, self.labels[i])
                for dtype in self.promoted(i, specs):
                    made = made.like(dtype=torch.promote_types(made.dtype, dtype))
                x = _rows_times(made, self.run.factors[i + 1])
            specs.append(x)
        return specs

    def _check_weight(self, i: int, kind: type[Op], name: str, x: Spec) -> None:
        spec = self.request.weights[self.name(name, i)]
        if spec is None:
            return
        if spec.device != x.device:
            raise OpError(self.labels[i], f"input on {x.device}", f"{spec.device}, where {name} is")
        if name in kind.as_stored or self.request.compute is not None:
            return
        if spec.dtype.is_complex or not (spec.dtype.is_floating_point or name not in kind.required):
            raise OpError(self.labels[i], f"{name} dtype {spec.dtype}", "a float")
        if spec.dtype.is_floating_point and spec.dtype != x.dtype:
            raise OpError(
                self.labels[i],
                f"input dtype {x.dtype}",
                f"{spec.dtype}, the dtype of {name} (or an active autocast)",
            )

    def _check_extra(
        self, i: int, kind: type[Op], name: str, x: Spec, before: Sequence[Spec]
    ) -> None:
        source = self.run.sources.get((i, name))
        if source is None:
            spec = _rows_times(self.extra_specs[self.name(name, i)], x.factor)
            self.extra_specs[self.name(name, i)] = spec
        else:
            spec = before[source]
        expected = kind.extra_spec(self.ops[i], name, x)
        if expected is None:
            return
        if spec.device != x.device:
            raise OpError(self.labels[i], f"{name} on {spec.device}", str(x.device))
        expected = _rows_times(expected, x.factor)
        if (spec.shape, spec.factor) != (expected.shape, expected.factor):
            raise OpError(self.labels[i], f"{name} {spec}", str(expected))
        if name in promotes(kind) and not spec.dtype.is_floating_point:
            raise OpError(self.labels[i], f"{name} dtype {spec.dtype}", "a float")
        if name in (*kind.as_stored, *promotes(kind)):
            return
        if spec.dtype != expected.dtype and self.request.compute is None:
            raise OpError(self.labels[i], f"{name} dtype {spec.dtype}", str(expected.dtype))

    def promoted(self, i: int, specs: Sequence[Spec] | None = None) -> list[torch.dtype]:
        """The dtypes with which that of op i's output is promoted."""
        found = []
        for name in promotes(self.kinds[i]):
            source = self.run.sources.get((i, name))
            spec = self.extra_specs[self.name(name, i)] if source is None else None
            found.append((spec or (specs or self.specs)[source]).dtype)  # type: ignore[index]
        return found

    def extra_dims(self, i: int, name: str, _: str | None) -> int | None:
        """The dimensions that an extra input has inside the plan; None: it is not flattened."""
        spec = self.kinds[i].extra_spec(self.ops[i], name, self.specs[i])
        return None if spec is None or ROWS not in spec.shape else len(spec.shape)

    def _flow(self) -> list[bool]:
        """For each gap, whether the gradient of its value is needed."""
        wanted = self.request.gradients
        flows = ["x0" in wanted]
        for i, kind in enumerate(self.kinds):
            names = (self.name(name, i) for name in weights(kind) + kind.extra_inputs)
            own = any(name in wanted for name in names)
            read = any(flows[source] for (j, _), source in self.run.sources.items() if j == i)
            flows.append(flows[-1] or own or read)
        return flows

    def _taps(self) -> set[int]:
        """Tees at which a gradient arrives and is needed."""
        found = {i for i in self.run.outputs if self.flows[i]}
        return found | {s for s in self.run.sources.values() if self.flows[s]}

    # -- names --

    def x(self, gap: int) -> str:
        """The name of the value at a gap."""
        return f"x{self.run.edges[self.canonical[gap]]}"

    def extra(self, i: int, name: str) -> str:
        """The value of an extra input: a Tee's, or an input of the run."""
        source = self.run.sources.get((i, name))
        return self.name(name, i) if source is None else self.x(source)

    def tee(self, i: int) -> str:
        """The gradient that a Tee collects."""
        return self.name("d", i)

    def resolve(self, i: int, name: str, direction: str = FORWARD) -> Argument | None:
        """What a name of op i stands for in a pass; None if its class has no such name."""
        place = i, name, direction
        if place not in self._resolved:
            self._resolved[place] = self._resolve(i, name, direction)
        return self._resolved[place]

    def _resolve(self, i: int, name: str, direction: str) -> Argument | None:
        kind, op = self.kinds[i], self.ops[i]
        if name == "x" and direction == BACKWARD and self.run.overrides.get(i) == HIGH_PRECISION:
            return Argument("value", self.x(i - 1))  # what its Quantize read
        if name == "":
            return Argument("op", f"ops[{self.run.places[i]}]")
        if name == "x":
            return Argument("value", self.x(i))
        if name == "y":
            return Argument("value", self.x(i + 1))
        if name == "dy":
            return Argument("gradient", "dx")
        if name == "d" and kind.taps:
            return Argument("gradient", self.tee(i))
        if name in kind.saves:
            return Argument("value", self.name(name, i))
        if name in kind.constants:
            value = plain(op.constant(name, self.specs[i]))
            text = literal(value)
            if text is None:
                return Argument("object", f"<{called(value)}>", value=value)
            return Argument("literal", text)
        if name in kind.extra_inputs:
            return Argument("value", self.extra(i, name))
        if name.endswith(STORED) and (i, name.removesuffix(STORED)) in self.weight_names:
            weight = name.removesuffix(STORED)
            cast = self.casts(i, weight) and not self.packed(i, weight, direction)
            return Argument("weight", self.name(weight, i) + (STORED if cast else ""))
        if (i, name) in self.weight_names:
            if self.request.weights[self.name(name, i)] is None:
                return Argument("literal", "None")
            packed = "q" if self.packed(i, name, direction) else ""
            return Argument("weight", packed + self.weight_names[i, name])
        return None

    def packed(self, i: int, name: str, direction: str) -> bool:
        """Whether a weight is quantized in a pass."""
        plain = direction == BACKWARD and self.run.overrides.get(i) == HIGH_PRECISION
        return (i, name) in self.run.quantizers and not plain

    def storages(self, i: int) -> tuple[Storage | None, ...]:
        """How x, the weight and the gradient of a quantized linear layer are stored."""
        after = self.ops[i + 1] if i + 1 < self.count and self.kinds[i + 1].packs_gradient else None
        dy: Any = None if after is None else after.quantizer
        weight = self.run.quantizers[i, "weight"].storage
        return self.specs[i].storage, weight, None if dy is None else dy.storage

    def casts(self, i: int, name: str) -> bool:
        """Whether an active autocast has a weight cast."""
        spec, compute = self.request.weights[self.name(name, i)], self.request.compute
        if spec is None or compute is None or name in self.kinds[i].as_stored:
            return False
        return spec.dtype.is_floating_point and spec.dtype != compute

    def gradient(self, i: int, name: str) -> str | None:
        """The gradient of what op i calls a name; None if it is not wanted, or there is no such."""
        if name not in differentiable(self.kinds[i]):
            return None
        source = self.run.sources.get((i, name))
        if source is not None:
            return self.tee(source) if source in self.tapped else None
        value = self.name(name, i)
        wanted = value in self.request.gradients or value in self.reported
        return f"d{value}" if wanted else None

    def gradient_names(self, i: int) -> list[str | None]:
        """Names of op i's gradients after dx, in `bwd`'s order; None for those not wanted."""
        return [self.gradient(i, name) for name in differentiable(self.kinds[i])]

    @cached_property
    def reports(self) -> list[str]:
        """amaxes that the forward hands out after its outputs."""
        return [self.name("amax", i) for i in self._delayed("amax")]

    @cached_property
    def reported(self) -> set[str]:
        """Scales in whose place the backward returns the amax that it saw."""
        return {self.name("scale", i) for i in self._delayed("dy") if self.flows[i + 1]}

    def _delayed(self, name: str) -> list[int]:
        """Ops with delayed scales that save `name`, or whose backward takes it."""
        return [
            i
            for i, (kind, op) in enumerate(zip(self.kinds, self.ops, strict=True))
            if getattr(getattr(op, "quantizer", None), "delayed", False)
            and (name in kind.saves or any(name in arguments(f) for f in _by_hand(kind)))
        ]

    @cached_property
    def late(self) -> tuple[int, ...]:
        """Slots of the weights whose gradients `backward_dw` is to compute: matrices of products.

        Their gradients in the backward are calls that wait, or tensors where a step has no other
        way.
        """
        if self.request.options.get("delay_wgrad_compute"):
            return tuple(self._factors())
        return tuple(
            k for k, i in self._factors().items() if _asks(self.ops[i], "delay_wgrad_compute")
        )

    @cached_property
    def accumulated(self) -> dict[int, str]:
        """Variables of weights whose gradients go into main_grad, by slot."""
        names, asked = list(self.weight_names.values()), "accumulate_into_main_grad"
        return {k: names[k] for k, i in self._factors().items() if _asks(self.ops[i], asked)}

    def _factors(self) -> dict[int, int]:
        """The op of each weight that is a factor of a product and wants a gradient, by slot."""
        specs, wanted = self.request.weights, self.request.gradients
        return {
            k: i
            for k, ((i, name), variable) in enumerate(self.weight_names.items())
            if self.kinds[i].gemm
            and variable in wanted
            and specs[variable] is not None
            and (self.kinds[i].wgrad or name == "weight")
        }

    @cached_property
    def waits(self) -> set[str]:
        """The gradients of those weights."""
        names = list(self.weight_names.values())
        return {f"d{names[k]}" for k in self.late}

    def value_spec(self, name: str) -> Spec:
        """The spec of a value by its name."""
        kind, i, spec = self.values[name]
        if spec is None:
            x = self.specs[i]
            for own, saved_spec in saved(self.kinds[i], self.ops[i], x).items():
                value = Value(kind, i, _rows_times(saved_spec, x.factor))
                self.values[self.name(own, i)] = value
            spec = self.values[name].spec
            assert spec is not None, "an op that saves a value gives its spec"
        return spec

    def private(self, name: str, owner: Hashable, place: int) -> str:
        """The variable of a value that only its owner knows, at a place."""
        if owner not in self._private:
            text = self._private[owner] = variable(name, self.numbers[place], self.roots)
            self.roots.add(root(text))
        return self._private[owner]

    def add_private(self, variable: str, place: int, spec: Spec) -> None:
        """Have a private value in the table."""
        self.values[variable] = Value(PRIVATE, place, spec)


def _asks(op: Op, flag: str) -> bool:
    return bool(getattr(op, flag, False))


def _rows_times(spec: Spec, factor: Fraction) -> Spec:
    """The spec of so many rows; ops need not think of it."""
    fixed = all(size >= 0 for size in spec.shape)
    return spec if fixed or spec.factor == factor else replace(spec, factor=factor)


def _by_hand(kind: type[Op]) -> list[Any]:
    """The `bwd` that a class gives itself, if it does."""
    bwd = function(kind, "bwd")
    return [] if bwd is None else [bwd]


def op_identity(run: Run, i: int, direction: str, training: bool) -> bool:
    """Whether op i does nothing in a pass."""
    return identity(run.kinds[i], run.ops[i], direction, training)
