"""A training step captured in a CUDA graph, scaling state included, is the step run eagerly."""

from typing import Any

import pytest
import torch
from recipe_cases import HIDDEN, RECIPES, ROWS, mlp
from torch import Tensor, nn

import opsgraph as og

pytestmark = pytest.mark.gpu
WARM = 3


class Step:
    """Forward and backward of a module on inputs that are kept; gradients are made anew."""

    def __init__(self, module: nn.Module, recipe: Any) -> None:
        self.module, self.recipe = module, recipe
        self.x = torch.empty(ROWS, HIDDEN, dtype=torch.bfloat16, device="cuda").requires_grad_()
        self.dy = torch.empty_like(self.x)
        self.y: Tensor | None = None

    def __call__(self) -> None:
        self.module.zero_grad()
        self.x.grad = None
        with og.autocast(enabled=self.recipe is not None, recipe=self.recipe):
            self.y = self.module(self.x)
        self.y.backward(self.dy)

    def feed(self, seed: int) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        with torch.no_grad():
            self.x.normal_(generator=generator)
            self.dy.normal_(generator=generator)

    def results(self) -> dict[str, Tensor]:
        """Everything that a step makes or changes."""
        grads = {f"grad of {n}": p.grad for n, p in self.module.named_parameters()}
        return {"y": self.y, "dx": self.x.grad, **grads, **dict(self.module.named_buffers())}  # type: ignore[dict-item]


def captured(step: Step) -> torch.cuda.CUDAGraph:
    """The graph of a step that has run before on a stream of its own."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for seed in range(WARM):
            step.feed(seed)
            step()
    torch.cuda.current_stream().wait_stream(stream)
    step.module.zero_grad()
    step.x.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


@pytest.mark.parametrize("name", [None, *RECIPES])
def test_a_captured_step_is_the_eager_step(name: str | None) -> None:
    recipe = RECIPES[name] if name else None
    seeds = range(WARM, WARM + 4)
    eager = Step(mlp(device="cuda"), recipe)
    for seed in range(WARM):
        eager.feed(seed)
        eager()
    expected = []
    for seed in seeds:
        eager.feed(seed)
        eager()
        expected.append({what: value.clone() for what, value in eager.results().items()})
    del eager  # or what the graph does would update its scales too
    replayed = Step(mlp(device="cuda"), recipe)
    graph = captured(replayed)
    for seed, wanted in zip(seeds, expected, strict=True):
        replayed.feed(seed)
        graph.replay()
        found = replayed.results()
        assert found.keys() == wanted.keys()
        for what, value in found.items():
            assert bool(value.isfinite().all()), what
            # Stochastic rounding draws other numbers when a graph is replayed.
            assert name == "nvfp4" or torch.equal(value, wanted[what]), what
