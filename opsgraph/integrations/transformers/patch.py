"""`patch` and `unpatch`."""

from __future__ import annotations

import os.path
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...base.errors import OpsgraphError
from ...features.several import SeveralLayers
from ...guards.validation import mapping, module
from .deferred import Book, Deferred, Unit, keep_proven
from .example import example_for
from .experts import Experts, Proven, found_in
from .learn import NOTHING, learn
from .leaves import Refused, leaf_of
from .prove import Proof, Prover, steps_of
from .replacing import Settings
from .report import Report, Row
from .states import State, all_states, units_of

_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"


def patch(model: nn.Module, example: Mapping[str, Any] | None = None) -> Report:
    """Have plans compute the norms, MLPs and residuals of a model; returns what was done.

    model: of transformers, or any other whose parts are modules. Parameters, state_dict keys and
    classes of modules stay. example: keyword arguments for one small call of the model, by default
    made from its config. The model is run on it several times, in evaluation mode, and each plan is
    compared with the modules in whose place it runs, values and gradients, in fp32, bf16 and
    the model's dtype; one that differs is not used. Raises OpsgraphError for a model that is
    patched already, on the meta device, or without an example; then the model is as it was.
    """
    start = time.perf_counter()
    module("patch", model)
    if example is not None:
        mapping("patch", "example", example)
    if _book(model) is not None:
        raise OpsgraphError("patch: the model is patched already; unpatch(model) comes first")
    if any(p.is_meta for p in model.parameters()):
        raise OpsgraphError("patch: got a model on the meta device, expected one with its weights")
    modes = {part: part.training for part in model.modules()}
    model.eval()
    book, left, known = Book(), [], {}  # type: ignore[var-annotated]
    for name, part in model.named_modules():
        try:
            leaf = leaf_of(part, known)
        except Refused as error:
            left.append((name, type(part).__name__, str(error)))
            continue
        if leaf is not None:
            book.units.append(Unit(name, part, leaf, book))
    try:
        given = dict(example) if example is not None else example_for(model)
        before = _outputs(model, given)
        report = _patched(model, book, given, before, left)
    except BaseException:
        _restore(book)
        raise
    finally:
        for part, mode in modes.items():
            part.training = mode
    object.__setattr__(report, "seconds", time.perf_counter() - start)
    return report


def unpatch(model: nn.Module) -> None:
    """Have a patched model's modules compute by themselves again.

    Raises OpsgraphError for a model that is not patched.
    """
    book = _book(module("unpatch", model))
    if book is None:
        raise OpsgraphError("unpatch: the model is not patched")
    _restore(book)


def _book(model: nn.Module) -> Book | None:
    for part in model.modules():
        unit = getattr(part.__dict__.get("forward"), "__self__", None)
        if isinstance(unit, Unit | Experts):
            return unit.book
    return None


def _restore(book: Book) -> None:
    for unit in (*book.units, *book.experts):
        unit.remove()
    for state in all_states(book.units):
        for op in state.plan or ():
            for home, _ in op._homes.values():
                if isinstance(home, SeveralLayers):
                    home.unpack()


def _patched(
    model: nn.Module, book: Book, given: dict[str, Any], before: list[Tensor], left: list[Any]
) -> Report:
    own = {p.dtype for p in model.parameters() if p.is_floating_point()}
    dtypes = list(dict.fromkeys((torch.float32, torch.bfloat16, *own)))
    prover = Prover(dtypes, casts=torch.float32 in own)
    mixtures = found_in(model, book, dtypes, left)
    book.experts = [experts for experts, _ in mixtures]
    units: list[Unit | Experts] = [*book.units, *book.experts]
    for unit in units:
        unit.install()

    def run() -> Any:
        with _seeded(), torch.enable_grad():
            return model(**given)

    learn(model, book, book.units, run, prover)
    barred = [s for s in all_states(book.units) if s.barred not in (None, NOTHING)]
    keep_proven(book.units)
    unused = [unit for unit in book.units if not _takes_part(unit, book)]
    for unit in unused:
        unit.remove()
    book.units = [unit for unit in book.units if unit not in set(unused)]
    _watch(model, book)
    after = _outputs(model, given)
    difference = _difference(before, after)
    worst = 1e-3 if own == {torch.float32} else 0.5
    if not difference <= worst:
        raise OpsgraphError(
            f"patch: outputs differ by {difference:.1e}, relative; nothing is patched"
        )
    rows = [*_rows(prover, book), *_expert_rows(mixtures)]
    return Report(rows, _left(barred, left), difference)


def _takes_part(unit: Unit, book: Book) -> bool:
    return any(unit in units_of(state) for state in all_states(book.units))


