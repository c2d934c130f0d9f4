"""The overlap fusers on two Gloo ranks of this machine, beside what the model predicts for them.

Each fuser runs in alternation with the reference ops: the collective after the product, or before
it. The prediction takes the product's and the collective's own times, measured alone, and what the
collective takes of the product's speed. Over a network that is little; between ranks that fill one
machine it is the processor's time that Gloo spends on copies and sums, so there is little to hide.

    python -m benchmarks.parallel --gloo
"""

import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import opsgraph as og
from benchmarks.pipeline import pieced
from benchmarks.timing import alternate, machine
from opsgraph.kernels.exchange import collectives
from opsgraph.kernels.exchange.pieces import cuts
from opsgraph.ops import AllGather, AllReduce, AllReduceGrad, BasicLinear, ReduceScatter
from opsgraph.testing.distributed import run

RANKS, ROWS, HIDDEN, WIDE = 2, 1024, 512, 1024
REPEATS = 31


def forward(module: og.Sequential, x: Tensor) -> Tensor:
    """The forward alone."""
    with torch.no_grad():
        return module(x)


def backward(module: og.Sequential, x: Tensor) -> Callable[[], Any]:
    """A backward that can run again and again."""
    leaf = x.clone().requires_grad_()
    y = module(leaf)
    dy = torch.randn_like(y)
    leaves = [leaf, *module.parameters()]
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def share_of(collective: Callable[[], Any]) -> float:
    """Of the time of a collective, how much is this process's own work, at most all of it."""
    wall, work = time.perf_counter(), time.process_time()
    for _ in range(REPEATS):
        collective()
    share = (time.process_time() - work) / (time.perf_counter() - wall)
    return min(1.0, share)


def cases() -> dict[str, tuple[list[og.Op], int]]:
    """Ops by name, and how many rows a rank gives them."""
    wide = partial(BasicLinear, HIDDEN, WIDE)
    return {
        "GatherLinear": ([AllGather(), wide()], ROWS // RANKS),
        "LinearScatter": ([BasicLinear(WIDE, HIDDEN), ReduceScatter()], ROWS),
        "LinearAllReduce": ([BasicLinear(WIDE, HIDDEN), AllReduce()], ROWS),
        "LinearReduceBackward": ([AllReduceGrad(), wide()], ROWS),
    }


def exchange(name: str, group: str, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """The collective of a case alone, of all its rows."""
    if name == "GatherLinear":
        return lambda: collectives.all_gather(x, group, RANKS)
    if name == "LinearScatter":
        return lambda: collectives.reduce_scatter(y, group, RANKS)
    return lambda: collectives.all_reduce(y, group, RANKS)


def measure(rank: int, size: int) -> list[dict[str, Any]]:
    """One record for each fuser and pass; times in seconds."""
    group = AllGather().group
    records = []
    for name, (ops, rows) in cases().items():
        ours = og.Sequential(*ops, backends=("overlap", "reference"))
        plain = og.Sequential(*ours, backends=("reference",))
        linear = next(op for op in ours if isinstance(op, BasicLinear))
        x = torch.randn(rows, linear.in_features)
        whole = torch.randn(ROWS, linear.in_features)
        sent = torch.randn(ROWS, HIDDEN)  # y of the scatter, dx of the backward
        alone = exchange(name, group, x, sent)
        product = partial(torch.mm, whole, linear.weight.detach().t())
        if name.endswith("Backward"):
            runs = {"overlapped": backward(ours, x), "plain": backward(plain, x)}
        else:
            runs = {"overlapped": partial(forward, ours, x), "plain": partial(forward, plain, x)}
        times = alternate(runs | {"product": product, "collective": alone}, REPEATS, 1)
        share = share_of(alone)
        spare = max(0.0, 1 - share) if (os.cpu_count() or 1) <= RANKS else 1.0
        taken = 1 - spare
        if name.endswith("Backward"):  # the collective beside one product, after another
            hidden = max(times["collective"], times["product"] + taken * times["collective"])
            predicted = times["product"] + hidden
        else:
            count = len(cuts(rows if name == "LinearAllReduce" else ROWS // RANKS))
            each = times["product"] / count, times["collective"] / count
            predicted = pieced(*each, count, taken)
        told = {"fuser": name, "machine": machine(), "share": taken, "predicted": predicted}
        records.append(told | times)
    return records


def report(folder: Path) -> None:
    """Measure, print a table and write it."""
    records = run(measure, RANKS, timeout=600)[0]
    each = records[0]["machine"]
    print(f"{RANKS} Gloo ranks, each on {each}: {ROWS} x {HIDDEN} x {WIDE}, fp32, medians in ms")
    columns = ("product", "collective", "plain", "overlapped", "predicted")
    print(f"{'':<22}" + "".join(f"{column:>12}" for column in columns))
    for record in records:
        cells = "".join(f"{1e3 * record[column]:>12.1f}" for column in columns)
        print(f"{record['fuser']:<22}{cells}")
    sizes = {"rows": ROWS, "hidden": HIDDEN, "wide": WIDE}
    content = {"ranks": RANKS, "sizes": sizes, "measured": records}
    (folder / "parallel_gloo.json").write_text(json.dumps(content, indent=1) + "\n")
