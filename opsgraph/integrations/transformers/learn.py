"""Learning a model's wiring: its units are followed while it runs, each value computed at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

from torch import Tensor, nn

from .deferred import Book, Deferred, Unit, computed
from .replacing import original
from .seen import all_seen, unchanged
from .states import State, Vector, all_states, kind_of, units_of

MOST = 30
"""Runs until nothing changes any more; each settles at least one value."""


NOTHING = "nothing is gained by a plan of it"
_LAYERS = {"GradientCheckpointingLayer", "PreTrainedModel"}


class Learning:
    """One run: every value that was put off, and how it was used.

    drops: whether dropout counts as a step that no plan contains, as it does in training.
    """

    asked = False
    """Whether a value came to a dropout, so that `drops` made a difference."""

    def __init__(self, model: nn.Module, vectors: dict[int, Vector], drops: bool) -> None:
        self.model, self.vectors, self.drops = model, vectors, drops
        self.made: list[Noted] = []

    def reached(
        self, state: State, root: Tensor, parents: tuple[Any, ...], extras: tuple[Tensor, ...],
        book: Book,
    ) -> Tensor | None:  # fmt: skip
        """The value, as a Deferred unless nothing may follow."""
        if state.barred is not None:
            return None
        values = [root if d is None else d.value for d in parents]
        value = state.compute(values, extras[-1] if extras else None, original)
        state.like[kind_of(root)] = value.shape[-1], value.dtype
        if value.shape[:-1] != root.shape[:-1]:
            state.barred = "it changes sizes before the last"
            return None
        found = Deferred.of(state, root, parents, extras, book)
        found.value = value
        noted = Noted(found, [None if d is None else d.noted for d in parents])
        found.noted = noted  # type: ignore[attr-defined]
        self.made.append(noted)
        return value if state.eager else found

    def vector(self, parameter: Tensor) -> Vector | None:
        """Where a parameter is held."""
        if id(parameter) not in self.vectors:
            for name, module in self.model.named_modules():
                for attribute, held in module._parameters.items():
                    if held is parameter:
                        vector = Vector(f"{name}.{attribute}", module, attribute)
                        self.vectors[id(parameter)] = vector
        return self.vectors.get(id(parameter))

    def read(self, deferred: Deferred) -> None:
        """The model reads a value."""
        noted: Noted = deferred.noted  # type: ignore[attr-defined]
        noted.read = True
        noted.late = noted.late or deferred.stale() is not None


class Noted:
    """What is known of a Deferred, which it outlives."""

    def __init__(self, deferred: Deferred, parents: Sequence[Noted | None]) -> None:
        self.state, self.parents = deferred.state, parents
        self.root, self.extras = deferred.root, deferred.extras
        self.deferred, self.seen = ref(deferred), all_seen(deferred)
        self.read = False
        self.late = False
        """Whether it is used when it could no longer be computed."""
        self.children: list[Noted] = []
        for parent in parents:
            if parent is not None:
                parent.children.append(self)

    def changed(self) -> bool:
        """Whether the model has changed in place what a plan would have kept for its backward."""
        return not unchanged(self.seen)

    def before(self) -> list[Noted]:
        """Itself and all that it was made of, each once."""
        found = {id(self): self}
        waiting = [self]
        while waiting:
            parents = [p for p in waiting.pop().parents if p is not None and id(p) not in found]
            found |= {id(parent): parent for parent in parents}
            waiting += parents
        return [*found.values()]


def worth(state: State) -> bool:
    """Whether a plan gains by computing up to here: an MLP, or a norm."""
    kinds = {s.step.what.leaf.kind for s in state.before() if s.step.kind == "module"}
    return not state.open and ("linear" in kinds or "norm" in kinds)


def _settle(learning: Learning) -> tuple[dict[State, Noted], bool]:
    """The states that end plans, each with an example; whether states were changed meanwhile."""
    for noted in learning.made:
        if (deferred := noted.deferred()) is not None:
            deferred.parents = ()  # which would keep values that the model let go
    deferred = None
    changed = False
    finals: list[Noted] = []
    gone: set[int] = set()
    for noted in reversed(learning.made):
        state, escaped = noted.state, noted.deferred() is not None
        children = [child for child in noted.children if id(child) not in gone]
        used_twice = bool(children) and (noted.read or escaped)
        if (used_twice or noted.late) and not state.eager:
            state.eager = changed = True
        if children and not state.eager:
            continue
        if state.barred is None and noted.changed():
            state.barred, changed = "what it is computed of is changed in place later", True
        if worth(state) and state.barred is None:
            finals.append(noted)
            continue
        gone.add(id(noted))
        for parent in noted.parents:
            if parent is not None:
                parent.read = True
        if state.barred is None:
            state.barred, changed = NOTHING, True
    if changed:  # what is shared may be so only until then
        return {}, True
    shared: Counter[int] = Counter()
    by_id: dict[int, Noted] = {}
    for final in finals:
        inner = {id(n): n for n in final.before() if n is not final}
        shared.update(inner.keys())
        by_id |= inner
    for key, count in shared.items():
        if count > 1 and not by_id[key].state.eager:
            by_id[key].state.eager = changed = True
    return {noted.state: noted for noted in finals}, changed


def boundaries(model: nn.Module, units: Sequence[Unit]) -> list[nn.Module]:
    """The layers of a model, which may be checkpointed: what one returns has to be computed."""
    norms = {unit.module for unit in units if unit.leaf.kind == "norm"}
    found = []
    for parent in model.modules():
        for module in parent.children():
            named = {kind.__name__ for kind in type(module).__mro__}
            listed = isinstance(parent, nn.ModuleList | nn.Sequential) and module not in norms
            if named & _LAYERS or (listed and any(m in norms for m in module.modules())):
                found.append(module)
    return found


def _leaves(module: nn.Module, args: Any, result: Any) -> Any:
    """A hook: what a layer returns is read, and what follows starts from it."""
    return computed(result)


def learn(
    model: nn.Module,
    book: Book,
    units: Sequence[Unit],
    run: Callable[[], Any],
    prove: Callable[[Noted], str | None],
) -> None:
    """Run until the states that end plans are settled and proven.

    run: runs the model. prove: builds and proves the plan of a state, or gives the reason why
    there is none: then no plan contains the last step of the state.
    """
    hooks = [module.register_forward_hook(_leaves) for module in boundaries(model, units)]
    try:
        _learn(model, book, units, run, prove)
    finally:
        for hook in hooks:
            hook.remove()


def _learn(
    model: nn.Module,
    book: Book,
    units: Sequence[Unit],
    run: Callable[[], Any],
    prove: Callable[[Noted], str | None],
) -> None:
    quiet, drops = 0, False
    vectors: dict[int, Vector] = {}
    for _ in range(MOST):
        book.learning = Learning(model, vectors, drops)
        try:
            result = run()  # what is still there after it has left the model
            finals, changed = _settle(book.learning)
            asked = book.learning.asked
        finally:
            book.learning = None
        del result
        if not changed:
            for state, noted in finals.items():
                if state.plan is None and (reason := prove(noted)) is not None:
                    state.barred, changed = reason, True
        if changed:
            quiet = 0
        else:
            quiet, drops = quiet + 1, not drops
            if quiet == 2 or not asked:
                return
    for state in all_states(units):
        if state.plan is None and not state.next:
            state.barred = state.barred or "the uses of its values were not settled"


def names_of(state: State) -> list[str]:
    """The modules of a state."""
    return [unit.name for unit in units_of(state)]
