"""Tensor and sequence parallelism on the GPUs of one host: steps of a block, by how exchanges hide.

Each number of ranks is a run of its own, under torchrun; runs of several numbers add up in one JSON
file, from which the table takes the efficiency against one GPU. On CPUs it runs over Gloo, which
only shows that it works.

    torchrun --nproc-per-node 2 -m benchmarks.parallel_gpu [--sizes 8192x4096x14336,...]
        [--recipes none,current] [--without NAME,...] [--repeats 10] [--out FILE]

`wall` is the step's time, `graph` that of the same step as a CUDA graph, so without the host's
part; "products" is the step's six matrix products alone. Multicast over NVLink is used only where
NCCL and PyTorch are told to by the environment.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # which, imported while there is a group, keeps its threads past its end
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks import parallel
from benchmarks.calls import TRAINING, Captured, Clock, attempt, case_of, prepare
from benchmarks.calls import samples_of as sampled
from benchmarks.overhead import facts, names_of, sizes_of
from benchmarks.peers import (
    EPS,
    OVERLAP,
    RECIPES,
    Block,
    Candidate,
    Peer,
    TorchSwiGLU,
    Weights,
    candidates_for,
    eager,
    engine_mlp,
    load,
    make_weights,
    ours,
)
from opsgraph.fuser import registered
from opsgraph.kernels.exchange import pieces
from opsgraph.testing import exchanges

RESULTS = Path(__file__).parent / "results" / "parallel_gpu.json"
SIZES = "8192x4096x14336,8192x8192x28672,8192x2048x5632"
NEAR = pieces.NEAR
PRODUCTS, EAGER, ASYNCHRONOUS = "products", "eager", "async-tp"
GRAPH = " as a graph"
LIMIT = timedelta(seconds=300)
"""What a rank waits for another one at most."""


class _GatherRows(nn.Module):
    """As `peers.GatherRows`, of ops that torch.compile sees."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed._functional_collectives import all_gather_tensor_autograd

        return all_gather_tensor_autograd(x, 0, dist.group.WORLD)


class _ScatterRows(nn.Module):
    """As `peers.ScatterRows`, of ops that torch.compile sees."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.distributed._functional_collectives import reduce_scatter_tensor_autograd

        return reduce_scatter_tensor_autograd(x, "sum", 0, dist.group.WORLD)


def asynchronous(block: Block, weights: Weights) -> Peer:
    """torch.compile with its own overlap of products and exchanges, over symmetric memory."""
    ffn = block.ffn // block.ranks
    module = nn.Sequential(
        nn.RMSNorm(block.hidden, eps=EPS, **block.place),
        _GatherRows(),
        nn.Linear(block.hidden, 2 * ffn, bias=False, **block.place),
        TorchSwiGLU(),
        nn.Linear(ffn, block.hidden, bias=False, **block.place),
        _ScatterRows(),
    )
    load(module, weights)
    on = block.device.type == "cuda"
    made: Any = torch.compile(module, options={"_micro_pipeline_tp": True} if on else None)
    return Peer(made)


def without(left_out: Callable[[str], bool]) -> dict[str, Any]:
    """Options of a Sequential that takes all fusers but some of those that exchange."""
    kept = [f.name for f in registered() if not (exchanges(f) and left_out(f.name))]
    return {"fusers": tuple(kept)}


def plain(block: Block, weights: Weights) -> Peer:
    """opsgraph, one exchange after the other between the products."""
    return ours(block, weights, **without(lambda name: True))


def bulk(block: Block, weights: Weights) -> Peer:
    """opsgraph, whole exchanges behind whole products, in the backward alone."""
    return ours(block, weights, **without(lambda name: not name.endswith("Backward")))


def cut(block: Block, weights: Weights) -> Peer:
    """opsgraph, exchanges in pieces behind products, also where opsgraph keeps them whole."""
    pieces.NEAR = pieces.PIECES
    return ours(block, weights)


def planned(build: Callable[[Block, Weights], Peer]) -> Callable[[Block, Weights], Peer]:
    """The same, in as many pieces as opsgraph cuts exchanges into."""

    def made(block: Block, weights: Weights) -> Peer:
        pieces.NEAR = NEAR
        return build(block, weights)

    return made


HOW: dict[str, Callable[[Block, Weights], Peer]] = {
    EAGER: eager,
    ASYNCHRONOUS: asynchronous,
    "te": engine_mlp,
    "plain": planned(plain),
    "bulk": planned(bulk),
    "pieces": cut,
    "opsgraph": planned(ours),
    "kept": planned(partial(ours, recompute=False)),
    "symmetric": planned(partial(ours, overlap=OVERLAP)),
}
"""Eager PyTorch with NCCL; torch.compile with async TP; TransformerEngine; opsgraph: no overlap,
whole exchanges behind products in the backward, exchanges in pieces, as it plans by itself, with
all kept that the backward needs (as eager PyTorch does), over symmetric memory. Calls are recorded
before the next one is built, and so keep their pieces."""
ON_ONE = (EAGER, "opsgraph")
"""What differs on one GPU."""


def products(block: Block, weights: Weights) -> Callable[[], Any]:
    """The six matrix products of a step on this rank's part of the weights."""
    _, fc1, fc2 = weights
    random = partial(torch.randn, **block.place)
    x, dy = (random(block.rows, block.hidden) for _ in range(2))
    wide, inner = random(block.rows, len(fc1)), random(block.rows, fc2.shape[1])
    pairs = [(x, fc1.t()), (inner, fc2.t()), (dy, fc2), (dy.t(), inner), (wide, fc1), (wide.t(), x)]
    results = [a.new_empty(a.shape[0], b.shape[1]) for a, b in pairs]

    def call() -> None:
        for (a, b), result in zip(pairs, results, strict=True):
            torch.mm(a, b, out=result)

    return call


