"""What a Sequential does with an input that its stages could not take: say so, or take it apart.

Calls look at nothing of this beforehand; it runs once one has failed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import OpError
from ..guards.torch_private import constant_under_compile, tracing
from ..op import Op


def described(value: Any) -> str:
    """A wrong input in an error: "None", "a list", "a numpy.ndarray", "a scalar"."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return "a scalar" if value.dim() == 0 else f"a tensor of shape {tuple(value.shape)}"
    kind = type(value)
    if kind.__module__.startswith("torch.fx"):
        return f"a torch.fx {kind.__name__}"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    name = kind.__name__ if kind.__module__ == "builtins" else _full_name(kind)
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def _full_name(kind: type) -> str:
    return f"{kind.__module__.split('.')[0]}.{kind.__name__}"


def width_of(value: Any) -> int | None:
    """The width of an input; None where it has none."""
    return value.shape[-1] if isinstance(value, Tensor) and value.dim() else None


def verify_tensor(value: Any, where: str, expected: str = "a tensor [*, width]") -> None:
    """Raises OpError for what is no tensor, or has no dimensions."""
    if isinstance(value, Tensor) and (value.is_nested or value.dim()):
        return
    if isinstance(value, Tensor):
        expected = "[*, width]"
    elif type(value).__module__.startswith("torch.fx"):
        expected += "; a torch.fx.Tracer has to call the module as a leaf, see is_leaf_module"
    raise OpError(where, described(value), expected)


def _verify_dense(value: Any, where: str) -> None:
    if isinstance(value, Tensor) and not value.is_nested and value.layout is not torch.strided:
        raise OpError(where, f"a tensor of layout {value.layout}", "a dense one: to_dense()")


def _needed(stages: Sequence[Any]) -> list[tuple[Any, int, str]]:
    """The extra inputs of stages that no stage before makes, each with its stage and op."""
    needed: list[tuple[Any, int, str]] = []
    made: list[str] = []
    for stage in stages:
        needed += [(stage, i, name) for i, name, channel in stage.inputs if channel not in made]
        made += [name for name in stage.output_names if name is not None]
    return needed


def verify_count(stages: Sequence[Any], got: int) -> None:
    """Raises OpError for another number of extra inputs than the stages ask for."""
    if got != len(needed := [name for _, _, name in _needed(stages)]):
        _wrong_count(got, needed)


@constant_under_compile
def _wrong_count(got: int, names: list[str]) -> None:
    wanted = f"{len(names)} ({', '.join(names)})" if names else "none"
    raise OpError("Sequential", f"{got} extra inputs", wanted)


def explain(module: nn.Sequential, stages: Sequence[Any], x: Any, extras: Sequence[Any]) -> Any:
    """The result for nested inputs, None where the failure was no matter of what came.

    stages: the module's. Raises OpError for what is no tensor.
    """
    if tracing() and extras and extras[-1] is None:  # the old ONNX exporter fills in defaults
        return module(x, *extras[:-1])
    first = next((m for m in module._modules.values() if m is not None), None)
    if isinstance(first, Op):
        width = "width" if first.in_width is None else first.in_width
        verify_tensor(x, "input", f"a tensor [*, {width}]")
    for stage in stages:
        for weight, (owner, name) in zip(*_weights_of(stage), strict=True):
            _verify_dense(weight, f"{type(owner).__name__}.{name}")
    planned = [stage for stage in stages if hasattr(stage, "table")]  # others ask for nothing
    values = []
    for value, (stage, i, name) in zip(extras, _needed(planned), strict=False):
        run = stage.table.run
        if not hasattr(run.kinds[i], "taken"):  # the op says itself what it takes
            values.append(value)
            verify_tensor(value, f"{run.labels[i]} {name}")
            _verify_dense(value, f"{run.labels[i]} {name}")
            if isinstance(value, Tensor) and value.is_nested and not x.is_nested:
                raise OpError(f"{run.labels[i]} {name}", "a nested tensor", "a dense one, as x is")
    _verify_dense(x, "input")
    if isinstance(x, Tensor) and x.is_nested and isinstance(first, Op):
        return _run_nested(module, x, extras, [x, *values])
    return None


def _weights_of(stage: Any) -> tuple[Sequence[Any], Sequence[tuple[nn.Module, str]]]:
    """A stage's parameters, None for one that was deleted, and their slots; none of a module."""
    slots = stage.slots if hasattr(stage, "table") else ()
    return [getattr(owner, name, None) for owner, name in slots], slots


def _run_nested(
    module: nn.Sequential, x: Tensor, extras: Sequence[Any], values: Sequence[Tensor]
) -> Any:
    """The rows of all sequences at once, as jagged tensors keep them. values: what has rows."""
    for value in values:
        if value.layout is not torch.jagged:
            got = f"a nested tensor beside one of layout {value.layout}"
            raise OpError("input", got, "layout=torch.jagged of all inputs")
    rows = {id(value): value.values() for value in values}
    result = module(*(rows.get(id(value), value) for value in (x, *extras)))
    outputs = result if isinstance(result, tuple) else (result,)
    jagged: Any = x
    where = jagged.offsets(), jagged.lengths()
    made = tuple(torch.nested.nested_tensor_from_jagged(y, *where) for y in outputs)
    return made if isinstance(result, tuple) else made[0]
