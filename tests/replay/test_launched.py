"""Launches outside of passes: by the third call native, on tensors wherever they are."""

from collections.abc import Iterator

import pytest
import torch
from replays import random, replaying
from torch import Tensor

from opsgraph.guards import compiled
from opsgraph.guards.launching import launching
from opsgraph.guards.watching import watching
from opsgraph.kernels.cpu import build as library
from opsgraph.kernels.cpu.transpose import _kernel as transpose
from opsgraph.replay import launched

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    with replaying(True):
        launched._known.clear()
        yield
        launched._known.clear()


class Calls:
    """Transposes x to y by a kernel, and counts how often it was called."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.count += 1
        transpose(1, 4, 4, 8, x.data_ptr(), 8, y.data_ptr())


def runs(calls: Calls, x: Tensor, y: Tensor) -> None:
    """Once, with the right result."""
    launching.by("transpose", calls)(x, y)
    assert torch.equal(y, x.t())


def test_the_third_call_is_native() -> None:
    calls = Calls()
    for k in range(5):
        runs(calls, random(4, 8, seed=k), torch.zeros(8, 4))
    assert calls.count == 2


def test_what_begins_elsewhere_in_16_bytes_is_launched_in_python() -> None:
    calls = Calls()
    for _ in range(3):
        runs(calls, random(4, 8), torch.zeros(8, 4))
    runs(calls, random(33)[1:].view(4, 8), torch.zeros(8, 4))
    assert calls.count == 3


def test_without_replays_every_call_is_in_python() -> None:
    calls = Calls()
    with replaying(False):
        for _ in range(4):
            runs(calls, random(4, 8), torch.zeros(8, 4))
    assert calls.count == 4


def test_what_the_recorder_does_not_know_stays_in_python() -> None:
    calls = []

    def maximum(seen: Tensor, amax: Tensor) -> None:
        calls.append(seen)
        torch.maximum(seen, amax, out=seen)

    for k in range(4):
        seen = torch.tensor(2.0)
        launching.by("maximum", maximum)(seen, torch.tensor(float(k)))
        assert seen == max(2.0, k)
    assert len(calls) == 4


def test_memory_that_a_function_allocates_is_no_argument() -> None:
    calls = Calls()

    def twice(x: Tensor, y: Tensor) -> None:
        between = torch.empty(8, 4)
        calls(x, between)
        transpose(1, 4, 8, 4, between.data_ptr(), 4, y.data_ptr())

    for k in range(4):
        x, y = random(4, 8, seed=k), torch.zeros(4, 8)
        launching.by("twice", twice)(x, y)
        assert torch.equal(x, y)
    assert calls.count == 4


def test_few_keys_are_kept() -> None:
    for k in range(launched.MOST + 5):
        launching.by(k, lambda x: None)(torch.zeros(1))
    assert len(launched._known) == launched.MOST


def test_a_call_that_compiles_a_kernel_is_recorded_later() -> None:
    calls = Calls()

    def compiles(x: Tensor, y: Tensor) -> None:
        calls(x, y)
        if calls.count == 2:
            watching.recorder.refuse("a kernel was compiled")

    for k in range(5):
        x, y = random(4, 8, seed=k), torch.zeros(8, 4)
        launching.by("compiles", compiles)(x, y)
        assert torch.equal(y, x.t())
    assert calls.count == 3


def test_what_is_compiled_for_no_alignment_is_launched_anywhere() -> None:
    calls = Calls()
    for k in range(4):
        x, y = random(33)[k % 2 :][:32].view(4, 8), torch.zeros(8, 4)
        launching.by("anywhere", calls, anywhere=True)(x, y)
        assert torch.equal(y, x.t())
    assert calls.count == 2


def test_what_began_elsewhere_when_it_was_recorded_may_begin_anywhere() -> None:
    calls = Calls()
    for k in (1, 1, 2, 0):
        runs(calls, random(34)[k:][:32].view(4, 8), torch.zeros(8, 4))
    assert calls.count == 2
    runs(calls, random(4, 8), torch.zeros(33)[1:].view(8, 4))
    assert calls.count == 3


def test_a_launch_has_no_text_to_compile() -> None:
    calls = Calls()
    compiled._code.cache_clear()
    for _ in range(3):
        runs(calls, random(4, 8), torch.zeros(8, 4))
    assert calls.count == 2
    assert compiled._code.cache_info().currsize == 0
