"""What an op leaves out: gradients by autograd's derivative of `fwd`, specs by running `fwd`.

The hooks are `Op.derive`, `Op.trace` and `Op.retrace`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..base.errors import OpError, OpsgraphError
from ..guards.results import verify
from ..op import ROWS, Op, Spec, arguments
from ..op.functions import holds


def derived(kind: type[Op], name: str) -> Callable[..., Any]:
    """`bwd` of a class, or its half of that name: `torch.func.vjp` of `fwd`, which runs again."""
    names = tuple(name for name in arguments(kind.fwd) if name != "want")
    active = [i for i, name in enumerate(names) if name not in kind.constants]

    def bwd(op: Op, dy: Tensor, *values: Any) -> Any:
        moving = [
            i for i in active if isinstance(values[i], Tensor) and values[i].is_floating_point()
        ]

        def fwd(*tensors: Tensor) -> Tensor:
            full = list(values)
            for i, tensor in zip(moving, tensors, strict=True):
                full[i] = tensor
            return kind.fwd(op, *full)[0]

        cotangents = torch.func.vjp(fwd, *(values[i] for i in moving))[1](dy)
        gradients = dict(zip(moving, cotangents, strict=True))
        return gradients.get(0), tuple(gradients.get(i) for i in active[1:])

    def dgrad(op: Op, *values: Any) -> Any:
        return bwd(op, *values)[0]

    def wgrad(op: Op, *values: Any) -> Any:
        return bwd(op, *values)[1][0]

    function: Any = {"bwd": bwd, "dgrad": dgrad, "wgrad": wgrad}[name]
    function.declared_arguments = ("dy", *names)
    return function  # type: ignore[no-any-return]


def traced(op: Op, x: Spec) -> tuple[Spec, dict[str, Spec]]:
    """The specs of y and of what is saved: `fwd` is run on meta tensors with two row counts.

    A size that changes is `ROWS`. op: may be a weak proxy.
    """

    def run(rows: int) -> list[Tensor]:
        def value(name: str) -> Any:
            if name == "x" or name in op.extra_inputs:
                return x.empty(rows, "meta")
            if name in op.constants:
                return op.constant(name, x)
            held = getattr(op, name)
            if not isinstance(held, Tensor):
                return held
            # As the plan takes them: the op may stand for others, of another dtype.
            cast = held.is_floating_point() and name not in op.as_stored
            return held.to("meta", x.dtype if cast else held.dtype)

        names = [name for name in arguments(op.__class__.fwd) if name != "want"]
        results = op.fwd(*(value(name) for name in names))
        y, saved = verify(results, op.__class__.__name__, "fwd", (len(op.saves),))
        return [y, *(s for s in saved if s is not None)]

    def spec(few: Tensor, many: Tensor) -> Spec:
        sizes = zip(few.shape, many.shape, strict=True)
        shape = tuple(a if a == b else ROWS for a, b in sizes)
        return Spec(shape, few.dtype, x.device)

    y, *saved = map(spec, run(2), run(3))
    return y, dict(zip(op.saves, saved, strict=True))


def retraced(kind: type[Op], name: str, op: Op, x: Spec) -> tuple[Spec, dict[str, Spec]] | None:
    """The specs by running a `fwd`; None where the class itself says them, under `name`.

    None also where it does not run on meta tensors: PyTorch and NumPy raise the first two of these
    errors for values that are not there, Triton the third. Any other error is the op's own.
    """
    if kind.__module__.startswith("opsgraph.") or holds(kind, name):
        return None
    try:
        return traced(op, x)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, OpsgraphError):
            raise
        return None


def named(op: Op, x: Spec) -> tuple[Spec, dict[str, Spec]]:
    """As `traced`; what `fwd` raises on meta tensors says which op it was, as an OpError."""
    try:
        return traced(op, x)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, OpsgraphError):
            raise
        got = f"{type(error).__name__} from fwd on meta tensors: {error}"
        expected = "a fwd that takes them, with parameters of the op's own, or a method out"
        raise OpError(op.__class__.__name__, got, expected) from error


Op.derive, Op.trace = staticmethod(derived), staticmethod(named)
Op.retrace = staticmethod(retraced)
