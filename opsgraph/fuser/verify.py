"""What a declaration of a fuser has to be."""

from collections.abc import Collection, Mapping

import torch

from ..backend import backends
from ..errors import RegisterError
from ..op import BACKWARD, STORED, Op, arguments, differentiable, per_class, weights
from .base import Fuser, alternatives

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
    name = fuser.name

    def fail(message: str) -> None:
        raise RegisterError(f"{name}: {message}")

    if getattr(fuser, "backend", None) not in backends():
        known = ", ".join(backends())
        fail(f"got backend {getattr(fuser, 'backend', None)!r}, expected one of {known}")
    pattern = getattr(fuser, "pattern", None)
    if not isinstance(pattern, Mapping):
        fail(f"got pattern {pattern!r}, expected op classes under names, such as dict(fc=Linear)")
    if wrong := [k for k in fuser.pattern if not str(k).isidentifier() or k in ARGUMENTS]:
        fail(f"got {wrong} in pattern, expected names other than {', '.join(sorted(ARGUMENTS))}")
    priority = fuser.priority
    if not isinstance(priority, int | float | None) or priority != priority:
        fail(f"got priority {priority!r}, expected a number or None")
    for option in ("saves", "consumes", "gives"):
        value = getattr(fuser, option)
        if isinstance(value, str) or not all(isinstance(n, str) for n in value):
            fail(f"got {option} = {value!r}, expected a tuple of names")
    dtypes = fuser.dtypes
    listed = isinstance(dtypes, Collection) and all(isinstance(d, torch.dtype) for d in dtypes)
    if dtypes is not None and not listed:
        fail(f"got dtypes = {dtypes!r}, expected a tuple of torch's dtypes, or None")
    kinds = {key: [k for k in alternatives(e) if k] for key, e in fuser.pattern.items()}
    flat = [kind for entry in kinds.values() for kind in entry]
    if not flat or not all(isinstance(kind, type) and issubclass(kind, Op) for kind in flat):
        fail(f"got pattern {dict(fuser.pattern)!r}, expected op classes under names")
    backward = [*fuser.functions(BACKWARD)]
    if fuser.fwd is None and not backward:
        fail("it has neither fwd nor bwd")
    if backward not in ([], ["bwd"], ["wgrad", "dgrad"]):
        fail(f"got {' and '.join(backward)}, expected bwd, or wgrad and dgrad")
    public = {
        f"{key}_{n}" for key, entry in kinds.items() for kind in entry for n in _vocabulary(kind)
    }
    private = {name for name in fuser.saves if fuser.split(name)[0] is None} - {"x", "y", "dy"}
    values = {
        f"{key}_{n}" for key, entry in kinds.items() for kind in entry for n in ("x", *kind.saves)
    }
    values |= {f"{key}_y" for key in kinds}
    if unknown := set(fuser.saves) - values - private:
        fail(f"cannot save {sorted(unknown)}; the names there are: {', '.join(sorted(values))}")
    *_, last = kinds
    products = {f"{last}_x"} if all(kind.wgrad for kind in kinds[last]) else set()
    if strange := set(fuser.gives) - products or (fuser.gives if not fuser.bwd else ()):
        fail(f"gives {sorted(strange)}, expected the input of a linear layer, last, from bwd")
    step = {"x", "y", "dy", *kinds} | public
    allowed = {
        "fwd": {"x", "want", *kinds} | public,
        "bwd": {"want"} | step | private,
        "wgrad": step,
        "dgrad": step,
        "reject": {"x", *kinds},
    }
    gradients = {
        f"{key}_{n}" for key, entry in kinds.items() for kind in entry for n in differentiable(kind)
    }
    if fuser.wgrad and len(gradients) != 1:
        fail(f"got wgrad and the gradients {sorted(gradients)}, expected one, or bwd")
    if not isinstance(fuser.wants, Mapping):
        fail(f"got wants = {fuser.wants!r}, expected the kernel's words under the names here")
    if strange := set(fuser.wants) - set(fuser.saves) - gradients:
        fail(f"wants {sorted(strange)}, which it neither saves nor has a gradient for")
    if fuser.bwd and (strange := set(fuser.consumes) - set(arguments(fuser.bwd))):
        fail(f"consumes {sorted(strange)}, which bwd does not name")
    for method, names in allowed.items():
        function = getattr(fuser, method)
        if function and (unknown := set(arguments(function)) - names):
            known = ", ".join(sorted(names))
            fail(
                f"{method} needs {sorted(unknown)}, which nobody has; the names there are: {known}"
            )
