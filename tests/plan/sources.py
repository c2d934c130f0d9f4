"""Printed plans and generated sources of a broad set of calls, as text.

`python -m tests.plan.sources FOLDER` writes all of them, a file each: `diff -r` of two folders
shows what a change did to generated code. `test_sources.py` keeps a part of them in git.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import opsgraph as og
from opsgraph.ops import GELU, Add, Dropout, LayerNorm, Linear, ReLU, RMSNorm, SwiGLU, Tee
from opsgraph.recipe import Recipe

HIDDEN, FFN = 128, 256

NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "llama": lambda: [
        RMSNorm(HIDDEN),
        Linear(HIDDEN, 2 * FFN, bias=False),
        SwiGLU(),
        Linear(FFN, HIDDEN, bias=False),
    ],
    "gpt": lambda: [LayerNorm(HIDDEN), Linear(HIDDEN, FFN), GELU(), Linear(FFN, HIDDEN)],
    "residual": lambda: [
        Tee("r"),
        RMSNorm(HIDDEN),
        Linear(HIDDEN, FFN),
        ReLU(),
        Dropout(0.1),
        Linear(FFN, HIDDEN),
        Add("r"),
    ],
    "linear": lambda: [Linear(HIDDEN, FFN), Linear(FFN, HIDDEN)],
    "large": lambda: [
        RMSNorm(8 * HIDDEN),
        Linear(8 * HIDDEN, 32 * FFN, bias=False),
        SwiGLU(),
        Linear(16 * FFN, 8 * HIDDEN, bias=False),
    ],
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "keep": {"recompute": False},
    "checkpoint": {"checkpoint": True},
    "delayed": {"delay_wgrad_compute": True},
    "optimal": {"planner": "optimal"},
    "reference": {"backends": ("reference",)},
    "aten": {"backends": ("aten", "reference")},
    "frozen": {},
}

RECIPES: dict[str, Recipe | None] = {
    "none": None,
    "delayed": og.recipe.DelayedScaling(),
    "current": og.recipe.Float8CurrentScaling(),
    "rows": og.recipe.Float8CurrentScaling(row_wise=True),
    "blocks": og.recipe.Float8BlockScaling(),
    "mxfp8": og.recipe.MXFP8BlockScaling(),
    "nvfp4": og.recipe.NVFP4BlockScaling(),
    "override": og.recipe.Float8CurrentScaling(backward_override="high_precision"),
}


class Call(NamedTuple):
    """One call that is planned: keys of the tables above, and how the module is called."""

    net: str
    options: str
    recipe: str
    cast: bool = False
    """Whether it runs under torch.autocast in bf16."""
    training: bool = True

    @property
    def name(self) -> str:
        """The name of its file."""
        cast = "cast" if self.cast else "plain"
        training = "training" if self.training else "inference"
        return f"{self.net}-{self.options}-{self.recipe}-{cast}-{training}"

    def plan(self) -> Any:
        """Its plan."""
        module = og.Sequential(*NETS[self.net](), **OPTIONS[self.options])
        if self.options == "frozen":
            for parameter in list(module.parameters())[1:]:
                parameter.requires_grad_(False)
        recipe = RECIPES[self.recipe]
        with (
            og.autocast(enabled=recipe is not None, recipe=recipe),
            torch.autocast("cpu", torch.bfloat16, enabled=self.cast),
        ):
            return module.plan(self.training)

    def text(self) -> str:
        """The plan as printed, and its functions."""
        plan = self.plan()
        prepare = (plan.prepare_source,) if plan.prepare_source else ()
        few = (plan.few.function.source,) if plan.few else ()
        sources = *prepare, plan.forward_source, plan.backward_source, *few
        return "\n".join((str(plan), "", *sources))


def calls() -> Iterator[Call]:
    """All of them, 1,280."""
    for values in itertools.product(NETS, OPTIONS, RECIPES, (False, True), (True, False)):
        yield Call(*values)


def main() -> None:
    """Write every text into the folder that is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for call in calls():
        try:
            text = call.text()
        except og.OpsgraphError as error:  # a plan that is refused is pinned as its reason
            text = f"{type(error).__name__}: {error}"
        (folder / f"{call.name}.txt").write_text(text)


if __name__ == "__main__":
    main()