def measured(block: Block, names: Sequence[str], graphs: bool, clock: Clock) -> dict[str, Any]:
    """One record: a step by each of the names, and its products; graphs: also as CUDA graphs."""

    def agree(failed: bool) -> bool:
        flag = torch.tensor([float(failed)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    chosen = {name: Candidate(HOW[name], recipes=name != ASYNCHRONOUS) for name in names}
    chosen = candidates_for(chosen, block.recipe)
    prepared = prepare(chosen, block, (TRAINING,), agree)
    calls, refused = prepared.calls[TRAINING], prepared.refused[TRAINING]
    calls[PRODUCTS] = products(block, make_weights(block))
    prepared.activate[PRODUCTS] = lambda: None
    for name in [*calls] if graphs else []:
        graph, why = attempt(partial(Captured, calls[name]), agree)
        if why is not None:
            refused[name + GRAPH] = why
        else:
            calls[name + GRAPH], prepared.activate[name + GRAPH] = graph, prepared.activate[name]
    samples = sampled(prepared, TRAINING, clock)
    record = case_of(block, TRAINING, samples, refused, prepared.plans[TRAINING])
    machine = parallel.Machine(parallel.GPUS[-1], block.ranks)
    predicted = parallel.step(machine, parallel.Block(block.hidden, block.ffn, block.rows))
    return record | {"predicted": predicted | {"gpu": machine.gpu.name}}


def slowest(record: dict[str, Any]) -> dict[str, Any]:
    """The record with every time that of the rank that took longest."""
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, record["seconds"])
    seconds = {
        name: {
            clock: max((each[name][clock] for each in every), key=lambda found: found["median"])
            for clock in clocks
        }
        for name, clocks in record["seconds"].items()
    }
    return record | {"seconds": seconds}


def identity(record: dict[str, Any]) -> tuple[Any, ...]:
    """What a record was measured for; a later one of the same takes its place."""
    return tuple(record[key] for key in ("ranks", "recipe", "rows", "hidden", "ffn"))


def table(records: Sequence[dict[str, Any]]) -> str:
    """All records for the eye.

    Times in milliseconds, over those of the products and of eager PyTorch in the same run; the
    efficiency is the products' time on one GPU over the ranks' time together.
    """
    lines, alone = [], {identity(r)[1:]: r for r in records if r["ranks"] == 1}
    columns = f"{'wall':>9}{'graph':>9}{'/ products':>12}{'/ eager':>9}{'efficiency':>12}"
    for record in sorted(records, key=identity):
        size = ", ".join(str(record[key]) for key in ("rows", "hidden", "ffn"))
        recipe, seconds = RECIPES[record["recipe"]] or record["dtype"], record["seconds"]
        title = f"({size}), {recipe}, {record['ranks']} ranks"
        lines.append(f"{title:<44}{columns}")
        walls = {name: found["wall"]["median"] for name, found in seconds.items()}
        one = alone.get(identity(record)[1:])
        best = min(each["wall"]["median"] for each in one["seconds"].values()) if one else None
        for name, wall in walls.items():
            if name.endswith(GRAPH):
                continue
            graph = walls.get(name + GRAPH)
            cells = f"{1e3 * wall:>9.3f}{'' if graph is None else f'{1e3 * graph:.3f}':>9}"
            cells += f"{wall / walls[PRODUCTS]:>12.2f}"
            cells += f"{wall / walls[EAGER]:>9.2f}" if EAGER in walls else " " * 9
            if best is not None:
                cells += f"{best / wall / record['ranks']:>12.2f}"
            lines.append(f"  {name:<42}{cells}")
        predicted = record["predicted"]
        told = {key: f"{1e3 * predicted[key]:.3f}" for key in ("plain", "overlapped")}
        lines.append(f"  predicted: {told['plain']} plain, {told['overlapped']} overlapped")
        lines += [f"  {name}: {why}" for name, why in record["refused"].items()]
    return "\n".join(lines)


def kept(path: Path) -> list[dict[str, Any]]:
    """The records of a file that earlier runs wrote."""
    return json.loads(path.read_text())["cases"] if path.exists() else []


def add(record: dict[str, Any], path: Path, clock: Clock) -> None:
    """Print a record, and write it beside those that are there."""
    print(table([record]), flush=True)
    others = [each for each in kept(path) if identity(each) != identity(record)]
    path.parent.mkdir(parents=True, exist_ok=True)
    cases = sorted([*others, record | {"run": facts()}], key=identity)
    path.write_text(json.dumps({"method": clock.method(), "cases": cases}, indent=1) + "\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--sizes", default=SIZES, help="rows, hidden, ffn: 8192x4096x14336,...")
    parser.add_argument("--recipes", default="none", help=f"some of {', '.join(RECIPES)}")
    parser.add_argument("--without", default="", help=f"some of {', '.join(HOW)}")
    parser.add_argument("--repeats", type=int, default=10, help="samples of each")
    parser.add_argument("--steps", type=int, default=10, help="calls in a sample")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON, to which records go")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure on this rank; the first one prints and writes."""
    args = parse(arguments)
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cuda = args.device == "cuda"
    number = int(os.environ.get("LOCAL_RANK", "0")) if cuda else None
    device = torch.device(args.device, number)
    if "RANK" not in os.environ:
        print("got no RANK, expected torchrun --nproc-per-node N -m benchmarks.parallel_gpu")
        return 1
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=LIMIT)
    together = torch.zeros(1)
    clock = Clock(args.repeats, min(args.steps, 5), args.steps)
    clock = replace(clock, together=lambda: dist.all_reduce(together))
    if cuda:
        clock = replace(clock, synchronize=torch.cuda.synchronize)
    left_out = names_of(args.without, HOW)
    names = [name for name in HOW if name not in left_out and (ranks > 1 or name in ON_ONE)]
    try:
        for recipe in names_of(args.recipes, RECIPES):
            for rows, hidden, ffn in sizes_of(args.sizes):
                torch._dynamo.reset()
                block = Block(rows, hidden, ffn, torch.bfloat16, device, recipe, ranks)
                record = slowest(measured(block, names, cuda, clock))
                if rank == 0:
                    add(record, args.out, clock)
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
