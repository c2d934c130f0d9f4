"""`Program`: basic ops as one kind of call sees them, with a name and a spec for every value.

Values are variables. `x3` is the value before op 3, `rstd1` what op 1 saves, `weight3` its
parameter, `other5` its extra input, `dx` the gradient that flows, `d0` the one that Tee 0 collects.
Where ops are dropped, several gaps share one value, named after the first of them.

The layers, each of which knows those before it:

    names      how variables are called, whatever users call ops (in guards)
    basic_ops  a stage's ops as they are planned, channels joined: the same for every call
    program    all that one kind of call adds: specs, which ops do nothing, which gradients flow

Rules, each of them broken once:

- No name is taken apart: `Program.values` says what it stands for.
- A spec is checked where it arrives at an op, so that errors name the op that the user wrote.
- Only x, extra inputs and weights may be cast, once, before all else; what an op wants as it comes
  (`as_stored`), or promotes with, is not.
- A gradient flows only where something before needs it. An op that passes its gradient on, and a
  Tee at which none arrives, are no steps of the backward.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from ..base.errors import OpError
from ..guards.constants import called, literal, plain
from ..guards.names import root, variable
from ..guards.validation import computed
from ..op import (
    BACKWARD,
    FORWARD,
    STORED,
    Factor,
    Spec,
    Storage,
    differentiable,
    weights,
)
from ..op.functions import checked_out, identity, passes, promotes, said, saved
from .basic_ops import BasicOps

INPUT, GAP, SAVED, PRIVATE = "input", "gap", "saved", "private"


class Value(NamedTuple):
    """A value by its name. place: where it comes into being, a position or gap of the program."""

    kind: str
    """INPUT: x0 or an extra input; GAP: between two ops; SAVED by an op; PRIVATE to a fuser."""
    place: int
    spec: Spec | None
    """As the plan computes with it. Of what an op saves it is None until it is asked for."""


HIGH_PRECISION = "high_precision"
"""An override: the backward multiplies what the forward had before it quantized."""


class Argument(NamedTuple):
    """One argument of a call: its category and the text that stands in the source."""

    category: str  # "op", "value", "weight", "gradient", "literal" or "object"
    text: str
    moved: bool = False
    """Whether the callee is handed it in a list of one, from which it takes it."""
    value: Any = None
    """A constant, or an op's place. An "object" has no literal, but a name in the globals."""


@lru_cache(maxsize=4096)
def variable_of(category: str, text: str) -> Argument:
    """A variable, or the literal None, as an argument: the same one in all plans."""
    return Argument(category, text)


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
    late: frozenset[str] = frozenset()
    """Names of weight gradients that wait for `backward_dw`."""
    accumulated: frozenset[str] = frozenset()
    """Names of those that go into main_grad."""
    casts: frozenset[str] = frozenset()
    """Names of the inputs and weights that an active autocast has cast."""


