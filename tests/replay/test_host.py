"""What a replayed step costs the host, in calls of Python functions: no clock decides a test."""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import CodeType
from typing import Any

import pytest
import recipe_cases
import torch
from replays import build, random

import opsgraph as og
from opsgraph.kernels.cpu import build as library
from opsgraph.precision.delayed import Scaling
from opsgraph.replay.parts import Build, InPython, view

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")

ROWS, WIDTH = 6, 64
ASIDE = {InPython.run.__code__, Build.make.__code__, view.__code__}
"""Lines in Python, and what is made for them. Emulated products are such; on CUDA there are none
under these recipes."""
MADE = {code for code in Build.text.__code__.co_consts if isinstance(code, CodeType)}
"""What a step's text calls to begin them."""


@pytest.fixture(autouse=True)
def before_any_compilation(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first compiled call of a process on, each update hands its scales to Dynamo too."""
    monkeypatch.setattr(Scaling, "pinned", False)


def calls(step: Callable[[], Any]) -> Counter[str]:
    """The functions of opsgraph that a step calls, and how often."""
    found: Counter[str] = Counter()
    aside = 0

    def see(frame: Any, event: str, argument: Any) -> None:
        nonlocal aside
        code = frame.f_code
        if code in ASIDE:
            aside += {"call": 1, "return": -1}.get(event, 0)
        elif event == "call" and not aside and "opsgraph" in code.co_filename:
            if code in MADE:
                return
            found[f"{code.co_filename.rpartition('/')[2]} {code.co_name}"] += 1

    sys.setprofile(see)
    try:
        step()
    finally:
        sys.setprofile(None)
    return found


def stepping(recipe: Any) -> Callable[[], Any]:
    """A training step under a recipe, as often as it takes to replay it, and once more later."""
    module = build("llama", torch.bfloat16)
    x = random(ROWS, WIDTH, dtype=torch.bfloat16).requires_grad_()
    dy = random(ROWS, WIDTH, dtype=torch.bfloat16, seed=1)

    def context() -> AbstractContextManager[Any]:
        return nullcontext() if recipe is None else og.autocast(recipe=recipe)

    def step() -> None:
        with context():
            y = module(x)
        y.backward(dy)

    for _ in range(6):
        step()
    return step


@pytest.mark.parametrize(
    ("name", "most"), [("none", 15), ("current", 24), ("delayed", 36), ("blocks", 24)]
)
def test_a_replayed_step_calls_few_functions(name: str, most: int) -> None:
    recipe = None if name == "none" else recipe_cases.RECIPES[name]
    found = calls(stepping(recipe))
    assert found.total() <= most, found


@pytest.mark.parametrize("layers", [1, 4])
def test_updates_of_delayed_scales_call_as_many_for_one_layer_as_for_more(layers: int) -> None:
    recipe = og.recipe.DelayedScaling(amax_history_len=90 + layers)
    module = og.Sequential(*[og.ops.Linear(WIDTH, WIDTH) for _ in range(layers)])
    x = random(ROWS, WIDTH).requires_grad_()

    def update() -> None:
        with og.autocast(recipe=recipe):
            pass

    for _ in range(3):
        with og.autocast(recipe=recipe):
            y = module(x)
        y.sum().backward()
        update()
    assert calls(update).total() <= 18