def _watch(model: nn.Module, book: Book) -> None:
    modules = dict(model.named_modules())
    for experts in book.experts:
        experts.settings = [Settings.of(part) for part in experts.inside]
    for unit in book.units:
        if unit.first is None:
            continue
        states = [s for s in all_states(book.units) if s.plan and unit.first in s.before()]
        unit.kinds = set.intersection(*(set(state.like) for state in states))
        units = {u: None for state in states for u in units_of(state)}
        unit.read = [
            (u.module._parameters, name)
            for u in units
            for name in (u.leaf.names.values() if isinstance(u, Unit) else (u.attribute,))
        ]
        names = [u.name for u in units if isinstance(u, Unit)]
        shared = _shared(names)
        inside = {
            name.rsplit(".", k)[0] for name in names for k in range(name.count(".") + 1)
        }  # fmt: skip
        inner = [modules[n] for n in sorted(inside) if n.startswith(f"{shared}.") or n in names]
        unit.watched = [m.__dict__[hooks] for m in inner for hooks in _HOOKS]
        own = {u.module: None for u in units if isinstance(u, Unit)}
        unit.settings = [Settings.of(m) for m in own]
        unit.forwards = [(m, m.__dict__.get("forward")) for m in inner if m not in own]


def _outputs(model: nn.Module, given: dict[str, Any]) -> list[Tensor]:
    with _seeded(), torch.no_grad():
        return list(_tensors(model(**given)))


@contextmanager
def _seeded() -> Iterator[None]:
    """The same random numbers in each run, and the caller's unchanged."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Deferred):
        raise OpsgraphError("patch: a value that is not computed left the model")
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)


def _difference(before: list[Tensor], after: list[Tensor]) -> float:
    if len(before) != len(after):
        return float("inf")
    found = 0.0
    for one, other in zip(before, after, strict=True):
        if one.is_floating_point() and one.numel():
            if one.shape != other.shape or one.dtype != other.dtype:
                return float("inf")
            one, other = one.double().nan_to_num(), other.double().nan_to_num()
            found = max(found, float((one - other).norm() / one.norm().clamp_min(1e-30)))
    return found


def _rows(prover: Prover, book: Book) -> Iterator[Row]:
    groups: dict[Any, list[tuple[str, State, Proof]]] = {}
    for state in all_states(book.units):
        if state.plan is not None:
            proof, name = prover.of[state], _name(state)
            key = re.sub(r"\d+", "*", name), tuple(proof.shown), proof.saved
            groups.setdefault(key, []).append((name, state, proof))
    for (name, shown, saved), members in groups.items():
        first, _, proof = members[0]
        yield Row(
            name if len(members) > 1 else first,
            _sentence(shown),
            proof.steps,
            saved,
            proof.saved_before,
            proof.fp32,
            proof.half,
            len(members),
        )


def _expert_rows(mixtures: list[tuple[Experts, Proven]]) -> Iterator[Row]:
    groups: dict[Any, list[tuple[Experts, Proven]]] = {}
    for experts, proven in mixtures:
        groups.setdefault((re.sub(r"\d+", "*", experts.name), id(proven)), []).append(
            (experts, proven)
        )
    for (name, _), members in groups.items():
        first, proven = members[0]
        plan = first.run.plan()
        ops = ", ".join(type(op).__name__ for op in first.run)
        yield Row(
            name if len(members) > 1 else first.name,
            f"experts({ops})",
            steps_of(plan),
            plan.saved_bytes_per_row,
            proven.saved_before,
            proven.fp32,
            proven.half,
            len(members),
        )


def _sentence(shown: tuple[str, ...]) -> str:
    return ", ".join(shown).replace("(, ", "(").replace(", )", ")")


def _name(state: State) -> str:
    names = [unit.name for unit in units_of(state)]
    return _shared(names) if len(names) > 1 else names[0]


def _shared(names: list[str]) -> str:
    """The name of the module that holds all of these."""
    paths = [f"/{name.replace('.', '/')}" for name in names]
    return os.path.commonpath(paths)[1:].replace("/", ".")


def _left(barred: list[State], left: list[Any]) -> list[Row]:
    groups: dict[Any, list[str]] = {}
    for name, kind, reason in left:
        groups.setdefault((re.sub(r"\d+", "*", name), kind, reason), []).append(name)
    for state in barred:
        name = _name(state)
        key = re.sub(r"\d+", "*", name), "a plan", re.sub(r"\.\d+\.", ".*.", str(state.barred))
        groups.setdefault(key, []).append(name)
    return [
        Row(name if len(names) > 1 else names[0], kind, "", count=len(names), reason=reason)
        for (name, kind, reason), names in groups.items()
    ]
