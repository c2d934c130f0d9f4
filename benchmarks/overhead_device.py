"""What the host pays on a GPU: a block beside other libraries, by size, recipe and kind of call.

`benchmarks.overhead --device cuda` runs it, with `--ranks 2` split over two GPUs: tensor and
sequence parallel, one process a rank, a sample being that of the slower rank. On CPUs it runs too,
over ranks with Gloo; that only shows that it works.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.calls import KINDS, Clock, Sample, case_of, prepare, samples_of
from benchmarks.peers import CANDIDATES, ON_RANKS, RECIPES, Block, candidates_for, lacking
from opsgraph.testing.distributed import RankError, Ranks

SIZES = ((64, 256, 512), (8192, 1024, 3584))
SIZES_ON_RANKS = ((8192, 2048, 5632),)
LIMIT = 500.0
"""Seconds that ranks may take for one size and recipe."""


def blocks(
    sizes: Sequence[tuple[int, int, int]], recipes: Sequence[str], device: torch.device, ranks: int
) -> Iterator[Block]:
    """Every size under every recipe, in bf16."""
    for rows, hidden, ffn in sizes:
        for recipe in recipes:
            yield Block(rows, hidden, ffn, torch.bfloat16, device, recipe, ranks)


def able(device: torch.device) -> tuple[list[str], dict[str, str]]:
    """Recipes that a device runs in hardware; of the others, why not."""
    reasons = {recipe: lacking(recipe, device) for recipe in RECIPES}
    told = {recipe: reason for recipe, reason in reasons.items() if reason is not None}
    return [recipe for recipe in RECIPES if recipe not in told], told


def cases(
    sizes: Sequence[tuple[int, int, int]],
    recipes: Sequence[str],
    names: Sequence[str],
    clock: Clock,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Records of one device, as they come."""
    for block in blocks(sizes, recipes, device, 1):
        torch._dynamo.reset()
        chosen = {n: c for n, c in candidates_for(CANDIDATES, block.recipe).items() if n in names}
        prepared = prepare(chosen, block)
        for kind in KINDS:
            samples = samples_of(prepared, kind, clock)
            yield case_of(block, kind, samples, prepared.refused[kind], prepared.plans[kind])


Found = dict[str, tuple[dict[str, list[Sample]], dict[str, str], dict[str, str]]]
"""By kind of call: samples, reasons and plans."""


def body(
    rank: int, size: int, block: Block, names: Sequence[str], steps: tuple[int, int, int]
) -> Found:
    """One rank's samples of a block. steps: repeats, and steps by each clock."""
    together = torch.zeros(1)

    def agree(failed: bool) -> bool:
        flag = torch.tensor([float(failed)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    clock = Clock(*steps, together=lambda: dist.all_reduce(together))
    if block.device.type == "cuda":
        torch.cuda.set_device(rank)
        block = replace(block, device=torch.device("cuda", rank))
        clock = replace(clock, synchronize=torch.cuda.synchronize)
    chosen = {n: c for n, c in candidates_for(ON_RANKS, block.recipe).items() if n in names}
    prepared = prepare(chosen, block, agree=agree)
    return {
        kind: (samples_of(prepared, kind, clock), prepared.refused[kind], prepared.plans[kind])
        for kind in KINDS
    }


def slower(samples: Sequence[Mapping[str, Sequence[Sample]]]) -> dict[str, list[Sample]]:
    """Of the ranks' samples, which belong together, the later clocks."""
    return {
        name: [
            Sample(max(each.host for each in turn), max(each.wall for each in turn))
            for turn in zip(*(rank[name] for rank in samples), strict=True)
        ]
        for name in samples[0]
    }


def cases_on_ranks(
    sizes: Sequence[tuple[int, int, int]],
    recipes: Sequence[str],
    names: Sequence[str],
    clock: Clock,
    device: torch.device,
    ranks: int,
) -> Iterator[dict[str, Any]]:
    """Records of a block that ranks split, as they come. A rank that fails costs one recipe."""
    steps = clock.repeats, clock.host, clock.wall
    with Ranks() as started:
        for block in blocks(sizes, recipes, device, ranks):
            try:
                found: list[Found] = started.run(body, ranks, block, names, steps, timeout=LIMIT)
            except RankError as error:
                for kind in KINDS:
                    yield case_of(block, kind, {}, {"ranks": str(error)}, {})
                continue
            for kind in KINDS:
                refused: dict[str, str] = {}
                for rank in reversed(found):
                    refused |= rank[kind][1]
                samples = slower([rank[kind][0] for rank in found])
                yield case_of(block, kind, samples, refused, found[0][kind][2])
