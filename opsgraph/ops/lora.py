"""Adapters of low rank (Hu et al., 2021): `LoRA` adds one to a value, `LoRALinear` to a layer."""

import itertools
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from ..base.errors import OpError, PlanError
from ..guards.validation import Checked, Fixed, features, finite, number, place, size, text, whole
from ..kernels.reference.dropout import keep_mask
from ..op import Lowered, Op, Spec
from .dequantized import is_stored
from .linear import Linear
from .parameters import empty_parameter, known
from .residual import OpList, Tee
from .sizes import infer_sizes

_serial = itertools.count()
ADAPTED = "adapted "
"""What names of the channels begin with that LoRALinears make."""
_channels: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
"""What each LoRALinear calls its input; a copy calls it otherwise."""
Gradients = tuple[Tensor | None, tuple[Tensor | None, ...]]


def _probability(who: str, name: str, value: Any) -> float:
    return number(who, name, value, "a probability from 0 to 1", lambda p: 0 <= p <= 1)


def _start(who: str, name: str, value: Any) -> int | None:
    column: int | None = size(who, name, value, 0)
    return column


def _add(x: Tensor, other: Tensor, a: Tensor, b: Tensor, scale: float, start: int | None) -> Tensor:
    """`x + scale * (other @ a.T) @ b.T`, in the columns from start on; summed in b's dtype."""
    h = F.linear(other.to(a.dtype), a)
    if start is None and x.dtype == h.dtype:
        return torch.addmm(x, h, b.t(), alpha=scale)
    y = x.clone()
    add_in_place(y, h, b, scale, start)
    return y


def add_in_place(y: Tensor, h: Tensor, b: Tensor, scale: float, start: int | None) -> None:
    """`y += scale * h @ b.T`, in the columns from start on."""
    part = y.narrow(1, start or 0, b.shape[0])
    if part.dtype == h.dtype:
        part.addmm_(h, b.t(), alpha=scale)
    else:
        part.add_(h @ b.t(), alpha=scale)


def _gradients(
    dy: Tensor, other: Tensor, a: Tensor, b: Tensor, scale: float, start: int | None,
    want: Collection[str],
) -> Gradients:  # fmt: skip
    """dx is dy. `h = other @ a.T` is made again: it costs less than its memory."""
    part = dy.narrow(1, start or 0, b.shape[0]).to(b.dtype)
    dother = da = db = None
    if "other" in want or "lora_A" in want:
        dh = (part @ b).mul_(scale)
        dother = (dh @ a).to(other.dtype) if "other" in want else None
        da = dh.t() @ other.to(a.dtype) if "lora_A" in want else None
    if "lora_B" in want:
        db = (part.t() @ F.linear(other.to(a.dtype), a)).mul_(scale)
    return dy, (dother, da, db)


def _dropped(x: Tensor, seed: Tensor, p: float) -> Tensor:
    rows, width = x.shape
    keep = keep_mask(seed, rows, width, p)
    return torch.where(keep, x * (1.0 / (1.0 - p) if p < 1.0 else 0.0), 0)


