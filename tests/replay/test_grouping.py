"""Which lines share a native call, by the memory that they take."""

from collections.abc import Collection
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from replays import WIDTH, build, random, step
from torch import Tensor

import opsgraph as og
from opsgraph.replay import assembly, recording
from opsgraph.replay.events import Aten, Buffer, Operand, Place
from opsgraph.replay.grouping import groups
from opsgraph.replay.recording import Step

CPU = torch.device("cpu")
LARGE = recording.LARGE


class Pass:
    """A recording of lines that each make a value of a size, with temporaries or not.

    The arguments have slots and buffers 0 to n; line k makes slot and buffer n + k.
    """

    def __init__(self, arguments: list[int]) -> None:
        self.count, self.steps = len(arguments), list[Step]()
        self.values: list[Any] = [None] * self.count
        self.slots = {f"x{k}": k for k in range(self.count)}
        self.same: dict[int, int] = {}
        buffers = [Buffer(size, CPU, k) for k, size in enumerate(arguments)]
        self.recorder = SimpleNamespace(buffers=buffers, taken={})
        self.buffer_of = {k: k for k in range(self.count)}

    def shown(self, slot: int) -> set[int]:
        return {self.buffer_of[slot]} if slot in self.buffer_of else set()

    def line(
        self, size: int, gone: Collection[int] = (), temporary: int = 0,
        reason: str | None = None, over: int | None = None,
    ) -> int:  # fmt: skip
        """A line that lets go of slots. over: the argument whose memory its result takes."""
        buffers, slot = self.recorder.buffers, len(self.values)
        self.values.append(None)
        places = [len(buffers)]
        buffers.append(Buffer(size, CPU))
        self.buffer_of[slot] = places[0]
        if over is not None:
            self.recorder.taken[places[0]] = over
        if temporary:
            places.append(len(buffers))
            buffers.append(Buffer(temporary, CPU))
        operands = [Operand(Place(b, 0), torch.uint8, CPU, (1,), (1,)) for b in places]
        events = [] if reason else [Aten("fill", (*operands,))]
        number = len(self.steps)
        self.steps.append(Step(number, None, {}, {"y": slot}, {*gone}, events, reason))  # type: ignore[arg-type]
        for k in gone:
            self.slots = {name: v for name, v in self.slots.items() if v != k}
        if slot not in gone:
            self.slots[f"y{slot}"] = slot
        return slot

    def groups(self) -> list[list[int]]:
        return [[s.number for s in group] for group in groups(self)]  # type: ignore[arg-type]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The recordings whose lines were grouped."""
    found: list[Any] = []

    def look(made: Any) -> Any:
        found.append(made)
        return groups(made)

    monkeypatch.setattr(assembly, "groups", look)
    return found


