"""Results of `benchmarks.overhead` for the eye."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.peers import RECIPES

if TYPE_CHECKING:
    from rich.table import Table

OURS, GRAPH = "opsgraph", "opsgraph (CUDA graph)"
OTHERS = ("nn.Sequential", "torch.compile", "Liger", "TE LayerNormMLP", "te.ops")
WIDTH = 112
"""Columns of a table, also where the output is no terminal."""


def title(case: Mapping[str, Any]) -> str:
    """What was measured: `training, bfloat16, DelayedScaling, 64 rows, H=256, F=512`."""
    parts = [case["kind"], case["dtype"], RECIPES[case["recipe"]]]
    parts += [f"{case['rows']} rows", f"H={case['hidden']}", f"F={case['ffn']}"]
    if case["ranks"] > 1:
        parts.append(f"{case['ranks']} ranks")
    if "threads" in case:
        parts.append(f"{case['threads']} thread(s)")
    return ", ".join(part for part in parts if part)


def _cells(case: Mapping[str, Any], name: str, clock: str) -> list[str]:
    """Microseconds, their quartiles, and the ratio to the first candidate."""
    seconds = case["seconds"]
    found = {key: value * 1e6 for key, value in seconds[name][clock].items()}
    first = next(iter(seconds.values()))[clock]["median"] * 1e6
    middle = f"{found['low']:.1f} to {found['high']:.1f}"
    return [f"{found['median']:.1f}", middle, f"{found['median'] / first:.2f}"]


def table(case: Mapping[str, Any]) -> Table:
    """One case; times are microseconds of one call."""
    from rich.table import Table

    clocks = ("host", "wall") if "threads" not in case else ("host",)
    made = Table(title=title(case), title_justify="left", width=WIDTH)
    made.add_column("microseconds a call")
    for clock in clocks:
        made.add_column(clock, justify="right")
        made.add_column("middle half", justify="right")
        made.add_column("/ first", justify="right")
    for name in case["seconds"]:
        made.add_row(name, *(cell for clock in clocks for cell in _cells(case, name, clock)))
    return made


def ratios(case: Mapping[str, Any]) -> str:
    """opsgraph's time over others': `host 0.65 of nn.Sequential; wall ...`."""
    seconds = case["seconds"]
    if OURS not in seconds:
        return ""
    parts = []
    for clock in ("host", "wall") if "threads" not in case else ("host",):
        own = seconds[OURS][clock]["median"]
        others = [name for name in (*OTHERS, "opsgraph (Python)") if name in seconds]
        if clock == "wall" and GRAPH in seconds:
            others.append(GRAPH)
        told = [f"{own / seconds[name][clock]['median']:.2f} of {name}" for name in others]
        parts.append(f"{clock} {', '.join(told)}")
    return f"opsgraph: {'; '.join(parts)}"


def show(case: Mapping[str, Any]) -> None:
    """Print one case, and why candidates are missing."""
    from rich.console import Console

    console = Console(width=WIDTH, highlight=False)
    console.print(table(case))
    for line in (ratios(case), *(f"{n}: {why}" for n, why in case["refused"].items())):
        if line:
            console.print(line, markup=False, soft_wrap=True)
    console.print()
