"""Residual wiring: Tee hands a value out, Add adds it back; names join the two.

An Add whose name no Tee before it has is an extra input of the sequence; a Tee that no Add reads is
an extra output. Without a name they are always that: MakeExtraOutput and AddExtraInput.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..base.errors import OpError, PlanError
from ..guards.validation import Checked, finite, flag, text
from ..guards.watched import Watched, whole
from ..op import Lowered, Op, Spec
from .elementwise import ConstantScale
from .linear import BasicLinear
from .parameters import known
from .scaled_add import ScaledAdd
from .sizes import infer_sizes, width_between

_serial = itertools.count()


class _Still(Op):
    """An op that keeps its input's spec."""

    keeps_width = True

    def out(self, x: Spec) -> Spec:
        return x


class Tee(_Still):
    """`y = x`, and x is also handed out: to the Adds of that name, or to the caller.

    to_caller: hand it to the caller too where an Add of the sequence reads it.
    """

    taps = True
    to_caller = Checked(flag)

    def __init__(self, name: str | None = None, to_caller: bool = False) -> None:
        super().__init__()
        self.channels["d"] = text(type(self).__name__, "name", name)
        self.to_caller = to_caller

    def identity(self, direction: str, training: bool) -> bool:
        return direction == "forward"

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return x, ()

    def bwd(self, dy: Tensor, d: Tensor) -> tuple[Tensor, tuple[()]]:
        return dy + d, ()

    def extra_repr(self) -> str:
        return repr(self.channels["d"])


class Add(_Still):
    """`y = x + other`; other is the value of the Tee of that name, or an extra input.

    other may be of another float dtype: y has the dtype to which PyTorch promotes, and each
    gradient its own input's.
    """

    extra_inputs = passes = promotes = ("other",)

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        self.channels["other"] = text(type(self).__name__, "name", name)

    def fwd(self, x: Tensor, other: Tensor) -> tuple[Tensor, tuple[()]]:
        return x + other, ()

    def bwd(self, dy: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return dy, (dy,)

    def extra_repr(self) -> str:
        return repr(self.channels["other"])


class MakeExtraOutput(Tee):
    """A Tee without a name: its value is an extra output of the sequence.

    in_place permits the backward to write into the extra output's gradient; nothing does so far.
    """

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = flag(type(self).__name__, "in_place", in_place)

    def lower(self) -> Sequence[Lowered]:
        return (Lowered(Tee, self),)


class AddExtraInput(Add):
    """An Add without a name: what it adds is an extra input of the sequence.

    in_place permits writing the sum into the extra input; nothing does so far.
    """

    def __init__(self, *, in_place: bool = False) -> None:
        super().__init__()
        self.in_place = flag(type(self).__name__, "in_place", in_place)

    def lower(self) -> Sequence[Lowered]:
        return (Lowered(Add, self),)


class OpList(Watched, nn.ModuleList):
    """The ops of a Residual. Every edit is seen; one that raises changes nothing."""

    owner = "Residual"
    kind: type[Op] = Op
    expected = "ops of opsgraph"
    """Whose ops they are, of which class, and what errors say of that."""

    def __init__(self, ops: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.extend(ops)

    def _forget(self) -> None:
        self.touch()

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """As nn.ModuleList's, for ops."""
        super().add_module(name, self._checked(module))
        self.touch()

    def __setattr__(self, name: str, value: Any) -> None:
        checked = self._checked(value) if isinstance(value, nn.Module) else value
        super().__setattr__(name, checked)

    def insert(self, index: int, module: nn.Module) -> None:
        """As nn.ModuleList's, for ops."""
        self._insert(index, self._checked(module))

    _insert = whole(nn.ModuleList.insert)
    extend = whole(nn.ModuleList.extend)
    pop = whole(nn.ModuleList.pop)
    __iadd__ = whole(nn.ModuleList.__iadd__)
    __setitem__ = whole(nn.ModuleList.__setitem__)
    __delitem__ = whole(nn.ModuleList.__delitem__)

    def _checked(self, module: Any) -> Any:
        if module is None:
            return None
        if not isinstance(module, self.kind):
            got = type(module).__name__
            raise PlanError(f"{self.owner}: got {got}, expected {self.expected}")
        Op.verify_added(module)
        return module


class Residual(Op):
    """`y = residual_scale * x + scale * f(x)`, f a run of ops.

    It is what `Tee("r"), *ops, Add("r")` is, without the name; with a ConstantScale of the branch
    and a ScaledAdd of x where scale and residual_scale, finite numbers, are not 1.
    """

    keeps_width = True
    scale = Checked(finite)
    residual_scale = Checked(finite)

    def __init__(self, *ops: Op, scale: float = 1.0, residual_scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.residual_scale = scale, residual_scale
        if wrong := [type(op).__name__ for op in ops if not isinstance(op, Op)]:
            raise PlanError(f"Residual: got {', '.join(wrong)}, expected ops of opsgraph")
        self.ops = OpList(ops)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "ops" and isinstance(value, nn.ModuleList) and not isinstance(value, OpList):
            value = OpList(value)
        if name == "ops" and not isinstance(value, OpList):
            raise OpError(type(self).__name__, f"ops={value!r}", "an nn.ModuleList of ops")
        super().__setattr__(name, value)

    @property
    def in_width(self) -> int | None:
        return width_between(list(self._inner()))

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        width = known(in_width, out_width, self.in_width)
        infer_sizes(list(self._inner()), width, width)

    def _inner(self) -> Iterable[Op]:
        return (op for op in self.ops if isinstance(op, Op))

    def parts(self) -> Sequence[Op]:
        name = f"residual {next(_serial)}"  # each time another: a Residual may stand in two places
        scaled = [] if self.scale == 1.0 else [ConstantScale(self.scale)]
        add = Add(name) if self.residual_scale == 1.0 else ScaledAdd(name, self.residual_scale)
        return [Tee(name), *self._inner(), *scaled, add]

    def lower(self) -> Sequence[Lowered]:
        tell_next(list(self.ops))
        return [entry for op in self.parts() for entry in op.lower()]

    @classmethod
    def sample(cls) -> Iterable[Op]:
        from .activations import SiLU

        return cls(SiLU()), cls(SiLU(), scale=0.5, residual_scale=0.75)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{n}={v}" for n in ("scale", "residual_scale") if (v := getattr(self, n)) != 1
        )


def tell_next(modules: Sequence[nn.Module]) -> None:
    """Tell every linear layer of a sequence which op follows it."""
    for module, following in itertools.pairwise(modules):
        if isinstance(module, BasicLinear):
            module.precede(following)
