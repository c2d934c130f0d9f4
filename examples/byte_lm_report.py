"""What `byte_lm.py` shows: a table that lives while it trains, a summary, and one picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import opsgraph as og

if TYPE_CHECKING:
    from byte_lm import ByteLM, Run

console = Console(highlight=False)
COLORS = {"opsgraph": "#c4713b", "torch.compile": "#3b82c4", "PyTorch": "#7a8694"}
EVERY = 50
"""Steps between printed tables where the output is no terminal."""


def line(text: str, style: str | None = None) -> None:
    """Print a line."""
    console.print(text, style=style, soft_wrap=True)


def header(model: ByteLM, size: int, args: argparse.Namespace) -> None:
    """What is trained, and on what."""
    threads = f" ({torch.get_num_threads()} threads)" if args.device == "cpu" else ""
    count = sum(parameter.numel() for parameter in model.parameters())
    line(
        f"{count:,} parameters, {size:,} bytes of text, {args.batch} x {args.context} bytes "
        f"a step, on {args.device}{threads}\n"
    )


def table(runs: Sequence[Run], args: argparse.Namespace, last: bool = False) -> Table:
    """Loss, speed and memory of each run; the speed of plain PyTorch in fp32 is 1."""
    made = Table(box=None, pad_edge=False)
    made.add_column("")
    for title in ("held-out loss" if last else "loss", "ms a step", "speed", "saved bytes a token"):
        made.add_column(title, justify="right", min_width=10)
    for run in runs:
        bold = run.name == "opsgraph"
        loss = run.held_out if last else run.losses[-1] if run.losses else float("nan")
        cells = (
            f"{loss:.4f}",
            f"{run.step_seconds * 1e3:.1f}",
            f"{runs[-1].step_seconds / run.step_seconds:.2f}",
            f"{run.saved / (args.batch * args.context):,.0f}",
        )
        made.add_row(run.title, *cells, style="bold" if bold else None)
    return made


@contextmanager
def progress(runs: Sequence[Run], args: argparse.Namespace) -> Iterator[Callable[[str, int], Any]]:
    """A table and a bar while it trains: what is given tells what is done, and at which step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console)
    task = bar.add_task("", total=args.steps)
    with Live(bar, console=console, refresh_per_second=4, transient=True) as live:

        def told(text: str, step: int) -> None:
            bar.update(task, description=text, completed=step)
            if console.is_terminal:
                live.update(Group(table(runs, args), bar) if step else bar)
            elif step % EVERY == 0:
                line(f"{text}{f', step {step} of {args.steps}' if step else ''}")

        yield told


def summary(runs: Sequence[Run], args: argparse.Namespace) -> None:
    """The last table, and what it says in words."""
    console.print()
    console.print(table(runs, args, last=True))
    ours, plain = runs[0], runs[-1]
    others = {run.name: run.step_seconds for run in runs[1:] if run.dtype is ours.dtype}
    than = ", ".join(
        f"{t / ours.step_seconds:.2f} times that of {name}" for name, t in others.items()
    )
    speed, kept = plain.step_seconds / ours.step_seconds, ours.saved / plain.saved
    line(
        f"\nopsgraph in bf16 trains at {speed:.2f} times the speed of PyTorch in fp32, and keeps "
        f"{kept:.2f} of the bytes for the backward. Its speed is {than} in bf16.\n"
    )


def write(runs: Sequence[Run], args: argparse.Namespace, path: Path) -> None:
    """The figures: medians of steps in alternation, losses, saved bytes."""
    made = {
        "device": args.device,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "steps": len(runs[0].losses),
        "runs": {
            run.title: {
                "step_seconds": run.step_seconds,
                "held_out_loss": run.held_out,
                "saved_bytes_per_token": run.saved / (args.batch * args.context),
                "losses": run.losses,
            }
            for run in runs
        },
    }
    path.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


def block(plan: og.Plan, counted: float, plain: float) -> None:
    """The plan of a block, and whether it saves what it says."""
    line("\nThe plan of one norm+MLP block in bf16:", style="bold")
    print(plan)
    line(
        f"It says that it saves {plan.saved_bytes_per_row} bytes per token; autograd's hooks count "
        f"{counted:g}, and {plain:g} for the plain block."
    )


def draw(runs: Sequence[Run], path: Path) -> None:
    """Speed and memory as bars; below them the loss of every run, and how far pairs are apart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from byte_lm import differences, pairs

    figure, grid = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    (speed, memory), (losses, apart) = grid
    plain = runs[-1]
    titles = [run.title for run in runs]
    colors = [COLORS[run.name] for run in runs]
    speeds = [plain.step_seconds / run.step_seconds for run in runs]
    kept = [run.saved / plain.saved for run in runs]
    rows = (
        (speed, "training speed; PyTorch in fp32 is 1", speeds),
        (memory, "bytes kept for the backward; PyTorch in fp32 is 1", kept),
    )  # fmt: skip
    for axis, title, values in rows:
        axis.bar_label(axis.barh(titles, values, color=colors), fmt=" %.2f")
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.axvline(1, color="#555", lw=0.8, ls=":")
        axis.set_title(title, fontsize=10, loc="left")
    for run in runs:
        wide = run.name == "opsgraph"
        losses.plot(
            run.losses,
            label=f"{run.title}: {run.held_out:.3f} held out",
            color=COLORS[run.name],
            ls="-" if run.dtype is torch.bfloat16 else "--",
            **(dict(lw=3, alpha=0.5) if wide else dict(lw=0.9)),
        )
    losses.set_title("training loss, nats per byte", fontsize=10, loc="left")
    losses.legend(fontsize=8)
    for ours, theirs in pairs(runs):
        style = "-" if ours.dtype is torch.bfloat16 else "--"
        gaps = [max(gap, 1e-8) for gap in differences(ours, theirs)]
        label = f"{ours.title}, from {theirs.name}"
        apart.semilogy(gaps, style, lw=0.8, color=COLORS[ours.name], label=label)
    apart.set_title("difference of the training losses", fontsize=10, loc="left")
    apart.legend(fontsize=8)
    for axis in (losses, apart):
        axis.set_xlabel("step")
    for axis in grid.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