def test_small_memory_is_let_go_of_at_the_end() -> None:
    made = Pass([LARGE // 2])
    made.line(8, gone={0})
    made.line(8)
    assert made.groups() == [[0, 1]]


def test_what_comes_after_large_memory_may_be_given_it() -> None:
    made = Pass([4 * LARGE])
    made.line(8, gone={0})
    made.line(4 * LARGE)
    assert made.groups() == [[0], [1]]


@pytest.mark.parametrize(("later", "joined"), [(3 * LARGE, True), (5 * LARGE, False)])
def test_lines_join_as_long_as_the_peak_is_that_of_python(later: int, joined: bool) -> None:
    """The first line's temporary is the peak: later ones have its room, and no more."""
    made = Pass([4 * LARGE])
    made.line(8, gone={0}, temporary=4 * LARGE)
    made.line(8, temporary=later)
    assert made.groups() == ([[0, 1]] if joined else [[0], [1]])


def test_results_are_there_from_the_beginning() -> None:
    made = Pass([4 * LARGE])
    made.line(8, gone={0}, temporary=4 * LARGE)
    made.line(3 * LARGE)  # beside the temporary
    assert made.groups() == [[0], [1]]


def test_a_result_that_takes_an_arguments_memory_adds_none() -> None:
    made = Pass([4 * LARGE, LARGE])
    made.line(4 * LARGE, gone={0}, temporary=2 * LARGE, over=0)
    made.line(8, gone={1})
    made.line(8, temporary=LARGE)
    assert made.groups() == [[0, 1, 2]]


def test_arguments_that_someone_else_has_stay() -> None:
    """Were the first argument let go of for certain, there would be room for all of the rest."""
    made = Pass([4 * LARGE, 2 * LARGE])
    made.line(8, temporary=4 * LARGE)
    made.line(8, gone={0})
    made.line(8, reason="a user's")
    made.line(8, gone={1}, temporary=3 * LARGE)
    made.line(5 * LARGE)
    assert made.groups() == [[0, 1], [2], [3], [4]]


def test_a_result_takes_no_memory_that_someone_else_has() -> None:
    """It has its own from the beginning of a stretch, beside the temporary of a line before."""
    made = Pass([4 * LARGE, LARGE])
    made.line(8, gone={1}, temporary=4 * LARGE)
    made.line(4 * LARGE, gone={0}, over=0)
    assert made.groups() == [[0], [1]]


def test_arguments_of_which_someone_else_has_some() -> None:
    """With both arguments or none the peak would be that of Python; a caller keeps the first."""
    made = Pass([4 * LARGE, 4 * LARGE])
    made.line(8, gone={0}, reason="a user's")
    made.line(8, gone={1})
    made.line(4 * LARGE)
    assert made.groups() == [[0], [1], [2]]


def test_lines_in_python_are_alone_and_their_values_count() -> None:
    made = Pass([LARGE])
    made.line(8, gone={0}, temporary=4 * LARGE)
    python = made.line(2 * LARGE, reason="a user's")
    made.line(8, gone={python})
    made.line(2 * LARGE)
    assert made.groups() == [[0], [1], [2, 3]]


@pytest.mark.parametrize("same", [True, False])
def test_what_a_line_in_python_hands_on_is_there_once(same: bool) -> None:
    """Twice, it makes the peak in Python high enough for two more lines together."""
    made = Pass([LARGE])
    first = made.line(4 * LARGE, gone={0})
    again = made.line(4 * LARGE, gone={first}, reason="a user's")
    if same:
        made.same[again] = first
    made.line(8, gone={again})
    made.line(2 * LARGE)
    assert made.groups() == ([[0], [1], [2], [3]] if same else [[0], [1], [2, 3]])


def test_a_recording_knows_what_a_line_in_python_hands_on(seen: list[Any]) -> None:
    class Same(og.Op):
        """The identity, forwards and backwards."""

        def fwd(self, x: Tensor) -> Any:
            return x, ()

        def bwd(self, dy: Tensor) -> Any:
            return dy, ()

    module = og.Sequential(og.ops.RMSNorm(WIDTH), Same(), og.ops.Linear(WIDTH, WIDTH))
    for _ in range(3):
        step(module, random(64, WIDTH))
    assert {made.function.name for made in seen} == {"forward", "backward"}
    assert all(made.same for made in seen)


def test_nothing_joins_where_unknown_memory_was_let_go_of() -> None:
    made = Pass([4 * LARGE])
    opaque = made.line(8, reason="a user's")
    made.values[opaque] = object
    made.line(8, gone={0, opaque}, temporary=8 * LARGE)
    made.line(8)
    assert made.groups() == [[0], [1], [2]]


def test_a_name_that_is_bound_anew_lets_go(seen: list[Any]) -> None:
    """`dx = dgrad(dx)` ends the old dx, though no line says `del dx`."""
    module, x = build("residual"), random(64, WIDTH)
    for _ in range(3):
        step(module, x)
    (backward,) = (made for made in seen if made.function.name == "backward")
    anew = [s for s in backward.steps if "dx" in s.reads and "dx" in s.makes]
    assert anew
    ends = {k for s in backward.steps for k in s.gone}
    assert {s.reads["dx"] for s in anew} - ends == set()
    for s in anew:
        assert s.makes["dx"] not in s.gone
