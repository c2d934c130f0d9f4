"""What docs/state.md says that no other test holds, and that each of its sentences has a test."""

import copy
import gc
import io
import os
import re
import threading
import weakref
from pathlib import Path

import pytest
import torch

import opsgraph as og
from opsgraph import recipe
from opsgraph.ops import Linear, SiLU
from opsgraph.precision.autocast import active
from opsgraph.precision.delayed import states_of

ROOT = Path(__file__).parents[1]


def test_each_sentence_names_a_test_that_is_there() -> None:
    bullets = re.findall(r"^- (.+?)(?=^- |^#|^\n|\Z)", text(), re.MULTILINE | re.DOTALL)
    assert len(bullets) > 40
    for bullet in bullets:
        named = re.findall(r"`([\w/]+\.py)::(test_\w+)`", bullet)
        assert named, bullet
        for path, name in named:
            assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text(), f"{path}::{name}"


def text() -> str:
    return (ROOT / "docs/state.md").read_text()


def test_equal_modules_copies_and_pickles_share_a_table() -> None:
    module = og.Sequential(Linear(4, 4), SiLU())
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    others = [
        og.Sequential(Linear(4, 4), SiLU()),
        copy.deepcopy(module),
        torch.load(saved, weights_only=False),
    ]
    for each in (module, *others):
        each(torch.randn(2, 4)).sum().backward()
    (first,) = module._stages
    for other in others:
        (stage,) = other._stages
        assert stage.table is first.table
    assert len(first.plans) == 1
    assert {*module.state_dict()} == {"0.weight", "0.bias"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_contexts_belong_to_a_thread_and_go_with_a_fork() -> None:
    seen = []
    current = recipe.Float8CurrentScaling()
    with og.autocast(recipe=current):
        thread = threading.Thread(target=lambda: seen.append(active.key))
        thread.start()
        thread.join()
        child = os.fork()
        if child == 0:
            os._exit(active.key != current.key)
        assert os.waitpid(child, 0)[1] == 0
    assert seen == [None]
    assert active.key is None


@pytest.mark.parametrize("kind", ["Sequential", "LayerNormMLP", "called alone"])
def test_what_frees_a_module(kind: str) -> None:
    """The last reference, or a collection of what refers to itself; with its delayed scales."""
    makes = {
        "Sequential": lambda: og.Sequential(Linear(16, 16), SiLU(), Linear(16, 16), device="cpu"),
        "LayerNormMLP": lambda: og.LayerNormMLP(16, 32, device="cpu"),
        "called alone": lambda: Linear(16, 16, device="cpu"),
    }
    delayed = recipe.DelayedScaling(amax_history_len=3)
    gc.collect()
    gc.disable()
    try:
        module = makes[kind]()
        for _ in range(3):
            with og.autocast(recipe=delayed):
                y = module(torch.randn(4, 16))
            y.sum().backward()
        weights = [weakref.ref(parameter) for parameter in module.parameters()]
        assert states_of(delayed.key)
        del module, y
        if kind != "Sequential":
            gc.collect()
        assert not any(weight() is not None for weight in weights)
        assert not states_of(delayed.key)
    finally:
        gc.enable()
