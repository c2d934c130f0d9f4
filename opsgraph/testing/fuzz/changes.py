"""What may change of a module between its calls: its ops, attributes and parameters."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ... import ops
from ...base.errors import OpError, OpsgraphError
from ...features import verify
from ...kernels.triton import interpreting
from ...layernorm_mlp import LayerNormMLP
from ...precision import recipe
from ...run.sequential import Sequential
from .answers import Allowed
from .compare import Answer, Wrong, check
from .own import Noise, Offset, Wave

verify.every = True
"""The code of every plan is verified."""


TURNED = ops.TransposedLinear, ops.TransposedGroupedLinear
"""Layers that delay no weight gradient."""


class Impossible(Exception):
    """A step that this life cannot take: an op or a parameter that it names is not there."""


class Pending(NamedTuple):
    """A forward whose backward is still to come."""

    outputs: Sequence[Tensor]
    dys: Sequence[Tensor]
    leaves: dict[str, Tensor]
    versions: dict[str, int]
    exact: Answer
    allowed: Allowed
    recomputes: bool
    """Whether the backward calls the module again, as it then is."""
    touched: bool
    """Whether outputs were changed in place."""
    module: Any
    late: frozenset[str]
    """Weights whose gradients wait for `backward_dw`."""
    accumulated: frozenset[str]
    """Weights whose gradients go to their main_grad."""

    def sure(self, name: str) -> bool:
        """Whether all names of a leaf say the same of where and when its gradient arrives."""
        leaf = self.leaves[name]
        names = [other for other, one in self.leaves.items() if one is leaf]
        return len({(n in self.late, n in self.accumulated) for n in names}) == 1


class Changes:
    """A module and what is done to it; each method's arguments are plain literals.

    A method raises Impossible if it does not apply.
    """

    def __init__(
        self, dtype: str = "float32", seed: int = 0, device: str = "cpu", **options: Any
    ) -> None:
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.seed, self.device, self.options = seed, device, options
        self.pending: list[Pending] = []
        self.module: Any = None
        self.behind = False
        """Whether delayed scales may be those of quite other values: a call has to come first."""
        self.edited = False
        """Whether ops may no longer fit each other."""
        self.kept: tuple[str, ...] | None = None
        """The recipe under which a first microbatch has kept its weights, if they still are so."""
        self.shapes: dict[tuple[int, ...], list[torch.Size]] = {}
        """Of the extra inputs, by the input's dimensions before the last."""

    # -- structure --

    def build(self, width: int, *sources: str, times: int = 1, meta: bool = False) -> None:
        """Make the module of ops, given as source, for inputs of a width.

        times: how often the first one stands there. meta: first on that device, by PyTorch's
        default.
        """
        self.width = width

        def make(**place: Any) -> Sequential:
            made = map(evaluated, (*sources[:1] * times, *sources[1:]))
            return Sequential(*made, dtype=self.dtype, **place, **self.options)

        self.module = self._placed(make, meta)
        self._complete()
        self._fill()

    def mlp(self, hidden: int, ffn: int, meta: bool = False, **arguments: Any) -> None:
        """Make the module a LayerNormMLP."""
        self.width = hidden
        self.module = self._placed(
            lambda **place: LayerNormMLP(
                hidden, ffn, params_dtype=self.dtype, **arguments, **place
            ),
            meta,
        )
        self._fill()

    def _placed(self, make: Callable[..., Any], meta: bool) -> Any:
        """A module on the life's device."""
        if not meta:
            return make(device=self.device)
        with torch.device("meta"):
            module = make()
        if not all(parameter.is_meta for parameter in module.parameters()):
            raise Wrong("parameters are not on the default device")
        return module.to_empty(device=self.device)

    def from_torch(self, width: int, *sources: str) -> None:
        """Make it of torch.nn's modules; equal sources are one module, which stands there twice."""
        self.width = width
        made = {source: eval(source, vars(nn).copy()) for source in sources}
        plain = nn.Sequential(*(made[source] for source in sources)).to(self.device, self.dtype)
        self.module = Sequential.from_torch(plain, **self.options)
        self._fill()
        x = self._random((5, width), 3)
        with torch.no_grad():
            self.module.eval()
            found = self.module(x)
            exact = plain.eval().double()(x.double())
            rounded = plain.to(self.dtype)(x)
            check("output of the converted module", found, exact, self.dtype, lambda: rounded)
        self.module.train()

    def insert(self, index: int, source: str) -> None:
        """Put an op in at an index."""
        self._changed(ops=True)
        if not 0 <= index <= len(self._list()):
            raise Impossible
        self.module.insert(index, evaluated(source).to(self.device, self.dtype))
        self._fill()

    def append_inside(self, index: int, source: str) -> None:
        """Put an op at the end of a Residual."""
        self._changed(ops=True)
        inside = self._at(index)
        if not isinstance(inside, ops.Residual):
            raise Impossible
        inside.ops.append(evaluated(source).to(self.device, self.dtype))
        self._fill()

    def remove(self, index: int) -> None:
        """Take the op at an index out."""
        self._changed(ops=True)
        self._at(index)
        del self._list()[index]

    def swap(self, index: int, source: str) -> None:
        """Put another op in the place of one."""
        self._changed(ops=True)
        self._at(index)
        self._list()[index] = evaluated(source).to(self.device, self.dtype)
        self._fill()

    def set(self, index: int, name: str, value: Any) -> None:
        """Set an attribute of an op."""
        op = self._at(index)
        if not hasattr(op, name):
            raise Impossible
        self._changed(ops=True)
        try:
            setattr(op, name, value)
        except OpsgraphError:
            if isinstance(op, LayerNormMLP):  # it says what cannot be set later
                raise Impossible from None
            raise

    def option(self, name: str, value: Any) -> None:
        """Set an option of the Sequential."""
        ops_of_it = self._list().modules()
        if name == "delay_wgrad_compute" and any(isinstance(op, TURNED) for op in ops_of_it):
            raise Impossible  # an error says so
        self._changed(values=False)
        setattr(self.module, name, value)

    # -- parameters --

    def replace(self, name: str, seed: int) -> None:
        """Put a new Parameter in the place of one."""
        self._changed()
        owner, leaf, old = self._parameter(name)
        setattr(owner, leaf, nn.Parameter(self._values(old.shape, seed), old.requires_grad))

    def bias(self, index: int, seed: int, there: bool, past: bool = False) -> None:
        """Give a Linear a bias that had none, or take it away.

        past: its `__setattr__`, as libraries do that put parameters in the place of others.
        """
        op = self._at(index)
        if not (type(op) is ops.Linear or type(op) is ops.TransposedLinear):
            raise Impossible
        self._changed()
        value = nn.Parameter(self._values((op.out_features,), seed)) if there else None
        if past:
            op._parameters["bias"] = value
        else:
            op.register_parameter("bias", value)

    def assign_data(self, name: str, seed: int) -> None:
        """Set `.data` of a parameter."""
        self._changed(data=True)
        _, _, parameter = self._parameter(name)
        parameter.data = self._values(parameter.shape, seed)

    def change(self, name: str, seed: int) -> None:
        """Write into a parameter, as an optimizer does."""
        self._changed()
        _, _, parameter = self._parameter(name)
        with torch.no_grad():
            parameter.copy_(self._values(parameter.shape, seed))

    def freeze(self, name: str, frozen: bool) -> None:
        """Set `requires_grad` of a parameter."""
        self._changed(values=False)
        _, _, parameter = self._parameter(name)
        if {"main_grad", "get_main_grad"} & parameter.__dict__.keys():
            raise Impossible  # whether a gradient that is due still arrives is not said
        parameter.requires_grad_(not frozen)

    def tie(self, name: str, other: str) -> None:
        """Make one parameter also another of the same shape."""
        self._changed()
        owner, leaf, old = self._parameter(name)
        _, _, shared = self._parameter(other)
        if old.shape != shared.shape:
            raise Impossible
        setattr(owner, leaf, shared)

    def tie_like(self, name: str, seed: int) -> None:
        """Make one parameter also another one of its shape."""
        _, _, shared = self._parameter(name)
        alike = [n for n, p in self.module.named_parameters() if p.shape == shared.shape]
        if len(alike) < 2:
            raise Impossible
        self.tie(alike[seed % len(alike)], name)

    def to(self, dtype: str) -> None:
        """Move the module to a dtype; inputs have it from now on."""
        if self.module.queued_backward_dw():
            raise Impossible  # a gradient that waits would be rounded to it
        self._changed(data=True)
        self.dtype = getattr(torch, dtype)
        self.module.to(self.dtype)

    def train(self, mode: bool) -> None:
        """Call `train(mode)`."""
        self._changed(values=False)
        self.module.train(mode)

    # -- how --

    def _random(self, shape: Sequence[int], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1009 + seed)
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.to(self.device, self.dtype)

    def _values(self, shape: Sequence[int], seed: int) -> Tensor:
        """Of a parameter: of one spread, and such that a wrong one tells; none is 0 or 1."""
        return self._random(shape, seed) * 0.6 + 0.3

    def _changed(self, values: bool = True, data: bool = False, ops: bool = False) -> None:
        """Drop what cannot run any more: a checkpointed call would recompute with other ops or
        values than its forward had. data: so does a backward whose parameters got other memory.
        ops: the ops may no longer fit.
        """
        if ops and self.module.queued_backward_dw():
            raise Impossible  # a module may go with the gradients that wait there
        self.pending = [p for p in self.pending if not (data or p.recomputes or (ops and p.late))]
        self.behind |= values
        self.edited |= ops
        if values or ops:
            self.kept = None
            self.shapes.clear()

    @contextmanager
    def _excused(self, more: str | None = None) -> Iterator[None]:
        """Formulas without a size of their own take any width, ops of an edited sequence do not.

        more: what else an error may say.
        """
        try:
            yield
        except Exception as error:
            if not (isinstance(error, OpError) or str(error).startswith("OpError: ")):
                raise  # Dynamo raises an error of its own, which begins like ours
            if (self.edited and "width" in str(error)) or (more and more in str(error)):
                raise Impossible from None
            raise

    def _fill(self) -> None:
        with torch.no_grad():
            for k, (_, parameter) in enumerate(self.module.named_parameters()):
                parameter.copy_(self._values(parameter.shape, 31 + k))

    def _complete(self) -> None:
        """Sizes that were left out are found by the first calls, of several threads."""
        if not any(isinstance(p, UninitializedParameter) for p in self.module.parameters()):
            return
        x = self._random((3, self.width), 0)

        failed: list[OpError] = []

        def call() -> None:
            try:
                with torch.inference_mode():
                    self.module(x)
            except OpError as error:
                failed.append(error)

        several = 1 if interpreting() else 4  # Triton's interpreter runs in one thread at a time
        threads = [threading.Thread(target=call) for _ in range(several)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        if failed:  # no neighbour tells a size, or an extra input is wanted
            raise Impossible

    def _list(self) -> Any:
        if not isinstance(self.module, Sequential):
            raise Impossible
        return self.module

    def _at(self, index: int) -> nn.Module:
        if isinstance(self.module, LayerNormMLP) and index == 0:
            return self.module
        if not 0 <= index < len(self._list()):
            raise Impossible
        found: nn.Module = self.module[index]
        return found

    def _owned(self, parameter: Tensor) -> int:
        """How many names a parameter has."""
        return sum(p is parameter for _, p in self.module.named_parameters(remove_duplicate=False))

    def _parameter(self, name: str) -> tuple[nn.Module, str, nn.Parameter]:
        path, _, leaf = name.rpartition(".")
        try:
            owner = self.module.get_submodule(path)
            parameter = getattr(owner, leaf)
        except AttributeError:
            raise Impossible from None
        if not isinstance(parameter, nn.Parameter):
            raise Impossible
        return owner, leaf, parameter


NAMES = vars(ops) | {"LayerNormMLP": LayerNormMLP, "Sequential": Sequential, "recipe": recipe}
NAMES |= {"nn": nn, "np": np, "torch": torch, "Wave": Wave, "Offset": Offset, "Noise": Noise}
"""What sources of ops may name."""


def evaluated(source: str) -> Any:
    """An op from its source, in which names are `NAMES`."""
    return eval(source, NAMES.copy())  # our own drafts and scripts, no one's input
