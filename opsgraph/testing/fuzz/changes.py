"""What may change of a module between its calls."""

import copy
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ... import ops
from ...fuser import Fuser, register
from ...fuser.registry import Handle
from ...precision import recipe
from ...run.sequential import Sequential
from .compare import Answer

RECIPES: dict[str, Callable[[], Any]] = {
    "current": recipe.Float8CurrentScaling,
    "delayed": recipe.DelayedScaling,
    "blocks": recipe.Float8BlockScaling,
    "mxfp8": recipe.MXFP8BlockScaling,
}


class Impossible(Exception):
    """A step that this life cannot take: an op or a parameter that it names is not there."""


class Scaling(Fuser):
    """What `Life.register` registers: a Bias and a scale in one step."""

    backend = "reference"
    pattern = dict(bias=ops.Bias, scale=ops.ConstantScale)

    def fwd(self, x: Tensor, bias_bias: Tensor, scale: ops.ConstantScale) -> Any:
        """Gives `(x + bias) * scale`."""
        return (x + bias_bias) * scale.scale, ()


class Pending(NamedTuple):
    """A forward whose backward is still to come."""

    outputs: Sequence[Tensor]
    dys: Sequence[Tensor]
    leaves: dict[str, Tensor]
    versions: dict[str, int]
    exact: Answer
    plain: Answer
    recomputes: bool
    """Whether the backward calls the module again, as it then is."""


class Changes:
    """A Sequential and what is done to it; each method's arguments are plain literals.

    A method raises Impossible if it does not apply.
    """

    def __init__(
        self, dtype: str = "float32", seed: int = 0, device: str = "cpu", **options: Any
    ) -> None:
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.seed, self.device, self.options = seed, device, options
        self.pending: list[Pending] = []
        self.handles: list[Handle] = []
        self.recipes = {name: make() for name, make in RECIPES.items()}
        self.module: Any = None
        self.behind = False
        """Whether delayed scales may be those of quite other values: a call has to come first."""
        self.edited = False
        """Whether ops may no longer fit each other."""

    # -- structure --

    def build(self, width: int, *sources: str) -> None:
        """Make the module of ops, given as source, for inputs of a width."""
        self.width = width
        self.module = Sequential(
            *map(_op, sources), device=self.device, dtype=self.dtype, **self.options
        )
        self._fill()

    def insert(self, index: int, source: str) -> None:
        """Put an op in at an index."""
        self._changed()
        if not 0 <= index <= len(self.module):
            raise Impossible
        self.module.insert(index, _op(source).to(self.device, self.dtype))
        self.edited = True
        self._fill()

    def remove(self, index: int) -> None:
        """Take the op at an index out."""
        self._changed()
        self._at(index)
        del self.module[index]
        self.edited = True

    def swap(self, index: int, source: str) -> None:
        """Put another op in the place of one."""
        self._changed()
        self._at(index)
        self.module[index] = _op(source).to(self.device, self.dtype)
        self.edited = True
        self._fill()

    def set(self, index: int, name: str, value: Any) -> None:
        """Set an attribute of an op."""
        self._changed()
        op = self._at(index)
        if not hasattr(op, name):
            raise Impossible
        setattr(op, name, value)
        self.edited = True

    def option(self, name: str, value: Any) -> None:
        """Set an option of the Sequential."""
        self._changed(values=False)
        setattr(self.module, name, value)

    # -- parameters --

    def replace(self, name: str, seed: int) -> None:
        """Put a new Parameter in the place of one."""
        self._changed()
        owner, leaf, old = self._parameter(name)
        setattr(owner, leaf, nn.Parameter(self._values(old.shape, seed), old.requires_grad))

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
        parameter.requires_grad_(not frozen)

    def tie(self, name: str, other: str) -> None:
        """Make one parameter also another of the same shape."""
        self._changed()
        owner, leaf, old = self._parameter(name)
        _, _, shared = self._parameter(other)
        if old.shape != shared.shape:
            raise Impossible
        setattr(owner, leaf, shared)

    def to(self, dtype: str) -> None:
        """Move the module to a dtype; inputs have it from now on."""
        self._changed(data=True)
        self.dtype = getattr(torch, dtype)
        self.module.to(self.dtype)

    def train(self, mode: bool) -> None:
        """Call `train(mode)`."""
        self._changed(values=False)
        self.module.train(mode)

    # -- copies --

    def copy(self) -> None:
        """Go on with a deepcopy."""
        self._no_graph()
        self.module = copy.deepcopy(self.module)

    def pickle(self) -> None:
        """Go on with what torch.save and torch.load make of the module."""
        self._no_graph()
        buffer = io.BytesIO()
        torch.save(self.module, buffer)
        buffer.seek(0)
        self.module = torch.load(buffer, weights_only=False)

    def load(self, seed: int, assign: bool) -> None:
        """Load a state dict of other values."""
        self._changed()
        state = {
            name: self._values(p.shape, seed + k)
            for k, (name, p) in enumerate(self.module.named_parameters(remove_duplicate=False))
        }
        self.module.load_state_dict(state, strict=False, assign=assign)

    # -- fusers --

    def register(self) -> None:
        """Register a fuser of one's own."""
        self._changed(values=False)
        self.handles.append(register(Scaling))

    def unregister(self) -> None:
        """Take the latest one out."""
        self._changed(values=False)
        if not self.handles:
            raise Impossible
        self.handles.pop().unregister()

    def end(self) -> None:
        """Take out what was registered."""
        while self.handles:
            self.handles.pop().unregister()

    # -- how --

    def _random(self, shape: Sequence[int], seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1009 + seed)
        value = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return value.to(self.device, self.dtype)

    def _values(self, shape: Sequence[int], seed: int) -> Tensor:
        """Of a parameter: of one spread, and such that a wrong one tells; none is 0 or 1."""
        return self._random(shape, seed) * 0.6 + 0.3

    def _changed(self, values: bool = True, data: bool = False) -> None:
        """Drop what cannot run any more: a checkpointed call would recompute with other ops or
        values than its forward had. data: so does a backward whose parameters got other memory.
        """
        self.pending = [p for p in self.pending if not (data or p.recomputes)]
        self.behind |= values

    def _fill(self) -> None:
        with torch.no_grad():
            for k, (_, parameter) in enumerate(self.module.named_parameters()):
                parameter.copy_(self._values(parameter.shape, 31 + k))

    def _no_graph(self) -> None:
        if any(p.grad_fn is not None for p in self.module.parameters()):
            raise Impossible

    def _at(self, index: int) -> nn.Module:
        if not 0 <= index < len(self.module):
            raise Impossible
        found: nn.Module = self.module[index]
        return found

    def _parameter(self, name: str) -> tuple[nn.Module, str, nn.Parameter]:
        path, _, leaf = name.rpartition(".")
        try:
            owner = self.module.get_submodule(path)
            parameter = getattr(owner, leaf)
        except AttributeError:
            raise Impossible from None
        if parameter is None:
            raise Impossible
        return owner, leaf, parameter


def _op(source: str) -> Any:
    """An op from its source, in which names are those of `ops`."""
    return eval(source, vars(ops).copy())  # our own drafts and scripts, no one's input
