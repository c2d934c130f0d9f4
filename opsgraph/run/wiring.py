"""Which values go from one stage of a Sequential to another, and which come from the caller."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from ..op import Op
from .stage import Stage


def unmatched(stages: list[Stage | nn.Module], stage: Stage) -> list[str]:
    """The extra inputs of a stage that no stage before it makes."""
    before = stages[: stages.index(stage)]
    made = {n for s in before if isinstance(s, Stage) for n in s.output_names if n}
    return [name for _, name, channel in stage.inputs if channel not in made]


def read_later(stages: list[Stage | nn.Module], stage: Stage) -> set[str | None]:
    """Channels that later stages read."""
    after = stages[stages.index(stage) + 1 :]
    return {channel for s in after if isinstance(s, Stage) for _, _, channel in s.inputs}


def reads(module: nn.Module) -> Iterator[str | None]:
    """Channels of a module's extra inputs."""
    for kind, op in module.lower() if isinstance(module, Op) else ():
        yield from (op.channels.get(name) for name in kind.extra_inputs)
