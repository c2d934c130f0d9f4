"""What `patch` did: a table with a row for each plan, and what was left with the reasons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """A plan, or modules of equal reason that stay as they are (then `plan` is empty)."""

    module: str
    """The module that holds all that the plan computes; several equal ones as `layers.*`."""
    found: str
    """What was recognised."""
    plan: str
    """Steps of the forward and of the backward, with their backends."""
    saved: int = 0
    """Bytes that the plan keeps for the backward, for each row."""
    saved_before: int = 0
    """The same of the model's own modules."""
    fp32: float = 0.0
    """The largest relative difference of values and gradients in fp32."""
    half: float = 0.0
    """The largest quotient of errors in 16 bits: the plan's by that of the modules."""
    count: int = 1
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """rows: the plans. left: what stays as it is, and why."""

    rows: Sequence[Row]
    left: Sequence[Row]
    difference: float = 0.0
    """Of the model's outputs on the example, relative to the largest."""
    seconds: float = field(default=0.0, compare=False)

    def __str__(self) -> str:
        lines = [
            ("modules", "n", "recognised as", "plan", "saved/row", "before", "fp32", "16 bits")
        ]
        lines += [
            (r.module, str(r.count), r.found, r.plan, str(r.saved), str(r.saved_before),
             f"{r.fp32:.0e}", f"{r.half:.2f}" if r.half else "-")
            for r in self.rows
        ]  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        shown = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        shown += [f"left: {r.module} ({r.count}): {r.found}: {r.reason}" for r in self.left]
        shown.append(f"outputs on the example differ by {self.difference:.1e}, relative")
        return "\n".join(shown)
