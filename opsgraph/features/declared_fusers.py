"""What a declaration of a fuser has to be. The hook is `registry.checks`, which `register` calls.

The fusers of opsgraph itself are registered before this file is there: a test verifies them.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..base.backend import backends
from ..base.errors import RegisterError
from ..fuser import Fuser
from ..fuser.base import alternatives
from ..fuser.registry import checks
from ..guards.arguments import is_names
from ..guards.cached import per_class
from ..op import BACKWARD, STORED, Op, arguments, differentiable, weights

ARGUMENTS = frozenset({"x", "y", "dy", "want", "self"})
"""Arguments of a fuser's functions that no key of a pattern may hide."""


@per_class
def _vocabulary(kind: type[Op]) -> set[str]:
    """The names that a fuser may use of an op."""
    names = {"x", "y", *kind.saves, *kind.constants, *kind.extra_inputs, *weights(kind)}
    names |= {name + STORED for name in weights(kind)}
    return names | {"d"} if kind.taps else names


def verify(fuser: Fuser) -> None:
    """Raises RegisterError if the declaration cannot work."""
    for problem in _problems(fuser):
        raise RegisterError(f"{fuser.name}: {problem}")


Kinds = Mapping[str, Sequence[type[Op]]]
"""The classes of each entry of a pattern."""


def _problems(fuser: Fuser) -> Iterator[str]:
    """What is wrong, the first thing first: what follows it may not be asked."""
    if getattr(fuser, "backend", None) not in backends():
        known = ", ".join(backends())
        yield f"got backend {getattr(fuser, 'backend', None)!r}, expected one of {known}"
    yield from _of_pattern(fuser)
    yield from _of_options(fuser)
    kinds = {key: [k for k in alternatives(e) if k] for key, e in fuser.pattern.items()}
    yield from _of_results(fuser, kinds)
    yield from _of_arguments(fuser, kinds)


def _of_pattern(fuser: Fuser) -> Iterator[str]:
    pattern = getattr(fuser, "pattern", None)
    if not isinstance(pattern, Mapping):
        yield f"got pattern {pattern!r}, expected op classes under names, such as dict(fc=Linear)"
    if wrong := [k for k in fuser.pattern if not str(k).isidentifier() or k in ARGUMENTS]:
        yield f"got {wrong} in pattern, expected names other than {', '.join(sorted(ARGUMENTS))}"
    kinds = [kind for entry in fuser.pattern.values() for kind in alternatives(entry) if kind]
    if not kinds or not all(isinstance(kind, type) and issubclass(kind, Op) for kind in kinds):
        yield f"got pattern {dict(fuser.pattern)!r}, expected op classes under names"


def _of_options(fuser: Fuser) -> Iterator[str]:
    priority, dtypes = fuser.priority, fuser.dtypes
    if not isinstance(priority, int | float | None) or priority != priority:
        yield f"got priority {priority!r}, expected a number or None"
    for option in ("saves", "consumes", "gives"):
        if not is_names(value := getattr(fuser, option)):
            yield f"got {option} = {value!r}, expected a tuple of names"
    for method in ("fwd", "bwd", "wgrad", "dgrad", "again", "reject", "reject_formats"):
        function = getattr(fuser, method)
        if function is not None and not callable(function):
            yield f"got {method} = {function!r}, expected a method or None"
        if function is not None and (starred := _starred(function)):
            yield f"got {method}({starred}), expected an argument for each value"
    if fuser.consumes and not fuser.bwd:
        yield f"got consumes = {fuser.consumes!r} and no bwd, which would take it"
    listed = isinstance(dtypes, Collection) and all(isinstance(d, torch.dtype) for d in dtypes)
    if dtypes is not None and not listed:
        yield f"got dtypes = {dtypes!r}, expected a tuple of torch's dtypes, or None"
    if fuser.again and not fuser.fwd:
        yield "got again and no fwd, which it repeats"
    if not isinstance(fuser.wants, Mapping):
        yield f"got wants = {fuser.wants!r}, expected the kernel's words under the names here"
    backward = [*fuser.functions(BACKWARD)]
    if fuser.fwd is None and not backward:
        yield "it has neither fwd nor bwd"
    if backward not in ([], ["bwd"], ["wgrad", "dgrad"]):
        yield f"got {' and '.join(backward)}, expected bwd, or wgrad and dgrad"


def _starred(function: Callable[..., Any]) -> str | None:
    """An argument of a function that stands for any number of values, or None.

    A function whose arguments are declared apart may take them so.
    """
    if hasattr(function, "declared_arguments"):
        return None
    given = inspect.signature(function).parameters.values()
    return next((str(p) for p in given if p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)), None)


def _named(kinds: Kinds, names: Callable[[type[Op]], Iterable[str]]) -> set[str]:
    """`KEY_NAME` for each of the names of each class."""
    return {
        f"{key}_{name}" for key, entry in kinds.items() for kind in entry for name in names(kind)
    }


def _of_results(fuser: Fuser, kinds: Kinds) -> Iterator[str]:
    values = _named(kinds, lambda kind: ("x", "y", *kind.saves))
    if unknown := set(fuser.saves) - values - _private(fuser):
        yield f"cannot save {sorted(unknown)}; the names there are: {', '.join(sorted(values))}"
    *_, last = kinds
    products = {f"{last}_x"} if all(kind.wgrad for kind in kinds[last]) else set()
    if strange := set(fuser.gives) - products or (fuser.gives if not fuser.bwd else ()):
        yield f"gives {sorted(strange)}, expected the input of a linear layer, last, from bwd"
    gradients = _named(kinds, differentiable)
    if fuser.wgrad and len(gradients) != 1:
        yield f"got wgrad and the gradients {sorted(gradients)}, expected one, or bwd"
    if strange := set(fuser.wants) - set(fuser.saves) - gradients:
        yield f"wants {sorted(strange)}, which it neither saves nor has a gradient for"


def _private(fuser: Fuser) -> set[str]:
    return {name for name in fuser.saves if fuser.split(name)[0] is None} - {"x", "y", "dy"}


def _of_arguments(fuser: Fuser, kinds: Kinds) -> Iterator[str]:
    if fuser.bwd and (strange := set(fuser.consumes) - set(arguments(fuser.bwd))):
        yield f"consumes {sorted(strange)}, which bwd does not name"
    names = {"x", *kinds} | _named(kinds, _vocabulary)
    step = {"y", "dy"} | names
    allowed = {
        "fwd": {"want"} | names,
        "bwd": {"want"} | step | _private(fuser),
        "wgrad": step,
        "dgrad": step,
        "again": {"want"} | names,
        "reject": {"x", *kinds},
    }
    for method, known in allowed.items():
        function = getattr(fuser, method)
        if function and (unknown := set(arguments(function)) - known):
            there = "which nobody has; the names there are"
            yield f"{method} needs {sorted(unknown)}, {there}: {', '.join(sorted(known))}"


checks.append(verify)
