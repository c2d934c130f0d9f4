"""`Op`: what is computed, as plain PyTorch functions whose argument names declare their needs.

`fwd(self, x, weight, eps)` takes the value before the op, then whatever it names: extra inputs,
constants (attributes, written into generated source as literals) and, all that remains, parameters
and buffers. It returns `(y, saved)`, saved being what `saves` names. `bwd(self, dy, x, rstd,
weight)` may name `dy`, `x`, `y`, saved values and anything that `fwd` takes; it returns `dx` and a
gradient for each argument of `fwd` after `x` that can have one, in order. An op whose gradients
need different things gives `dgrad` (returns dx) and `wgrad` (returns the gradient of its one
parameter) instead. The literal `want`, an optional keyword of `fwd` and `bwd`, tells which saved
values or gradients ("x" and parameter names) the plan uses; the others may be None.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..base import config
from ..base.errors import OpError, PlanError
from ..guards.arguments import arguments, is_names
from ..guards.cached import per_class
from ..guards.constants import plain
from ..guards.state_dicts import StateDicts
from ..guards.torch_private import constant_under_compile
from ..guards.validation import text
from ..guards.watched import MODULE_ATTRIBUTES, PRIVATE, serving
from .spec import Factor, Spec

FORWARD, BACKWARD = "forward", "backward"
_NO_SETTINGS = MODULE_ATTRIBUTES | PRIVATE | {"_homes", "channels", "strict", "serial"}


class Lowered(NamedTuple):
    """One entry of a lowered program: the class of the op to compute and the module it reads.

    `Linear` lowers to `(BasicLinear, linear)` and `(Bias, linear)`: its own functions are never
    called, and both parts find their parameters on it.
    """

    kind: "type[Op]"
    op: "Op"


class Placed(NamedTuple):
    """A lowered op in a run. label: what errors call it ("0:Linear")."""

    kind: "type[Op]"
    op: "Op"
    label: str
    attached: str = ""
    """Of an op that a recipe adds: "q" before, "g" after the one whose number it shares."""
    quantizers: Mapping[str, Any] = {}
    """Of parameters that the recipe quantizes."""
    override: str | None = None
    """What the backward multiplies in the place of quantized gradients."""


class Op(StateDicts):
    """A basic op. Subclasses write `fwd` and, unless autograd's derivative will do, `bwd`."""

    saves: ClassVar[tuple[str, ...]] = ()
    constants: ClassVar[tuple[str, ...]] = ()
    """Attributes that `fwd` and `bwd` take as arguments: literals in the source."""
    extra_inputs: ClassVar[tuple[str, ...]] = ()
    """Arguments of `fwd` that are further inputs of the sequence, or values of a channel."""
    passes: ClassVar[tuple[str, ...]] = ()
    """Extra inputs whose gradient is `dy` itself, while dx is `dy` too: the backward is no step."""
    required: ClassVar[tuple[str, ...]] = ()
    """Parameters that `fwd` cannot do without."""
    as_stored: ClassVar[tuple[str, ...]] = ()
    """Parameters that keep their dtype when the computation has another."""
    typed_by: ClassVar[tuple[str, ...]] = ()
    """Parameters with whose dtypes `result` finds that of y."""
    promotes: ClassVar[tuple[str, ...]] = ()
    """Extra inputs of any float dtype, with whose dtype that of y is promoted, as PyTorch does."""
    gemm: ClassVar[bool] = False
    """Whether `fwd` is a matrix product: too dear to be run again in the backward."""
    quantizable: ClassVar[bool] = False
    """Whether recipes quantize its operands to `Quantized`; a subclass's own `fwd` says so anew."""
    packs_gradient: ClassVar[bool] = False
    """Whether `bwd` returns a `Quantized` dx, for the `quantizable` op before."""
    taps: ClassVar[bool] = False
    """Whether the op hands its input out on a channel; `bwd` takes that gradient as `d`."""
    takes_buffers: ClassVar[tuple[str, ...]] = ()
    """Keywords that a caller may give for it: names of buffers for its results."""
    random: ClassVar[bool] = False
    """Whether `fwd` draws random numbers, so that only `again` can repeat it."""
    collective: ClassVar[bool] = False
    """Whether it exchanges tensors with the other ranks of the process group named `group`."""
    training_matters: ClassVar[bool] = False
    """Whether the op differs between training and evaluation."""
    keeps_width: ClassVar[bool] = False
    """Whether y is as wide as x, whatever its width."""
    deferred = False
    """Whether a backward leaves weight gradients for later: seen on what it calls and is given."""

    fwd: Callable[..., tuple[Tensor, tuple[Tensor | None, ...]]]
    bwd: Callable[..., tuple[Tensor | None, tuple[Tensor | None, ...]]] | None = None
    dgrad: Callable[..., Tensor] | None = None
    wgrad: Callable[..., Tensor | None] | None = None
    again: Callable[..., Tensor] | None = None
    """Makes y again from saved values: `again(x, seed)`, `again(x, rstd, weight)`."""

    lowers_subclasses: ClassVar[bool] = False
    """Whether `lower` looks at the class's functions: else one that overrides some is basic."""

    channels: dict[str, str | None]
    strict: set[str]
    """Extra inputs whose channel must have a producer in the sequence."""
    _homes: dict[str, tuple[nn.Module, str]]

    # What rooms above set.
    alone: ClassVar[Callable[["Op"], Callable[..., Any]]]
    """Makes a sequence of one op, for `forward`."""
    verify_added: ClassVar[Callable[..., None]]
    """Raises PlanError for an op that cannot be planned."""
    derive: ClassVar[Callable[[type["Op"], str], Callable[..., Any]]]
    """Makes the `bwd`, `dgrad` or `wgrad` of a class that has none."""
    of: ClassVar[Callable[..., "Op"]]
    """Makes an op of the class that shares a module's parameters."""
    trace: ClassVar[Callable[["Op", Spec], tuple[Spec, dict[str, Spec]]]]
    """The specs of y and of what is saved, of a `fwd` that is run to find out."""
    retrace: ClassVar[Callable[[type["Op"], str, "Op", Spec], tuple[Spec, dict[str, Spec]] | None]]
    """Likewise, of a `fwd` that the class's `out` or `saved` is not about; else None."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        for name in ("constants", "extra_inputs"):  # which `__init__` reads
            if not is_names(value := getattr(cls, name)):
                raise PlanError(
                    f"{cls.__name__}: got {name} = {value!r}, expected a tuple of names"
                )
        own = {"fwd", "bwd", "dgrad", "wgrad", "again"}.intersection(cls.__dict__)
        if own and "lower" not in cls.__dict__ and not cls.lowers_subclasses:
            cls.lower = Op.lower  # type: ignore[method-assign]

    def __init__(self) -> None:
        super().__init__()
        # Past the module's look at each attribute, which takes longer than all else.
        self.__dict__.update(channels=dict.fromkeys(self.extra_inputs), strict=set(), _homes={})

    # -- what an op may say of itself --

    @property
    def in_width(self) -> int | None:
        """The input width it demands, or None if any will do or it is not known yet."""
        return None

    def width_before(self, out_width: int) -> int | None:
        """The input width that gives this output width, where that is determined."""
        return out_width if self.keeps_width else None

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        """Fill in sizes that were left out, from the neighbours' widths (None: not known)."""

    def reject(self, x: Spec) -> str | None:
        """Why the op cannot take such an input ("got ..., expected ..."), or None."""
        if self.in_width is not None and x.width != self.in_width:
            return f"got input width {x.width}, expected {self.in_width}"
        return None

    def identity(self, direction: str, training: bool) -> bool:
        """Whether the op does nothing in that pass."""
        return False

    def out(self, x: Spec) -> Spec:
        """The spec of y. By default `fwd` is run on a meta tensor to find out."""
        return Op.trace(self, x)[0]

    def result(self, dtype: torch.dtype, others: Mapping[str, torch.dtype]) -> torch.dtype:
        """The dtype of y, by that of `out` and those that `typed_by` names."""
        return dtype

    def trailing(self) -> tuple[int, ...]:
        """Sizes that the dimensions before the last must have, where it works on more than one."""
        return ()

    def constant(self, name: str, x: Spec) -> Any:
        """A constant as `fwd` and `bwd` take it, for such an input."""
        return getattr(self, name)

    def row_factor(self) -> Factor:
        """How many rows y has for each row of x: other than 1 where ranks exchange rows."""
        return 1

    def saved(self, x: Spec) -> dict[str, Spec]:
        """The specs of what `saves` names, with `ROWS` for the row count."""
        return Op.trace(self, x)[1] if self.saves else {}

    def extra_spec(self, name: str, x: Spec) -> Spec | None:
        """What an extra input must be, by default like x; None leaves it to `fwd`."""
        return x

    def example_extra(self, name: str, x: Spec, rows: int) -> Tensor:
        """An extra input of the right shape for `rows` rows, for planning without one."""
        spec = self.extra_spec(name, x)
        assert spec is not None, "an op that leaves the check to fwd gives its own example"
        return torch.zeros_like(spec.empty(rows))

    def lower(self) -> Sequence[Lowered]:
        """The basic ops that it stands for."""
        return (Lowered(type(self), self),)

    @classmethod
    def sample(cls) -> Iterable["Op"]:
        """Small instances for the tests that walk over every op and fuser."""
        return (cls(),)

    def set_extra_input_channel(self, index: int, name: str) -> None:
        """Have an extra input read the channel of that name, which an earlier op must provide."""
        inputs = tuple(self.channels) if not self.taps else ()
        if not isinstance(index, int) or not 0 <= index < len(inputs):
            raise IndexError(f"{type(self).__name__}: got extra input {index!r} of {len(inputs)}")
        self.channels[inputs[index]] = text(type(self).__name__, "name", name)
        self.strict.add(inputs[index])
        self.touch()

    def set_extra_output_channel(
        self, index: int, name: str, output_to_caller: bool = True
    ) -> None:
        """Have an extra output provide a channel; the caller gets it too unless told otherwise."""
        if not self.taps or index != 0:
            raise IndexError(f"{type(self).__name__}: got extra output {index!r} of {self.taps:d}")
        self.channels["d"] = text(type(self).__name__, "name", name)
        self.to_caller = output_to_caller
        self.touch()

    # -- machinery --

    def home(self, name: str) -> tuple[nn.Module, str]:
        """The module and attribute where a parameter is found, normally the op itself."""
        return self._homes.get(name, (self, name))

    def shape_of(self, name: str) -> tuple[int | None, ...] | None:
        """The shape that a parameter must have (None in it: any size); None leaves it to `fwd`."""
        return None

    def joined(self) -> Collection[str]:
        """Parameters that are no arguments of `fwd`, for it joins them to one that is."""
        return ()

    def parts(self) -> "Sequence[Op] | None":
        """The ops that it stands for, one after the other, where each could also be called."""
        return None

    def has(self, name: str) -> bool:
        """Whether there is such a parameter."""
        return getattr(*self.home(name), None) is not None

    def weigh(self, function: Callable[..., Any], *operands: Any) -> Any:
        """A weight gradient that a function computes; the call itself where it is deferred."""
        return function(*operands)

    def borrow(self, module: nn.Module, **names: str) -> "Op":
        """Read parameters from another module, under the names given; its own are dropped."""
        for own, theirs in names.items():
            there = "a parameter or buffer of {}: {}"
            if own not in self._parameters:
                expected = there.format("the op", sorted(self._parameters))
                raise OpError(type(self).__name__, f"{own!r} to borrow under", expected)
            if not isinstance(theirs, str) or not hasattr(module, theirs):
                held = sorted(getattr(module, "_parameters", ()))
                expected = there.format(type(module).__name__, held)
                raise OpError(type(self).__name__, f"{theirs!r} to borrow", expected)
        for own, theirs in names.items():
            self._parameters[own] = None
            self._homes[own] = (module, theirs)
        return self

    def forward(self, input: Tensor, *extra_inputs: Tensor) -> Any:
        """Run the op alone, planned as a sequence of one."""
        if serving.stages and (stage := serving.stages.get(id(self))) is not None:
            return stage(input, *extra_inputs)
        if torch.compiler.is_compiling() or "_runner" not in self.__dict__:
            self._make_runner()
        return self.__dict__["_runner"](input, *extra_inputs)

    @constant_under_compile
    def _make_runner(self) -> None:
        with config.lock:
            if "_runner" not in self.__dict__:
                # Not an attribute of the module: it would be its own grandchild.
                self.__dict__["_runner"] = Op.alone(self)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, plain(value) if name in self.constants else value)

    def settings(self) -> dict[str, Any]:
        """All plain attributes: two ops with equal settings share their plans."""
        return {key: value for key, value in self.__dict__.items() if key not in _NO_SETTINGS}

    def skeleton(self) -> "Op":
        """The op with meta tensors for parameters, for plans that several modules share."""
        bare = object.__new__(type(self))
        parameters = {
            name: None if p is None or is_lazy(p) else p.detach().to("meta")
            for name, p in self._parameters.items()
        }
        kept = {k: v for k, v in self.__dict__.items() if k not in PRIVATE}
        bare.__dict__ = {**kept, "_parameters": parameters, "_homes": {}, "_modules": {}}
        return bare


@per_class
def weights(kind: type[Op]) -> tuple[str, ...]:
    """The arguments of `fwd` that are parameters or buffers."""
    other = {"x", "want", *kind.constants, *kind.extra_inputs}
    return tuple(name for name in arguments(kind.fwd) if name not in other)


@per_class
def differentiable(kind: type[Op]) -> tuple[str, ...]:
    """The arguments of `fwd` after x that can have a gradient, in order."""
    skipped = {"x", "want", *kind.constants}
    return tuple(name for name in arguments(kind.fwd) if name not in skipped)


def lower_plainly(ops: Sequence[Op], labels: Sequence[str]) -> list[Placed]:
    """What ops stand for, each basic op with the label of the one that it came from."""
    named = zip(ops, labels, strict=True)
    return [Placed(kind, basic, label) for op, label in named for kind, basic in op.lower()]
