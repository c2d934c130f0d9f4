"""Stand-ins at run time: `Unit`, in the place of a module's forward, and `Deferred`, for its value.

A unit that a tensor reaches returns a Deferred: the tensor, and what is to be done to it. The next
unit, an activation, a product or a sum takes it further, along the states that were proven. At the
last of them the plan runs. Any other use of a Deferred computes it, by the plan of its state or by
the model's own modules: so whatever the model's code does with it, it gets the value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .replacing import Replacing, Settings, original
from .seen import Seen, all_seen, seen_by, unchanged, version
from .states import Kind, State, Step, all_states, kind_of, units_of


class Book:
    """What the units of one model share. learning: what notes each use, while one is learnt."""

    def __init__(self) -> None:
        self.learning: Any = None
        self.units: list[Unit] = []
        self.experts: list[Any] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "learning": None}


class Unit(Replacing):
    """A linear layer, a norm or an activation whose forward may be put off."""

    def __init__(self, name: str, module: nn.Module, leaf: Any, book: Book) -> None:
        self.name, self.module, self.leaf, self.book = name, module, leaf, book
        self.step = Step("module", self)
        self.first: State | None = None
        """What it makes of a tensor."""
        self.kinds: set[Kind] = set()
        """Of calls for which all plans that it may start were proven."""
        self.watched: list[Any] = []
        """Dicts of hooks: while any is filled, the modules of its plans run as they are."""
        self.forwards: list[tuple[nn.Module, Any]] = []
        """Modules around them and the forward that is to be found there."""
        self.settings: list[Settings] = []
        """What the modules of its plans compute by."""
        self.read: list[tuple[dict[str, Any], str]] = []
        """Where the parameters of its plans are: they are to have the dtype of what is given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own, put off where a plan may compute it."""
        if torch.compiler.is_compiling():
            return original(self.module, *args, **kwargs)
        if len(args) == 1 and not kwargs:
            x = args[0]
            if type(x) is Deferred:
                found = x.further(self.step)
            else:
                found = self.start(x) if self._follows(x) else None
            if found is not None:
                return found
        return original(self.module, *computed(args), **computed(kwargs))

    def _follows(self, x: Any) -> bool:
        if type(x) is not Tensor or x.is_meta:
            return False
        if self.book.learning is not None:
            return self.leaf.width is None or x.shape[-1] == self.leaf.width
        return (
            self.first is not None
            and (self.leaf.width is None or x.shape[-1] == self.leaf.width)
            and kind_of(x) in self.kinds
            and not any(self.watched)
            and all(m.__dict__.get("forward") is forward for m, forward in self.forwards)
            and all(settings.hold() for settings in self.settings)
            and all(getattr(of.get(name), "dtype", None) is x.dtype for of, name in self.read)
            and torch._C._get_tracing_state() is None
        )

    def start(self, x: Tensor) -> Tensor | None:
        """The value for a tensor."""
        if self.first is None:
            self.first = State(self.step, (None,))
        return reach(self.first, x, (None,), (), self.book)


def computed(value: Any) -> Any:
    """A structure of arguments with values in the place of Deferreds."""
    if type(value) is Deferred:
        return value.compute()
    if type(value) in (tuple, list):
        return type(value)(map(computed, value))
    if type(value) is dict:
        return {key: computed(item) for key, item in value.items()}
    return value


def reach(
    state: State, root: Tensor, parents: tuple[Any, ...], extras: tuple[Tensor, ...], book: Book,
    kind: Kind | None = None,
) -> Tensor | None:  # fmt: skip
    """The value in a state: computed now, or put off. None where it must not be followed.

    kind: of the call, where it is known.
    """
    if book.learning is not None:
        found = book.learning.reached(state, root, parents, extras, book)
        return found  # type: ignore[no-any-return]
    if state.now:
        if any(d is not None and d.stale() for d in parents):
            return Deferred.of(state, root, parents, extras, book).compute()  # which raises
        return state.plan(root, *extras)  # type: ignore[no-any-return]
    if any(x.is_inference() for x in (root, *extras)):
        return None  # they do not tell whether they were changed before the value is computed
    return Deferred.of(state, root, parents, extras, book, kind)


class Deferred(Tensor):
    """A value that is not computed yet. Its shape, dtype and device are those of the value."""

    state: State
    root: Tensor
    parents: tuple[Any, ...]
    """The Deferreds that it was made of, None for the root."""
    extras: tuple[Tensor, ...]
    book: Book
    value: Tensor | None
    written: int
    """How often the value had been changed in place when it was computed."""
    total: Tensor | None
    """What it became by `+=`."""
    kind: Kind
    seen: tuple[Seen, ...]
    """What its step alone reads."""
    grad_mode: bool
    __torch_dispatch__: Any

    @staticmethod
    def of(
        state: State, root: Tensor, parents: tuple[Any, ...], extras: tuple[Tensor, ...],
        book: Book, kind: Kind | None = None,
    ) -> Deferred:  # fmt: skip
        kind = kind or kind_of(root)
        width, dtype = state.like[kind]
        made: Any = Tensor._make_wrapper_subclass(
            Deferred, (*root.shape[:-1], width), dtype=dtype, device=root.device
        )
        made.__dict__.update(  # in one step, for each value of a model is made so
            state=state, root=root, parents=parents, extras=extras, book=book, value=None,
            total=None, written=0, kind=kind, seen=seen_by(state, root, parents, extras),
            grad_mode=torch.is_grad_enabled(),
        )  # fmt: skip
        return made  # type: ignore[no-any-return]

    def further(self, step: Step, *more: Any, extra: Tensor | None = None) -> Any:
        """The value after a step, which may read more Deferreds; None where it is not proven."""
        if self.grad_mode is not torch.is_grad_enabled() or self.total is not None:
            return None
        if not all(d is None or d.intact() for d in more):
            return None
        if self.kind != kind_of(self.root):
            return None
        states = [d if d is None else d.state for d in more]
        state = self.state.next.get((step, *states))
        if state is None and self.book.learning is not None and self.state.takes(step):
            key, state = self.state.after(step, *states)
            self.state.next[key] = state
        if state is None or state.barred is not None:
            return None
        if self.value is not None and self.book.learning is None:
            return None
        if self.book.learning is not None and self.stale() is not None:
            self.compute()  # which notes it
            return None
        extras = self.extras if extra is None else (*self.extras, extra)
        return reach(state, self.root, (self, *more), extras, self.book, self.kind)

    def intact(self) -> bool:
        """Whether it still has the value of its state: none was added to it, or written over it."""
        if self.value is None or self.total is not None:
            return self.total is None
        return not self.value.is_inference() and version(self.value) == self.written

    def stale(self) -> str | None:
        """Why the value can no longer be computed, or None."""
        if not unchanged(all_seen(self)):
            return "what it is computed of was changed in place, or replaced"
        if self.grad_mode and not torch.is_grad_enabled():
            return "it is first read where no gradients are recorded, and was made where they are"
        return None

    def compute(self) -> Tensor:
        """The value."""
        if self.book.learning is not None:
            self.book.learning.read(self)
        if self.total is not None:
            return computed(self.total)  # type: ignore[no-any-return]
        if self.value is None:
            if why := self.stale():
                units = ", ".join(unit.name for unit in units_of(self.state))
                raise RuntimeError(
                    f"opsgraph: a value of {units} is computed late, and {why}; "
                    "opsgraph.integrations.transformers.unpatch(model) avoids it"
                )
            with torch.set_grad_enabled(self.grad_mode), _as_made(self):
                if self.state.plan is not None:
                    self.value = self.state.plan(self.root, *self.extras)
                elif not all(d is None or d.intact() for d in self.parents):
                    found = self.state.run(self.root, self.extras, original)
                    self.value = found[self.state]
                else:
                    values = [self.root if d is None else d.compute() for d in self.parents]
                    extra = self.extras[-1] if self.extras else None
                    self.value = self.state.compute(values, extra, original)
            self.written = version(self.value)
        return self.value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        follow = _FOLLOWED.get(func)
        if follow is not None and (not kwargs or _takes(follow, args, kwargs)):
            found = follow(*args, **kwargs)
            if found is not None:
                return found
        return func(*computed(args), **computed(kwargs))


def _takes(follow: Callable[..., Any], args: Any, kwargs: Any) -> bool:
    """Whether arguments are what a function of `_FOLLOWED` knows: `out=` is not."""
    try:
        signature(follow).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _as_made(deferred: Deferred) -> AbstractContextManager[Any]:
    """Autocast as it was when a value was put off."""
    root, (_, dtype) = deferred.root, deferred.kind
    if deferred.kind == kind_of(root):
        return nullcontext()
    return torch.autocast(root.device.type, dtype, enabled=dtype is not None)


def _refuse(func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    raise RuntimeError(f"opsgraph: {func} got a value that is not computed yet, past PyTorch's API")


Deferred.__torch_dispatch__ = staticmethod(_refuse)

_KNOWN = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout")),
    *(getattr(Tensor, name).__get__ for name in ("is_cuda", "is_meta")),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.is_floating_point),
    *(Tensor.__len__, Tensor.nelement, Tensor.element_size, Tensor.is_complex),
}
"""What a Deferred can tell without its value."""


def _add(a: Any, b: Any, **options: Any) -> Any:
    if options:
        return None
    if type(a) is not Deferred:
        a, b = b, a
    if type(b) is Deferred:
        if a.root is not b.root:
            return None
        for one, other in ((a, b), (b, a)):
            if one.state is not other.state and other.state in one.state.before():
                return None if other.extras else one.further(Step("residual"), other)
        return None
    if b is a.root:
        return a.further(Step("residual"), None)
    if type(b) is Tensor and b.shape == a.shape and b.dtype == a.dtype:
        return a.further(Step("extra"), extra=b)
    return None


def _add_in_place(a: Any, b: Any, **options: Any) -> Any:
    """`a += b` as `a + b`; whoever still holds a gets the sum, as it was."""
    if type(a) is not Deferred or type(b) is Deferred:
        return None
    if a.value is not None and a.book.learning is None:
        return None
    found = _add(a, b, **options)
    if found is not None:
        a.total = found
    return found


def _multiply(a: Any, b: Any) -> Any:
    if type(a) is not Deferred:
        a, b = b, a
    if type(b) is Deferred:
        if a.root is not b.root or a.extras or b.extras:
            return None
        return a.further(Step("product"), b)
    if type(b) in (int, float):
        return a.further(Step("scale", float(b)))
    if type(b) is not nn.Parameter or b.ndim != 1 or b.shape[-1] != a.shape[-1]:
        return None
    steps = [step for step, *_ in a.state.next if step.kind == "vector"]
    step = next((step for step in steps if step.what.now() is b), None)
    if step is None and a.book.learning is not None:
        vector = a.book.learning.vector(b)
        step = None if vector is None else Step("vector", vector)
    return None if step is None else a.further(step)


def _dropout(x: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    learning = x.book.learning if type(x) is Deferred else None
    if learning is not None:
        learning.asked = True
        if learning.drops:
            return None
    return x if not training or p == 0 else None


def _halves(x: Any, dim: int) -> Any:
    if type(x) is not Deferred or dim not in (-1, len(x.root.shape) - 1):
        return None
    halves = [x.further(Step("half", which)) for which in (0, 1)]
    return None if any(half is None for half in halves) else tuple(halves)


def _chunk(x: Any, chunks: int, dim: int = 0) -> Any:
    return _halves(x, dim) if chunks == 2 else None


def _split(x: Any, size: Any, dim: int = 0) -> Any:
    if type(x) is not Deferred:
        return None
    sizes = [size, size] if type(size) is int else list(size)
    return _halves(x, dim) if len(sizes) == 2 and sizes == [x.shape[-1] // 2] * 2 else None


def _function(name: str) -> Callable[..., Any]:
    def follow(x: Any, inplace: bool = False) -> Any:
        return x.further(Step("function", name)) if type(x) is Deferred and not inplace else None

    return follow


def _gelu(x: Any, approximate: str = "none") -> Any:
    name = {"none": "gelu_erf", "tanh": "gelu_tanh"}.get(approximate)
    return x.further(Step("function", name)) if type(x) is Deferred and name else None


def _same(x: Any, *args: Any, **kwargs: Any) -> Any:
    """For conversions to the dtype that it has."""
    kept = type(x) is Deferred and not kwargs and (args == () or args == (x.dtype,))
    return x if kept else None


_FOLLOWED: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys((Tensor.add, torch.add, Tensor.__radd__), _add),
    **dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add_in_place),
    **dict.fromkeys((Tensor.mul, torch.mul), _multiply),
    functional.dropout: _dropout,
    torch.dropout: _dropout,
    functional.silu: _function("silu"),
    functional.gelu: _gelu,
    functional.relu6: _function("relu6"),
    functional.hardswish: _function("hardswish"),
    functional.mish: _function("mish"),
    **dict.fromkeys((functional.sigmoid, torch.sigmoid, Tensor.sigmoid), _function("sigmoid")),
    **dict.fromkeys((functional.tanh, torch.tanh, Tensor.tanh), _function("tanh")),
    **dict.fromkeys((functional.relu, torch.relu, Tensor.relu), _function("relu")),
    **dict.fromkeys((Tensor.chunk, torch.chunk), _chunk),
    **dict.fromkeys((Tensor.split, torch.split), _split),
    Tensor.to: _same,
    Tensor.contiguous: _same,
}


def keep_proven(units: Sequence[Unit]) -> None:
    """Forget what was not proven: only steps on the way to a plan stay."""
    kept = {b for s in all_states(units) if s.plan is not None for b in s.before()}
    for state in all_states(units):
        following = {k: n for k, n in state.next.items() if n in kept and not state.eager}
        state.next, state.now = following, state.plan is not None and not following
    for unit in units:
        unit.first = unit.first if unit.first in kept else None
