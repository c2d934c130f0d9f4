"""What docs/state.md says that no other test holds, and that each of its sentences has a test."""

import copy
import io
import os
import re
import threading
from pathlib import Path

import pytest
import torch

import opsgraph as og
from opsgraph import recipe
from opsgraph.ops import Linear, SiLU
from opsgraph.precision.autocast import active

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
