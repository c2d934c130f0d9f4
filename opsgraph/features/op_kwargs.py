"""`op_kwargs` of a Sequential's forward: memory of the caller's for a result and a gradient.

The hook is `run_with`, which calls the module again with what it has put around it.

TransformerEngine hands an op keywords so: `op_kwargs={op or index: {"output": buffer}}`. Which
keywords an op knows, its class says in `takes_buffers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import OpError, PlanError
from ..op import Op
from .inputs import verify_tensor

OUTPUT, GRAD_INPUT = "output", "grad_input"


class _Into(torch.autograd.Function):
    """y, in the buffer."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, buffer: Tensor) -> Tensor:
        return buffer.copy_(y).detach()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        return dy, None


class _GradientInto(torch.autograd.Function):
    """x; its gradient is written to the buffer on its way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, buffer: Tensor) -> Tensor:
        ctx.buffer = buffer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> Any:
        ctx.buffer.copy_(dx.detach())
        return dx, None


def run_with(
    module: nn.Sequential,
    x: Tensor,
    extra_inputs: Sequence[Tensor],
    op_kwargs: Mapping[nn.Module | int, Mapping[str, Any]],
) -> Any:
    """`module(x, *extra_inputs)` with the buffers that op_kwargs names.

    Raises OpError for a key that is no op of the sequence, a keyword that the op does not know, a
    buffer at another place than it can be used, or one that does not fit.
    """
    verify_tensor(x, "input")  # a torch.fx.Tracer stands in for every argument
    if op_kwargs and torch.compiler.is_compiling():
        raise PlanError("op_kwargs: its buffers are written to, which torch.compile cannot see")
    given = _resolved(module, op_kwargs)
    output, grad_input = given.get(OUTPUT), given.get(GRAD_INPUT)
    if grad_input is not None:
        _fits(*grad_input, GRAD_INPUT, x)
        x = _GradientInto.apply(x, grad_input[1])  # type: ignore[no-untyped-call]
    result = module(x, *extra_inputs)
    if output is None:
        return result
    y, *more = result if isinstance(result, tuple) else (result,)
    _fits(*output, OUTPUT, y)
    y = _Into.apply(y, output[1])  # type: ignore[no-untyped-call]
    return (y, *more) if more else y


def _resolved(
    module: nn.Sequential, op_kwargs: Mapping[nn.Module | int, Mapping[str, Any]]
) -> dict[str, tuple[str, Tensor]]:
    """Each keyword that is given, with the op's label and the value."""
    if not isinstance(op_kwargs, Mapping):
        raise OpError("op_kwargs", type(op_kwargs).__name__, "a dict by ops or their indices")
    places = [(f"{n}:{type(m).__name__}", m) for n, m in module._modules.items() if m is not None]
    found: dict[str, tuple[str, Tensor]] = {}
    for key, keywords in op_kwargs.items():
        positions = _positions(places, key)
        label, op = places[positions[0]]
        if not isinstance(keywords, Mapping):
            raise OpError(label, f"op_kwargs {keywords!r}", "a dict of keywords and buffers")
        known = op.takes_buffers if isinstance(op, Op) else ()
        for name, value in keywords.items():
            if name not in known:
                expected = f"some of {', '.join(known)}" if known else "none"
                raise OpError(label, f"op_kwargs {name!r}", expected)
            at, where = (len(places) - 1, "last") if name == OUTPUT else (0, "first")
            if at not in positions:
                raise OpError(
                    label, f"op_kwargs {name!r}", f"it for the {where} op of the sequence"
                )
            if value is not None:
                found[name] = label, value
    return found


def _positions(places: Sequence[tuple[str, nn.Module]], key: nn.Module | int) -> list[int]:
    """Where in the sequence a key's op stands."""
    if isinstance(key, nn.Module):
        found = [k for k, (_, module) in enumerate(places) if module is key]
    else:
        try:
            found = [range(len(places))[index(key)]]
        except (IndexError, TypeError):
            found = []
    if not found:
        got = type(key).__name__ if isinstance(key, nn.Module) else repr(key)
        raise OpError("op_kwargs", f"the key {got}", "an op of the sequence, or its index")
    return found


def _fits(label: str, buffer: Any, name: str, like: Tensor) -> None:
    if not isinstance(buffer, Tensor):
        raise OpError(label, f"{name} as a {type(buffer).__name__}", "a tensor")
    got, expected = (
        (tuple(t.shape), t.dtype, str(t.device)) for t in (buffer, like)
    )  # fmt: skip
    if got != expected or buffer.requires_grad:
        text = "{} {} on {}".format(*expected)
        grad = " that requires a gradient" if buffer.requires_grad else ""
        raise OpError(label, "{} {} {} on {}".format(name, *got) + grad, f"{text}, a plain one")
