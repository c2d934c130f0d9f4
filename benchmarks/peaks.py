"""The most bytes that are alive at a line of a step's backward on a GPU, by the plan alone.

Plans are made for CUDA, with the formats of a Hopper. Nothing runs, so it takes no GPU. A line
counts as `opsgraph.features.alive` says: without what the caller holds, what a call allocates for
itself, and the results that a replay allocates ahead.

`python -m benchmarks.peaks` prints MB for each size and recipe by the plan's first order of weight
gradients, and by the one that it has for so many rows. Under recipes there is one.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import opsgraph as og
from benchmarks.gpu_parts import RECIPES, SIZES, Size
from benchmarks.peers import RECIPES as CLASSES
from opsgraph.base.backend import Backend
from opsgraph.features import planned
from opsgraph.features.alive import Peak, Values
from opsgraph.features.ordered import second_order
from opsgraph.fusers.cublaslt import products
from opsgraph.ops import GELU, LayerNorm, Linear, RMSNorm, SwiGLU
from opsgraph.plan import Plan
from opsgraph.plan.program import Request

BACKENDS = ("cublaslt", "triton", "aten", "reference")
NETS: Mapping[str, Callable[[int, int], list[nn.Module]]] = {
    "RMSNorm, SwiGLU": lambda hidden, ffn: [
        RMSNorm(hidden), Linear(hidden, 2 * ffn, bias=False), SwiGLU(),
        Linear(ffn, hidden, bias=False),
    ],
    "LayerNorm, GELU": lambda hidden, ffn: [
        LayerNorm(hidden), Linear(hidden, ffn), GELU(), Linear(ffn, hidden)
    ],
}  # fmt: skip


def _on_cuda(request: Request) -> Request:
    """A request as a GPU's would be."""

    def moved(spec: Any) -> Any:
        return spec and replace(spec, device=torch.device("cuda", 0))

    weights = {name: moved(spec) for name, spec in request.weights.items()}
    return replace(request, x=moved(request.x), weights=weights)


@contextmanager
def planning_for_hopper() -> Iterator[list[Values]]:
    """Plans that are made inside are for CUDA; the list gets the values of their backwards."""
    found: list[Values] = []
    own, absent = planned.of_what_runs, Backend.why_not_on

    def keep(plan: Plan, noted: Any) -> Plan:
        found.append(Values(plan, noted.definitions, noted))
        return plan

    def why_not(backend: Backend, device: torch.device) -> str | None:
        there = device.type == "cuda" and backend.name in BACKENDS
        return None if there else absent(backend, device)

    with ExitStack() as stack:
        for where, name, what in (
            (planned, "of_what_runs", lambda run, request: own(run, _on_cuda(request))),
            (planned, "with_few", keep),
            (Backend, "why_not_on", why_not),
            (products, "chip", lambda: 9),
            (products, "cuda", lambda: (13, 0)),
        ):
            stack.enter_context(patch.object(where, name, what))
        yield found


def values_of(net: str, recipe: str, size: Size) -> Values:
    """The backward of a training step in bf16 on a GPU."""
    _, hidden, ffn = size
    known = None if recipe == "bf16" else getattr(og.recipe, CLASSES[recipe])()
    with planning_for_hopper() as found, torch.device("meta"):
        module = og.Sequential(*NETS[net](hidden, ffn)).to(torch.bfloat16)
        x = torch.empty(2, hidden, dtype=torch.bfloat16, requires_grad=True)
        with og.autocast(enabled=known is not None, recipe=known):
            (stage,) = module._current()
            stage.make(stage.key(x, (), stage.weights()))
    return found[0]


def peaks(net: str, recipe: str, size: Size) -> tuple[int, int]:
    """The most bytes by the first order, and by the one for that many rows."""
    values, rows = values_of(net, recipe, size), size[0]
    before = Peak(values.steps, values.sizes)(rows)
    found = None if recipe != "bf16" else second_order(values)
    if found is None or rows not in found[1]:
        return before, before
    return before, Peak(found[0].steps, values.sizes)(rows)


def main() -> None:
    """Print the table."""
    print("MB by one order, by that for the rows")
    for net in NETS:
        print(f"\n{net:<24}" + "".join(f"{recipe:>24}" for recipe in RECIPES))
        for size in SIZES:
            row = f"{', '.join(map(str, size)):<24}"
            for recipe in RECIPES:
                before, after = peaks(net, recipe, size)
                row += f"{before / 1e6:9.1f}{after / 1e6:9.1f} {after / before:.2f}"
            print(row)


if __name__ == "__main__":
    main()