class Program:
    """A run as one request sees it: specs, dropped ops, and what every name means."""

    def __init__(self, run: BasicOps, request: Request) -> None:
        self.run, self.request = run, request
        self.kinds, self.ops, self.labels = run.kinds, run.ops, run.labels
        self.numbers, self.name, self.count = run.numbers, run.name, len(run.kinds)
        modes = [request.training[place] for place in run.places]
        ops = list(zip(self.kinds, self.ops, modes, strict=True))
        self.still = {
            way: [identity(k, op, way, mode) for k, op, mode in ops] for way in (FORWARD, BACKWARD)
        }
        """Which ops do nothing in a pass."""
        extras = zip(run.inputs, request.extras, strict=True)
        given = {self.name(n, i): _in_rows(spec, run.factors[i]) for (i, n, _), spec in extras}
        self.activations = {"x0": request.x, **given}
        """x and the extra inputs as they come."""
        self.arguments: dict[str, Spec | None] = {**self.activations, **request.weights}
        """What the caller hands in: x0, extra inputs and weights, as they come."""
        self.weight_names = {(i, name): self.name(name, i) for i, name in run.slots}
        self.x = [f"x{run.edges[0]}"]
        """The name of the value at each gap: behind an op that does nothing that before it."""
        for edge, still in zip(run.edges[1:], self.still[FORWARD], strict=True):
            self.x.append(self.x[-1] if still else f"x{edge}")
        self.values: dict[str, Value] = {}
        for name, spec in self.activations.items():
            cast = request.compute if name in request.casts else None
            self.values[name] = Value(INPUT, 0, replace(spec, dtype=cast) if cast else spec)
        for i, kind in enumerate(self.kinds):
            self.values |= {self.name(name, i): Value(SAVED, i, None) for name in kind.saves}
        self.specs = list[Spec]()
        """The spec of x at each gap."""
        self._propagate()
        self._follow_gradients()
        self.teed = {*(self.x[i] for i in (*run.sources.values(), *run.outputs)), *self.reports}
        """Values that later ops or the caller read, whatever the backward needs."""
        self.roots = set(run.name.roots)
        """Roots of all variables, see `guards.names`."""
        self._private: dict[Hashable, str] = {}
        self._constants: dict[tuple[int, str], Argument] = {}

    # -- specs --

    def _propagate(self) -> None:
        """Find the spec of every x. Raises OpError where an op cannot take what it is given."""
        x = self.request.x
        computed(self.labels[0] if self.labels else "input", "", x.dtype)
        self.specs.append(x := self.spec("x0"))
        for i, (kind, op) in enumerate(zip(self.kinds, self.ops, strict=True)):
            if reason := kind.reject(op, x):
                raise OpError(self.labels[i], *reason.removeprefix("got ").split(", expected ", 1))
            for name in weights(kind):
                self._check_weight(i, name, x)
            for name in kind.extra_inputs:
                self._check_extra(i, name, x)
            if not self.still[FORWARD][i]:
                y = checked_out(kind, op, x, self.labels[i])
                for dtype in self.promoted(i):
                    y = y.like(dtype=torch.promote_types(y.dtype, dtype))
                own = {n: self.request.weights.get(self.name(n, i)) for n in said(kind, "typed_by")}
                if others := {n: spec.dtype for n, spec in own.items() if spec}:
                    y = y.like(dtype=kind.result(op, y.dtype, others))
                x = _in_rows(y, self.run.factors[i + 1])
            self.specs.append(x)
            self.values.setdefault(self.x[i + 1], Value(GAP, i + 1, x))

    def _check_weight(self, i: int, name: str, x: Spec) -> None:
        spec, kind, label = self.request.weights[self.name(name, i)], self.kinds[i], self.labels[i]
        if spec is None:
            return
        if spec.device != x.device:
            raise OpError(label, f"input on {x.device}", f"{spec.device}, where {name} is")
        if name in kind.as_stored or self.request.compute is not None:
            return
        floats = spec.dtype.is_floating_point
        if spec.dtype.is_complex or (name in kind.required and not floats):
            raise OpError(label, f"{name} dtype {spec.dtype}", "a float")
        if floats and spec.dtype != x.dtype:
            expected = f"{spec.dtype}, the dtype of {name} (or an active autocast)"
            raise OpError(label, f"input dtype {x.dtype}", expected)

    def _check_extra(self, i: int, name: str, x: Spec) -> None:
        kind, label = self.kinds[i], self.labels[i]
        spec, expected = self.spec(self.extra(i, name)), kind.extra_spec(self.ops[i], name, x)
        if expected is None:
            return
        if spec.device != x.device:
            raise OpError(label, f"{name} on {spec.device}", str(x.device))
        expected = _in_rows(expected, x.factor)
        if (spec.shape, spec.factor) != (expected.shape, expected.factor):
            raise OpError(label, f"{name} {spec}", str(expected))
        if name in promotes(kind):
            computed(label, f"{name} ", spec.dtype)
        elif name not in kind.as_stored and self.request.compute is None:
            if spec.dtype != expected.dtype:
                raise OpError(label, f"{name} dtype {spec.dtype}", str(expected.dtype))

    def promoted(self, i: int) -> list[torch.dtype]:
        """The dtypes with which that of op i's output is promoted."""
        return [self.spec(self.extra(i, name)).dtype for name in promotes(self.kinds[i])]

    def _follow_gradients(self) -> None:
        """Find which gradients are needed, and the amaxes that a recipe wants of both passes."""
        wanted = self.request.gradients
        self.flows = ["x0" in wanted]
        """For each gap, whether the gradient of its value is needed."""
        for i, kind in enumerate(self.kinds):
            own = (self.name(name, i) in wanted for name in differentiable(kind))
            read = (self.flows[self.run.sources.get((i, name), 0)] for name in kind.extra_inputs)
            self.flows.append(self.flows[-1] or any(own) or any(read))
        self.tapped = {i for i in (*self.run.outputs, *self.run.sources.values()) if self.flows[i]}
        """Tees at which a gradient arrives and is needed."""
        for i, kind in enumerate(self.kinds):
            passed = passes(kind) or (kind.taps and i not in self.tapped)
            self.still[BACKWARD][i] |= bool(passed)
        quantizers = enumerate(op.__dict__.get("quantizer") for op in self.ops)
        delayed = [(i, self.kinds[i]) for i, q in quantizers if getattr(q, "delayed", False)]
        self.reports = [self.name("amax", i) for i, kind in delayed if "amax" in kind.saves]
        """amaxes that the forward hands out after its outputs."""
        packing = (i for i, kind in delayed if kind.packs_gradient and self.flows[i + 1])
        self.reported = {self.name("scale", i) for i in packing}
        """Scales in whose place the backward returns the amax that it saw."""

    # -- names --

    def extra(self, i: int, name: str) -> str:
        """The value of an extra input: a Tee's, or an input of the run."""
        source = self.run.sources.get((i, name))
        return self.name(name, i) if source is None else self.x[source]

    def resolve(self, i: int, name: str, direction: str = FORWARD) -> Argument | None:
        """What a name of op i stands for in a pass; None if its class has no such name."""
        kind, op = self.kinds[i], self.ops[i]
        if name == "x" and direction == BACKWARD and self.run.overrides.get(i) == HIGH_PRECISION:
            return variable_of("value", self.x[i - 1])  # what its Quantize read
        if name == "":
            return Argument("op", f"ops[{self.run.places[i]}]", value=self.run.places[i])
        if name == "x":
            return variable_of("value", self.x[i])
        if name == "y":
            return variable_of("value", self.x[i + 1])
        if name == "dy":
            return variable_of("gradient", "dx")
        if name == "d" and kind.taps:
            return variable_of("gradient", self.name("d", i))
        if name in kind.saves:
            return variable_of("value", self.name(name, i))
        if name in kind.constants:
            if (i, name) not in self._constants:
                value = plain(op.constant(name, self.specs[i]))
                text, category = literal(value), "literal"
                if text is None:
                    text, category = called(value), "object"
                self._constants[i, name] = Argument(category, text, value=value)
            return self._constants[i, name]
        if name in kind.extra_inputs:
            return variable_of("value", self.extra(i, name))
        weight = name.removesuffix(STORED)
        own = self.weight_names.get((i, weight))
        if own is None:
            return None
        if weight != name:
            return variable_of("weight", own + STORED * (own in self.request.casts))
        if self.request.weights[own] is None:
            return variable_of("literal", "None")
        return variable_of("weight", "q" * self.packed(i, weight, direction) + own)

    def packed(self, i: int, name: str, direction: str) -> bool:
        """Whether a weight is quantized in a pass."""
        plain = direction == BACKWARD and self.run.overrides.get(i) == HIGH_PRECISION
        return (i, name) in self.run.quantizers and not plain

    def storages(self, i: int) -> tuple[Storage | None, ...]:
        """How x, the weight and the gradient of a quantized linear layer are stored."""
        packs = i + 1 < self.count and self.kinds[i + 1].packs_gradient
        after: Any = self.ops[i + 1] if packs else None
        weight = self.run.quantizers[i, "weight"].storage
        return self.specs[i].storage, weight, after and after.quantizer.storage

    def gradient(self, i: int, name: str) -> str | None:
        """The gradient of what op i calls a name; None if it is not wanted, or there is no such."""
        if name not in differentiable(self.kinds[i]):
            return None
        source = self.run.sources.get((i, name))
        if source is not None:
            return self.name("d", source) if source in self.tapped else None
        value = self.name(name, i)
        wanted = value in self.request.gradients or value in self.reported
        return f"d{value}" if wanted else None

    def spec(self, name: str) -> Spec:
        """The spec of a value by its name."""
        kind, i, spec = self.values[name]
        if spec is None:
            x = self.specs[i]
            for own, saved_spec in saved(self.kinds[i], self.ops[i], x).items():
                self.values[self.name(own, i)] = Value(kind, i, _in_rows(saved_spec, x.factor))
            spec = self.values[name].spec
            assert spec is not None, "an op that saves a value gives its spec"
        return spec

    def private(self, name: str, owner: Hashable, place: int) -> str:
        """The variable of a value that only its owner knows, at a place."""
        if owner not in self._private:
            text = self._private[owner] = variable(name, self.numbers[place], self.roots)
            self.roots.add(root(text))
        return self._private[owner]


def _in_rows(spec: Spec, factor: Factor) -> Spec:
    """The spec with `factor` rows for each row of the input, which ops need not handle."""
    fixed = all(size >= 0 for size in spec.shape)
    return spec if fixed else spec.times(factor)