class LoRA(Op):
    """`y = x + alpha / rank * (dropout(other) @ lora_A.T) @ lora_B.T`, other an extra input.

    x: `[*, out_features]`; other: `[*, in_features]`, the value of the Tee of that name or an extra
    input of the sequence; lora_A: `[rank, in_features]`, lora_B: `[out_features, rank]`, in any
    float dtype, in which the branch is computed. out_features may be left out where x tells it.
    start: with it the branch adds to the columns `start .. start + out_features` of a wider x.
    lora_A is initialized as nn.Linear's weight, lora_B to 0, as by peft. alpha: by default rank.
    dropout, of other in training, takes a Tee's value alone.
    """

    keeps_width = True
    extra_inputs = ("other",)
    as_stored = ("lora_A", "lora_B")
    constants: ClassVar[tuple[str, ...]] = ("scale", "start")
    training_matters = True
    in_features = Checked(features)
    out_features = Checked(features)
    rank = Fixed("another LoRA")
    scale = Checked(finite)
    start = Checked(_start)
    dropout = Checked(_probability)

    def __init__(
        self,
        in_features: int,
        out_features: int | None = None,
        rank: int = 8,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        start: int | None = None,
        name: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        who = type(self).__name__
        place(who, device, dtype)
        super().__init__()
        self.channels["other"] = text(who, "name", name)
        self.in_features = whole(who, "in_features", in_features, 0)
        self.out_features, self.rank = out_features, whole(who, "rank", rank)
        self.scale = 1.0 if alpha is None else finite(who, "alpha", alpha) / self.rank
        self.start, self.dropout = start, dropout
        self.lora_A = empty_parameter((self.rank, self.in_features), device, dtype)
        self.lora_B = empty_parameter((self.out_features, self.rank), device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """lora_A uniform within `1/sqrt(in_features)`, lora_B 0: the branch adds nothing."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if not isinstance(self.lora_B, UninitializedParameter):
            nn.init.zeros_(self.lora_B)

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        width = known(in_width, out_width)
        if self.out_features is None and self.start is None and width is not None:
            self.out_features = width
            if isinstance(self.lora_B, UninitializedParameter):
                self.lora_B.materialize((width, self.rank))
                nn.init.zeros_(self.lora_B)

    def shape_of(self, name: str) -> tuple[int | None, ...] | None:
        return {
            "lora_A": (self.rank, self.in_features),
            "lora_B": (self.out_features, self.rank),
        }.get(name)

    def reject(self, x: Spec) -> str | None:
        end = (self.start or 0) + (self.out_features or 0)
        if self.start is None and x.width != end:
            return f"got input width {x.width}, expected {end}"
        return f"got input width {x.width}, expected {end} or more" if x.width < end else None

    def extra_spec(self, name: str, x: Spec) -> Spec | None:
        return x.like(self.in_features)

    def identity(self, direction: str, training: bool) -> bool:
        return training and self.dropout > 0.0  # `DroppedLoRA` is there then

    def lower(self) -> Sequence[Lowered]:
        if self.dropout == 0.0:
            return [Lowered(LoRA, self)]
        if self.channels["other"] is None:
            got = "dropout of an extra input of the sequence"
            raise OpError(type(self).__name__, got, "a name, that of a Tee")
        return [Lowered(LoRA, self), Lowered(DroppedLoRA, self)]

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(
        self, x: Tensor, other: Tensor, lora_A: Tensor | None, lora_B: Tensor | None,
        scale: float, start: int | None,
    ) -> tuple[Tensor, tuple[()]]:  # fmt: skip
        if lora_A is None or lora_B is None:  # an adapter that is switched off
            return x.clone(), ()
        return _add(x, other, lora_A, lora_B, scale, start), ()

    def bwd(
        self, dy: Tensor, other: Tensor, lora_A: Tensor | None, lora_B: Tensor | None,
        scale: float, start: int | None, want: Collection[str],
    ) -> Gradients:  # fmt: skip
        if lora_A is None or lora_B is None:
            return dy, (torch.zeros_like(other) if "other" in want else None, None, None)
        return _gradients(dy, other, lora_A, lora_B, scale, start, want)

    def extra_repr(self) -> str:
        more = "" if self.start is None else f", start={self.start}"
        more += f", dropout={self.dropout}" if self.dropout else ""
        return f"{self.in_features}, {self.out_features}, {self.rank}, scale={self.scale:g}{more}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return cls(12, rank=3, alpha=6.0), cls(12, 2, 3, start=1)


class DroppedLoRA(LoRA):
    """What LoRA with dropout is in training. The mask is that of `Dropout`: its seed is saved."""

    saves = ("seed",)
    constants = ("scale", "start", "dropout")
    random = True

    def identity(self, direction: str, training: bool) -> bool:
        return not training

    def saved(self, x: Spec) -> dict[str, Spec]:
        return {"seed": Spec((), torch.int64, x.device)}

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(  # type: ignore[override]
        self, x: Tensor, other: Tensor, lora_A: Tensor | None, lora_B: Tensor | None,
        scale: float, start: int | None, dropout: float,
    ) -> tuple[Tensor, tuple[Tensor]]:  # fmt: skip
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
        return DroppedLoRA.again(self, x, other, lora_A, lora_B, seed, scale, start, dropout), (
            seed,
        )

    def again(
        self, x: Tensor, other: Tensor, lora_A: Tensor | None, lora_B: Tensor | None,
        seed: Tensor, scale: float, start: int | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        """The same y, from the seed."""
        if lora_A is None or lora_B is None:
            return x.clone()
        return _add(x, _dropped(other, seed, dropout), lora_A, lora_B, scale, start)

    def bwd(  # type: ignore[override]
        self, dy: Tensor, other: Tensor, lora_A: Tensor | None, lora_B: Tensor | None,
        seed: Tensor, scale: float, start: int | None, dropout: float, want: Collection[str],
    ) -> Gradients:  # fmt: skip
        if lora_A is None or lora_B is None:
            return LoRA.bwd(self, dy, other, lora_A, lora_B, scale, start, want)
        given = _dropped(other, seed, dropout)
        dx, (dother, da, db) = _gradients(dy, given, lora_A, lora_B, scale, start, want)
        return dx, (None if dother is None else _dropped(dother, seed, dropout), da, db)

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return ()


class Branches(OpList):
    """The branches of a LoRALinear."""

    owner, kind, expected = "LoRALinear", LoRA, "LoRA branches"


class LoRALinear(Op):
    """`y = linear(x)` plus what each `LoRA` branch makes of x.

    x: `[*, linear.in_features]`. In a plan it is a Tee, the layer's own ops and the branches. The
    layer's parameters are as they were: freeze them with `linear.requires_grad_(False)`, and
    nothing is kept for their gradients. Without branches it has the value of the layer. Raises
    OpError for branches of other sizes than the layer's. It cannot stand in a sequence twice.
    """

    def __init__(self, linear: Linear, *branches: LoRA) -> None:
        super().__init__()
        self.linear = linear
        for branch in branches:
            self._verify(linear, branch)
        self._name(branches)
        self.branches = Branches(branches)

    def __setattr__(self, name: str, value: Any) -> None:
        who = type(self).__name__
        if name == "branches" and isinstance(value, nn.ModuleList):
            value = value if isinstance(value, Branches) else Branches(value)
        elif name == "branches":
            raise OpError(who, f"branches={value!r}", "an nn.ModuleList of LoRA branches")
        if name == "linear" and not isinstance(value, Linear):
            raise OpError(who, f"linear of {type(value).__name__}", "a Linear of opsgraph.ops")
        if name == "linear" and (
            value.in_features is None or value.out_features is None or value.group_size > 1
        ):
            raise OpError(who, f"{value!r}", "a Linear with its sizes, not split among ranks")
        super().__setattr__(name, value)

    def _verify(self, linear: Linear, branch: Any) -> None:
        who, rows = type(self).__name__, linear.out_features or 0
        if not isinstance(branch, LoRA):
            raise PlanError(f"{who}: got {type(branch).__name__}, expected LoRA branches")
        branch.complete(rows, rows)
        end = (branch.start or 0) + (branch.out_features or 0)
        fits = end == rows if branch.start is None else end <= rows
        if branch.in_features != linear.in_features or not fits:
            raise OpError(who, f"a branch {branch!r}", f"one for {linear!r}")

    @property
    def in_width(self) -> int | None:
        return self.linear.in_width

    def width_before(self, out_width: int) -> int | None:
        return self.linear.width_before(out_width)

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        infer_sizes([self.linear], in_width, out_width)
        for branch in self.loras:
            branch.complete(self.linear.out_features, self.linear.out_features)

    def parts(self) -> Sequence[Op]:
        branches = self.loras
        tee = [Tee(self._name(branches))] if branches else []
        return [*tee, self.linear, *branches]

    def _name(self, branches: Iterable[LoRA]) -> str:
        name = _channels.setdefault(self, f"{ADAPTED}{next(_serial)}")
        for branch in branches:
            branch.channels["other"] = name
        return name

    @property
    def loras(self) -> list[LoRA]:
        """The branches, as they are now."""
        return [op for op in self.branches if isinstance(op, LoRA)]

    def lower(self) -> Sequence[Lowered]:
        return [entry for op in self.parts() for entry in op.lower()]

    @torch.no_grad()
    def merged(self) -> Linear:
        """A Linear that computes the same with one product; nothing of this op is modified.

        The weight is summed in fp32, or in fp64 for fp64, and rounded once; one that is stored in
        another way, as `quantized_model_init` does, is dequantized and stays so.
        """
        weight = self.linear.home("weight")
        stored = getattr(*weight)
        whole = stored.dequantize() if is_stored(stored) else stored
        total = whole.detach().to(torch.promote_types(whole.dtype, torch.float32), copy=True)
        for branch in self.loras:
            a, b = (getattr(*branch.home(name)) for name in ("lora_A", "lora_B"))
            if a is not None and b is not None:
                rows = total.narrow(0, branch.start or 0, b.shape[0])
                rows.addmm_(b.to(total.dtype), a.to(total.dtype), alpha=branch.scale)
        made = Linear(
            self.linear.in_features, self.linear.out_features, self.linear.has("bias"),
            device="meta",
        )  # fmt: skip
        made.weight = nn.Parameter(total.to(whole.dtype), requires_grad=stored.requires_grad)
        if self.linear.has("bias"):
            bias = getattr(*self.linear.home("bias"))
            made.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return made.train(self.training)

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(Linear(16, 24), LoRA(16, 24, 3, alpha=6.0)),)
