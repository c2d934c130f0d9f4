"""What a stage does under a recipe. The hook is `Stage.recipe`, None for a stage without one.

Before a forward the plan's third function prepares the quantized weights. Delayed scaling hands it
their scales, and notes the amaxes: of weights at once, of activations after the forward, of
gradients in the backward. A call under a recipe also saves which scales it had, see `moment`.

A Sequential has stages of its own for each recipe; the hook is `SequenceRecipes`, a base of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from operator import attrgetter, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..base import config
from ..guards.torch_private import graph_task, saved_hooks
from ..plan import Plan
from ..plan.basic_ops import BasicOps
from ..precision.autocast import active
from ..precision.delayed import BACKWARD, Scaling
from ..precision.interned import drop_forgotten
from ..precision.quantizers import Quantizer
from ..precision.reading import fixed_of, seen_by, taken_by
from ..precision.recomputed import follow, moment
from ..precision.recorded import note, record
from ..precision.weights import QuantizedTensor
from .joined import Joined, Layer, joined

Parts = tuple[Tensor, ...]
_buffers, _backward = attrgetter("_buffers"), itemgetter(BACKWARD)

_kept: WeakKeyDictionary[nn.Module, dict[tuple[str, Any], dict[str, Parts]]] = WeakKeyDictionary()
"""The parts of quantized weights that a first microbatch made, by copy, of the module that has the
weight. The plans of a LayerNormMLP with and without overwriting main_grad share them; no copy or
pickle holds them. Each first microbatch overwrites them."""


class SequenceRecipes:
    """What a Sequential has for recipes: stages for each, and the one that a checkpoint repeats."""

    _recipes: dict[int, list[Any]]
    """Stages for each recipe that the module has run in, by its number. Emptied with `_stages`;
    recipes that nobody holds any more are dropped when one is added."""
    _last: int | None = None
    """The recipe of the last call without grad, for checkpoints; see `follow`."""
    _stages: list[Any]
    _make_stages: Callable[[int], list[Any]]

    def _current(self) -> list[Any]:
        """The stages for the active recipe."""
        key = active.key
        if key is None:
            return self._stages
        found = self._recipes.get(key)
        if found is None:
            with config.lock:
                found = self._recipes[key] = self._make_stages(key)
                drop_forgotten(self._recipes)
        if graph_task() == -1 and torch.is_grad_enabled():
            return found  # such a call follows none
        if (last := follow(self._last)) != self._last:
            with config.lock:
                self.__dict__["_last"], self.__dict__["_epoch"] = last, -1
        return found

    def _follows(self) -> bool:
        """Whether there was a call in a recipe that the next one may have to follow."""
        if active.key is None and self._last is not None:
            self.__dict__["_last"] = follow(self._last)
        return self._last is not None


class StageRecipe:
    """The quantizers and the delayed scales of a stage's weights."""

    def __init__(self, number: int, run: BasicOps, slots: Sequence[tuple[nn.Module, str]]) -> None:
        self.number, self.slots = number, slots
        self.quantizers: dict[int, Quantizer] = {}
        """By the weight's place among the stage's weights."""
        self.states: dict[int, Scaling] = {}
        """The delayed scaling of each such weight, and of the layer that it belongs to."""
        self.layers: list[Layer] = []
        places = {slot: k for k, slot in enumerate(run.slots)}
        for (i, name), quantizer in run.quantizers.items():
            k = places[i, name]
            self.quantizers[k], layer = quantizer, Layer(k)
            state = run.ops[i - 1].home("scale")[0]
            if quantizer.delayed and isinstance(state, Scaling):
                self.states[k] = state
                layer = Layer(k, places[i - 1, "scale"], places.get((i + 1, "scale")))
            self.layers.append(layer)
        scales = [k for layer in self.layers for k in layer[1:] if k is not None]
        self.reads = {k: partial(getattr, *slots[k]) for k in scales}
        """What reads the scales among the weights, by their places."""
        self.reporting: dict[tuple[int, ...], list[Any]] = {}
        """The states of gradients, by what plans report."""
        self.every = [*self.states.values()]
        self.distinct = [*dict.fromkeys(self.every)]
        self.shared = len(self.distinct) < len(self.every)
        """Whether two layers have one state."""

    def joined(self, plan: Plan) -> Joined | None:
        """Passes that do what is done here too."""
        return joined(plan, self.layers)

    def forward(self, plan: Plan, weights: Any, scales: Any) -> tuple[Any, Sequence[Tensor]]:
        """What runs a forward, and what it takes behind the weights.

        scales: what `fixed_of` says of the states, if that was asked.
        """
        whole: Joined | None = plan.joined
        if whole is not None and active.first_microbatch is None:
            if not self.every:
                return whole.forward, ()
            if scales is None or self.shared:  # held weights have scales of their own
                held = any(isinstance(w, QuantizedTensor) for w in weights)
                scales = None if held else fixed_of(self.every)
            # A checkpoint's hooks may make saved tensors again, by passes that are not joined.
            if scales is not None and not saved_hooks():
                grad = torch.is_grad_enabled()
                seen = taken_by(self.distinct, self.every, grad)
                for k in self.reads:  # calls of an unknown kind have read them
                    weights[k] = None
                if not grad:
                    return whole.silent(), scales
                return whole.forward, (*scales, *seen)
        for k, read in self.reads.items():
            weights[k] = read() if weights[k] is None else weights[k]
        return plan.passes.forward, self.prepare(plan, weights)

    def after(self, ctx: Any, plan: Plan, outputs: Any, saved: Any) -> tuple[Any, Any]:
        """After a forward: its outputs, and what it saves. Its amaxes are noted."""
        if plan.specs.reports and not ctx.joined:
            outputs = self.record(plan, outputs, True)
        unhooked = (ctx.joined and self.every) or not saved_hooks()
        ctx.moment = None if unhooked else moment(self.number, self.every)
        return outputs, saved if ctx.moment is None else (ctx.moment, *saved)

    def backward(self, plan: Plan) -> tuple[Any, Sequence[Tensor]]:
        """What runs the backward after such a forward, and where it notes amaxes."""
        states = self.reporting.get(reported := plan.specs.reported)
        if states is None:
            states = self.reporting[reported] = self._reporting(plan)
        return plan.joined.backward, [*map(_backward, map(_buffers, states))]

    def _reporting(self, plan: Plan) -> list[Any]:
        """The states of the gradients whose amaxes a backward has."""
        first = plan.specs.first_weight
        return [self.slots[k - first][0] for k in plan.specs.reported]

    def prepare(self, plan: Plan, weights: Sequence[Tensor | None]) -> Sequence[Tensor]:
        """The parts of the quantized weights, which the plan's forward takes behind the weights."""
        prepared, first = plan.specs.prepared, active.first_microbatch
        operands: list[Any] = [weights[k] for k, _, _ in prepared]
        grad = torch.is_grad_enabled()
        compiling = torch.compiler.is_compiling()
        run = plan.functions.prepare.call if compiling else plan.passes.prepare
        if first is None:
            parts, amaxes = run(*operands, *self._scales(plan))
        else:
            if first is False:
                operands = self._kept(plan, operands)
            # Training may use them, whatever mode this call is in.
            with torch.inference_mode(False):
                parts, amaxes = run(*operands, *self._scales(plan))
            self._keep(plan, operands, parts)
        if amaxes:
            states = [self.states[k] for k, _, _ in prepared if k in self.states]
            record(states, "weight", amaxes, grad)
        return parts  # type: ignore[no-any-return]

    def _scales(self, plan: Plan) -> list[Tensor]:
        states = self.states
        return [states[k].weight for k, _, _ in plan.specs.prepared if k in states]

    def _kept(self, plan: Plan, weights: Sequence[Any]) -> list[Any]:
        """In the place of each weight what the first microbatch made of it, if it made enough."""
        operands = list(weights)
        for n, (k, copies, _) in enumerate(plan.specs.prepared):
            (owner, name), weight = self.slots[k], weights[n]
            quantizer = self.quantizers[k]
            kept = _kept.get(owner, {}).get((name, quantizer), {})
            if kept.keys() >= set(copies) and not isinstance(weight, QuantizedTensor):
                parts = [part.to(weight.device) for copy in copies for part in kept[copy]]
                operands[n] = (*parts, *[None] * quantizer.delayed)
        return operands

    def _keep(self, plan: Plan, operands: Sequence[Any], parts: Parts) -> None:
        rest = iter(parts)
        for operand, (k, copies, count) in zip(operands, plan.specs.prepared, strict=True):
            own = {copy: tuple(islice(rest, count)) for copy in copies}
            if not isinstance(operand, tuple | QuantizedTensor):
                owner, name = self.slots[k]
                _kept.setdefault(owner, {})[name, self.quantizers[k]] = own

    def record(self, plan: Plan, outputs: Sequence[Tensor], grad: bool) -> Sequence[Tensor]:
        """Note the amaxes of activations, which follow the outputs; returns these.

        Without grad nothing is noted: what inference sees moves no scale.
        """
        count = len(outputs) - plan.specs.reports
        record([*self.states.values()], "activation", outputs[count:], grad)
        return outputs[:count]

    def seen_gradients(self, plan: Plan) -> list[Tensor]:
        """Where to note the amaxes of gradients: in the layers' `amax_backward`."""
        states = self._reporting(plan)
        if torch.compiler.is_compiling():
            return [state.amax_backward for state in states]
        return seen_by(states, BACKWARD)


def note_gradients(plan: Plan, gradients: Sequence[Any], seen: Sequence[Tensor]) -> list[Any]:
    """Note, in `seen`, amaxes that stand where scales would have a gradient; returns the rest."""
    rest = list(gradients)
    note(seen, [0] * len(seen), [rest[k] for k in plan.specs.reported])
    for k in plan.specs.reported:
        rest[k] = None
    return rest
