"""`Sequential`: the module that runs plans, with nn.Sequential's list protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..base import config
from ..features.called import Entry, spread
from ..features.compiled import CompiledSequence
from ..features.containers import Container, changed, watch
from ..features.convert import Converts
from ..features.examples import SequenceExamples
from ..features.inputs import explain, width_of
from ..features.listed import Listed
from ..features.op_kwargs import run_with
from ..features.recipes import SequenceRecipes
from ..guards.torch_private import opaque
from ..guards.validation import place
from ..guards.watched import own_state
from ..op import Op
from ..ops.delayed import DelaysWeightGradients, Queue, in_use
from ..ops.residual import tell_next
from ..ops.sizes import complete_sizes, infer_sizes
from ..precision.autocast import active
from .options import NAMES, Options
from .stage import Stage
from .stages import make_stages, run_stages


class Sequential(
    SequenceRecipes, CompiledSequence, SequenceExamples, DelaysWeightGradients, Converts, Listed
):
    """Ops in sequence, planned as one; plain nn.Modules may stand between them.

    `forward(x, *extra_inputs)` returns y, or `(y, *extra_outputs)` where there are any. x is
    `[*, width]`; extra inputs and outputs are those of Adds and Tees that no other op matches, in
    order. Has nn.Sequential's whole list protocol.

    device, dtype: where to put the ops' parameters. Options, attributes that may be set later too:
    backends: their order of preference, by default all that are there. planner: "greedy" or
    "optimal". recompute: False keeps whatever the backward needs, where by default cheap values are
    made again. checkpoint: keep the input alone and make all else again. double_backward: run the
    reference ops without a Function of our own, so that gradients can be differentiated again.
    delay_wgrad_compute: the backward leaves the gradients of linear layers' weights to
    `backward_dw()`. fusers: names of the only ones that may be taken.

    An op with hooks or a forward of its own is called as a module, and not fused. Raises OpError
    for unknown options and an input that an op cannot take, PlanError for what cannot be planned.
    """

    _called = False
    run_stages = staticmethod(run_stages)

    @opaque
    def __init__(
        self,
        *args: Any,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args)
        self._options = Options.of(options, options.pop("queue", None))
        place("Sequential", device, dtype)
        self._stages: list[Any] = []
        """Those for no recipe. `_prepare` makes them anew where an op or the epoch changed."""
        self._recipes, self._prepared = {}, -1
        """The epoch for which `_stages` was made; -1 after a change of the module (`_forget`)."""
        self._epoch = -1
        """The same for calls, which compare it without the lock. -1 has each ask `_prepare`: while
        there are containers, and while a recipe `_follows`."""
        self._containers: list[Container] = []
        """Lists and their like that ops hold, with what was in them: found anew with `_stages`."""
        with config.lock:
            infer_sizes(self._present())
            tell_next(self._present())
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)
        if not self._lazy():
            self._prepare()

    # -- structure --

    def _lazy(self) -> bool:
        return any(isinstance(p, UninitializedParameter) for p in self.parameters())

    def _present(self) -> list[nn.Module]:
        return [module for module in self._modules.values() if module is not None]

    def _forget(self) -> None:
        with config.lock:
            self.__dict__["_epoch"] = self.__dict__["_prepared"] = -1

    def _prepare(self, width: int | None = None) -> None:
        """Find the stages again, unless nothing has changed; width: the input's, if it is known."""
        if self._prepared == config.epoch and active.key is not None and not self._containers:
            return  # a call under a recipe follows by itself
        with config.lock:
            if self._prepared != config.epoch or changed(self._containers):
                lazy, epoch = self._lazy(), config.epoch
                if lazy and width is not None:
                    complete_sizes(self._modules, width)
                tell_next(self._present())
                self.__dict__["_recipes"] = {}
                self.__dict__["_stages"] = self._make_stages(None)
                self.__dict__["_containers"] = watch(self, self._present())
                self.__dict__["_prepared"] = -1 if lazy and width is None else epoch
            asks = self._follows() or self._containers
            # The last, for threads that ask without the lock.
            self.__dict__["_epoch"] = -1 if asks else self._prepared

    def _entries(self) -> Iterator[Entry]:
        for name, module in self._modules.items():
            yield from spread(f"{name}:{type(module).__name__}", module, self._called)

    def _make_stages(self, recipe: int | None) -> list[Any]:
        # An op that is called alone is given what it reads.
        ops = (op for op in self._present() if isinstance(op, Op) and self._called)
        given = [name for op in ops for name in op.channels.values() if name is not None]
        return make_stages(self._entries(), self._options, recipe, given, CalledSequential)

    # -- running --

    def forward(self, input: Tensor, *extra_inputs: Tensor, op_kwargs: Any = None) -> Any:
        """input: `[*, width]`; see the class. op_kwargs: `{op or index: {keyword: buffer}}`.

        The keyword `output` has the last op's result written to a buffer of the caller's, of which
        y is then a view; `grad_input` that of x's gradient. Both are for GroupedLinear.
        """
        if op_kwargs is not None:
            return run_with(self, input, extra_inputs, op_kwargs)
        if torch.compiler.is_compiling():
            return self._run_compiled(input, extra_inputs)
        try:
            if self._epoch != config.epoch:
                self._prepare(width_of(input))
            stages = self._stages if active.key is None else self._current()
            if len(stages) == 1 and type(stage := stages[0]) is Stage:  # the usual case
                if len(extra_inputs) == len(stage.inputs):
                    return stage(input, extra_inputs)
            return run_stages(stages, input, extra_inputs)
        except Exception:
            if (found := explain(self, self._stages, input, extra_inputs)) is None:
                raise
            return found

    @property
    def wgrad_queue(self) -> Queue | None:
        return in_use(self._options.queue, self._options.delay_wgrad_compute)

    # -- options and copies --

    def _like(self, *modules: Any) -> Sequential:
        return Sequential(*modules, **self._options.given())

    def __getattr__(self, name: str) -> Any:
        """Options are attributes, and may be set later."""
        return getattr(self._options, name) if name in NAMES else super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in NAMES:
            self._options = replace(self._options, **{name: value})
            self._forget()
            return
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_options": replace(self._options, queue=Queue())}
        return own_state(self, frozenset()) | _UNPREPARED | own

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.__dict__ |= _UNPREPARED
        return replica


_UNPREPARED = dict(_stages=[], _recipes={}, _epoch=-1, _prepared=-1, _containers=[])


class CalledSequential(Sequential):
    """What an op runs that was called as a module: its hooks have had their turn."""

    _called = True


Op.alone = staticmethod(lambda op: CalledSequential(op).forward)
