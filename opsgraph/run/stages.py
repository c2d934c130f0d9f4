"""The stages of a Sequential: how modules fall into runs of ops, and how channels join these."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..features.called import Called, Entry, called
from ..features.inputs import verify_count, verify_tensor
from ..op import Op
from .options import Options
from .stage import Stage


class CalledStage(Called, Stage):
    """A stage of one op that is called as a module."""


def make_stages(
    entries: Iterable[Entry],
    options: Options,
    recipe: int | None,
    given: Sequence[str],
    alone: Callable[..., Any],
) -> list[Any]:
    """Stages and modules, in order.

    given: channels that are there. alone: makes the Sequential that a called op itself runs.
    """
    groups: list[list[Entry]] = []
    for entry in entries:
        if groups and entry.fused and groups[-1][0].fused:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    read = [{channel for entry in group for channel in _reads(entry.module)} for group in groups]
    stages: list[Any] = []
    for k, group in enumerate(groups):
        _, module, why = group[0]
        if not isinstance(module, Op):
            stages.append(module)
            continue
        ops: list[Any] = [entry.module for entry in group]
        labels = [entry.label for entry in group]
        known = [n for s in stages if isinstance(s, Stage) for n in s.output_names if n is not None]
        arguments = ops, labels, options, [*known, *given], set().union(*read[k + 1 :]), recipe
        if why is None:
            stages.append(Stage(*arguments))
        else:
            stages.append(called(module, why, CalledStage, arguments, alone))
    return stages


def _reads(module: nn.Module) -> Iterator[str | None]:
    """Channels of a module's extra inputs."""
    for kind, op in module.lower() if isinstance(module, Op) else ():
        yield from (op.channels.get(name) for name in kind.extra_inputs)


def run_stages(stages: Sequence[Any], x: Any, extra_inputs: Sequence[Tensor]) -> Any:
    """All stages in order: what Tees hand out goes to later stages, and to the caller.

    Raises OpError for another number of extra inputs than the stages ask for.
    """
    made: dict[str | None, Tensor] = {}
    outputs: list[Tensor] = []
    given = list(extra_inputs)
    wired = [stage for stage in stages if isinstance(stage, Stage)]
    verify_count(wired, len(given))
    for stage in stages:
        if not isinstance(stage, Stage):
            x = stage(x)
            continue
        first = "" if len(stages) == 1 else f" of {stage.table.run.labels[0]}"
        verify_tensor(x, f"input{first}")
        extras = [made[c] if c in made else given.pop(0) for _, _, c in stage.inputs]
        result = stage(x, extras, torch.compiler.is_compiling())
        x, *more = result if isinstance(result, tuple) else (result,)
        wired = wired[1:]
        later = {channel for s in wired for _, _, channel in s.inputs}
        for i, name, value in zip(stage.outputs, stage.output_names, more, strict=True):
            if name is not None and name in later:
                made[name] = value
            if name not in made or getattr(stage.ops[i], "to_caller", False):
                outputs.append(value)
    return (x, *outputs) if outputs else x
