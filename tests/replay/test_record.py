"""Records: where temporaries lie, what the generated function does, what a failing step says."""

import sys
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from replays import random
from torch import Tensor

import opsgraph as og
from opsgraph.guards import compiled as guards
from opsgraph.guards.compiled import compiled
from opsgraph.guards.torch_private import same_layouts
from opsgraph.kernels.cpu import build as library
from opsgraph.ops import Linear, RMSNorm, SiLU
from opsgraph.plan.lines import Line, value
from opsgraph.replay import record as records
from opsgraph.replay.arena import ALIGNMENT, arena
from opsgraph.replay.events import used
from opsgraph.replay.parts import Build, Constant, InPython, Result, Stretch, View, view
from opsgraph.replay.record import Record
from opsgraph.replay.recorder import Aten, Buffer, Event, Kernel, Operand, Place

CPU = torch.device("cpu")
F32 = torch.float32
needs_kernels = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")


# -- the arena --


@st.composite
def stretches(draw: st.DrawFn) -> tuple[list[Event], list[Buffer], set[int]]:
    """Events that use some buffers, and which buffers are temporary."""
    sizes = draw(st.lists(st.integers(1, 3000), min_size=1, max_size=12))
    numbers = st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=4)
    uses = draw(st.lists(numbers, min_size=1, max_size=12))
    events: list[Event] = [
        Kernel(0, b"", tuple((k, Place(b, 0)) for k, b in enumerate(some))) for some in uses
    ]
    temporary = draw(st.sets(st.integers(0, len(sizes) - 1)))
    return events, [Buffer(size, CPU) for size in sizes], temporary


@given(stretches())
def test_buffers_in_use_together_never_overlap(case: Any) -> None:
    events, buffers, temporary = case
    offsets, size = arena(events, temporary.__contains__, buffers)
    lives: dict[int, list[int]] = {}
    for number, event in enumerate(events):
        for buffer in used(event):
            if buffer in temporary:
                lives.setdefault(buffer, []).append(number)
    assert offsets.keys() == lives.keys()
    room = {b: -(-buffers[b].size // ALIGNMENT) * ALIGNMENT for b in lives}
    for one in lives:
        assert offsets[one] % ALIGNMENT == 0
        assert offsets[one] >= 0
        assert offsets[one] + buffers[one].size <= size
        for other in lives:
            together = lives[one][0] <= lives[other][-1] and lives[other][0] <= lives[one][-1]
            if one < other and together:
                before = offsets[one] + buffers[one].size <= offsets[other]
                assert before or offsets[other] + buffers[other].size <= offsets[one]
    at_once = [
        sum(room[b] for b, use in lives.items() if use[0] <= n <= use[-1])
        for n in range(len(events))
    ]
    assert max(at_once, default=0) <= size <= sum(room.values())


def test_what_is_used_one_after_the_other_shares_memory() -> None:
    events = [Kernel(0, b"", ((0, Place(k, 0)), (1, Place(k + 1, 0)))) for k in range(6)]
    offsets, size = arena(events, lambda buffer: True, [Buffer(1000, CPU)] * 7)
    assert size == 2 * 1024
    assert set(offsets.values()) == {0, 1024}


# -- stretches and lines in Python --


def operand(buffer: int, *sizes: int, strides: Sequence[int] = (), offset: int = 0) -> Operand:
    return Operand(Place(buffer, offset), F32, CPU, sizes, tuple(strides) or (sizes[-1], 1))


def product(*operands: Operand) -> Stretch:
    """A product of slots 0 and 1, which is slot 2."""
    sizes = operands[0].sizes
    buffers = [Buffer(4 * 64 * 64, CPU, 0), Buffer(4 * 64 * 64, CPU, 1), Buffer(4 * 64 * 64, CPU)]
    return Stretch(
        CPU, [(0, Aten("mm", operands))], ["3:LinearProduct.fwd"], [0, 1],
        [Result(2, sizes, F32, CPU)], [], {0: 0, 1: 1, 2: 2}, buffers,
    )  # fmt: skip


def record(
    *parts: Any, arguments: Sequence[Tensor], returned: Any = (2,), **options: Any
) -> Record:
    """A record of these parts, of a pass without ops."""
    layouts = {k: (t.dtype, tuple(t.shape), t.stride()) for k, t in enumerate(arguments)}
    settings = {
        "saved": 0, "has_ops": False, "ends": {}, "shared": (), "twins": {}, "layouts": layouts,
        **options,
    }  # fmt: skip
    return Record(
        count=len(arguments), present=range(len(arguments)), fits=same_layouts(arguments),
        parts=parts, returned=returned, device=CPU, **settings,
    )  # fmt: skip


@needs_kernels
def test_a_product() -> None:
    a, b = random(4, 8), random(8, 6)
    made = record(product(operand(2, 4, 6), operand(0, 4, 8), operand(1, 8, 6)), arguments=[a, b])
    (found,) = made.run(a, b)
    assert torch.equal(found, a @ b)
    assert made.run_if is not None
    (found,) = made.run_if(b.t().reshape(8, 6)[:4].repeat(1, 2)[:, :8].contiguous(), b)
    assert found.shape == (4, 6)
    assert made.run_if(a[:3], b) is None
    assert made.run_if(a.double(), b) is None
    assert made.run_if(a, torch.nn.Parameter(b)) is None
    assert str(made.parts[0]) == "3: 1 launches in one native call"
    first, test = made.source.splitlines()[:2]
    assert first == "def replayed(v0, v1, fits=fits):"
    assert "threads() != 1" in test
    assert "not fits(v0, v1)" in test


@needs_kernels
def test_a_record_holds_no_events() -> None:
    event = Aten("mm", (operand(2, 4, 6), operand(0, 4, 8), operand(1, 8, 6)))
    before = sys.getrefcount(event)
    buffers = [Buffer(128, CPU, 0), Buffer(192, CPU, 1), Buffer(96, CPU)]
    results = [Result(2, (4, 6), F32, CPU)]
    homes = {0: 0, 1: 1, 2: 2}
    stretch = Stretch(CPU, [(0, event)], ["3:L.fwd"], [0, 1], results, [], homes, buffers)
    assert sys.getrefcount(event) == before
    assert str(stretch) == "3: 1 launches in one native call"


@needs_kernels
def test_arguments_that_have_to_share_memory() -> None:
    a, b = random(8, 8), random(8, 8, seed=4)
    stretch = product(operand(2, 8, 8), operand(0, 8, 8), operand(0, 8, 8))
    made = record(stretch, arguments=[a, a], shared={(0, 1)})
    assert torch.equal(made.run(a, a)[0], a @ a)
    assert torch.equal(made.run(b, b)[0], b @ b)
    assert made.run(a, b) is None


@needs_kernels
def test_a_failing_step_is_named_and_the_next_call_works() -> None:
    a, b = random(4, 8), random(8, 6)
    good = record(product(operand(2, 4, 6), operand(0, 4, 8), operand(1, 8, 6)), arguments=[a, b])
    bad = record(product(operand(2, 4, 6), operand(0, 4, 8), operand(1, 9, 6)), arguments=[a, b])
    for _ in range(3):
        with pytest.raises(og.OpsgraphError, match=r"^3:LinearProduct.fwd: got error 1 from"):
            bad.run(a, b)
        assert torch.equal(good.run(a, b)[0], a @ b)


@needs_kernels
def test_which_step_failed() -> None:
    stretch = product(operand(2, 4, 6), operand(0, 4, 8), operand(1, 8, 6))
    stretch.names = ["0:A.fwd", "1:B.fwd"]
    with pytest.raises(og.OpsgraphError, match=r"^1:B.fwd: got error 700 from its launch"):
        stretch.fail((700 << 32) + 2)
    with pytest.raises(og.OpsgraphError, match=r"^0:A.fwd: got error -1 "):
        stretch.fail((-1 << 32) + 1)


@needs_kernels
def test_saved_values_are_taken_from_their_list() -> None:
    a, b = random(4, 8), random(8, 6)
    parts = [product(operand(2, 4, 6), operand(0, 4, 8), operand(1, 8, 6))]
    made = record(*parts, arguments=[a, b], saved=1)
    saved = [b]
    assert made.run_if is not None
    assert made.run_if(a[:2], saved) is None
    assert saved == [b], "nothing is done to arguments of another layout"
    assert torch.equal(made.run_if(a, saved)[0], a @ b)
    assert saved == []


@needs_kernels
def test_views_and_none() -> None:
    a, b = random(4, 8), random(8, 6)
    stretch = product(operand(2, 4, 6), operand(0, 4, 8), operand(1, 8, 6))
    stretch.views = [View(3, 2, F32, (6, 4), (1, 6), 0), View(4, 2, F32, (3, 2), (6, 1), 28)]
    made = record(stretch, arguments=[a, b], returned=((2, -1), (3, 4, 9)), ends={9: 2})
    (y, none), (turned, part, view) = made.run(a, b)
    assert none is None
    assert torch.equal(turned, y.t())
    assert torch.equal(part, y[1:, 1:3])
    assert view._is_view()
    assert view.data_ptr() == y.data_ptr()


def test_texts() -> None:
    names: dict[str, Any] = {}
    assert View(3, 1, F32, (2, 3), (3, 1), 8).text(names) == "v3 = view(v1, *view3)"
    small, large = Result(4, (2, 3), F32, CPU), Result(4, (1024, 256), F32, CPU)
    assert small.text("v4", 0, names) is None
    assert large.text("v4", 2, names) == "v4 = kept(*kept2_v4)"
    assert names == {"view3": (F32, (2, 3), (3, 1), 8), "kept2_v4": ((1024, 256), F32)}


@pytest.mark.parametrize("sizes", [(), (3,), (2, 3), (2, 3, 4), (0, 3), (2, 0, 3), (1, 1)])
def test_a_result_is_contiguous(sizes: tuple[int, ...]) -> None:
    assert Result(4, sizes, F32, CPU).layout == (F32, sizes, torch.empty(sizes).stride())


class Gives:
    """A function of a line that gives one result after the other."""

    def __init__(self, *results: Any) -> None:
        self.results = list(results)

    def fwd(self, x: Tensor) -> Any:
        return self.results.pop(0)


def line_of(target: Any) -> Line:
    return Line("Gives.fwd", (value("x0"),), "x1", target=target, note="1 reference")


@needs_kernels
def test_what_python_makes_comes_in_the_layout_that_was_recorded() -> None:
    a, b = random(4, 8), random(8, 6)
    turned = a.t().contiguous().t()
    wide = torch.cat((a, a), 1)[:, :8]
    gives = Gives(a, turned, wide, a)
    python = InPython(line_of(gives), {"x0": 0}, {"x1": 3}, "why")
    python.layouts = {"x1": (F32, (4, 8), (8, 1))}
    buffers = [Buffer(128, CPU, 3), Buffer(192, CPU, 1), Buffer(96, CPU)]
    event = Aten("mm", (operand(2, 4, 6), operand(0, 4, 8), operand(1, 8, 6)))
    stretch = Stretch(
        CPU, [(0, event)], ["2:L.fwd"], [1, 3], [Result(2, (4, 6), F32, CPU)], [],
        {0: 3, 1: 1, 2: 2}, buffers,
    )  # fmt: skip
    made = record(python, stretch, arguments=[a, b], has_ops=True)
    for _ in range(4):
        assert torch.equal(made.run((), a, b)[0], a @ b)
    assert str(python) == "1 Gives.fwd in Python: why"


@pytest.mark.parametrize(
    "given, got",
    [
        (random(4, 7), r"torch.float32 \[4, 7\]"),
        (random(4, 8).double(), r"float64 \[4, 8\]"),
        (None, "None"),
    ],
)
def test_what_python_makes_has_the_shape_that_was_recorded(given: Any, got: str) -> None:
    python = InPython(line_of(Gives(given)), {"x0": 0}, {"x1": 1}, "why")
    python.layouts = {"x1": (F32, (4, 8), (8, 1))}
    with pytest.raises(og.OpsgraphError, match=f"Gives.fwd: x1 is .*{got}, expected .*4, 8"):
        python.run((), [random(4, 8)])


def test_a_line_in_python_alone_holds_what_dies_in_it() -> None:
    seen: list[Any] = []

    class Looks:
        def fwd(self, x: Tensor) -> Any:
            seen.append(weakref.ref(x))
            return x * 2

    python = InPython(
        Line("Looks.fwd", (value("x0"),), "x1", target=Looks(), dead=("x0",)),
        {"x0": 0}, {"x1": 1}, "why",
    )  # fmt: skip
    values = [random(2, 2)]
    python.run((), values)
    assert values == []
    assert seen[0]() is None


class Pair(NamedTuple):
    """What a line may make of tensors."""

    one: Any
    other: Any
    name: Any


def test_a_tuple_of_tensors_is_made_again() -> None:
    built = Build(9, Pair, (4, Build(9, Pair, (5, Constant(None), Constant("x"))), Constant(7)))
    assert built.slots == [4, 5]
    namespace: dict[str, Any] = {}
    assert built.text(namespace) == "v9 = make9(v4, v5)"
    a, b = random(2, 2), random(3)
    made = namespace["make9"](a, b)
    assert made == (a, (b, None, "x"), 7)
    assert type(made) is type(made.other) is Pair


def test_a_view_of_memory_of_another_dtype() -> None:
    memory = torch.zeros(64, dtype=torch.uint8)
    shown = view(memory[16:], torch.float32, (2, 3), (3, 1), 8)
    shown.fill_(1.0)
    assert shown.data_ptr() == memory.data_ptr() + 24
    assert memory.view(torch.float32).tolist() == [0.0] * 6 + [1.0] * 6 + [0.0] * 4


@needs_kernels
def test_records_of_other_sizes_have_one_text() -> None:
    module = og.Sequential(RMSNorm(8), Linear(8, 16), SiLU())
    for rows in (2, 3):
        x = random(rows, 8).requires_grad_()
        for _ in range(3):
            module(x).sum().backward()
    (plan,) = (p for p in module._stages[0].plans.values() if p.specs.training)
    for each in plan.passes[:2]:
        first, second = each.records.values()
        assert first.source == second.source


@needs_kernels
def test_a_text_is_made_for_the_first_replay_and_compiled_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    texts, made = list[str](), list[str]()

    def seen(name: str, source: str, namespace: Any) -> Any:
        made.extend([source] * (name == "replayed"))
        return compiled(name, source, namespace)

    monkeypatch.setattr(records, "compiled", seen)
    module = og.Sequential(RMSNorm(24), Linear(24, 16), SiLU())
    found = list[Any]()
    for rows in (2, 3):
        x = random(rows, 24).requires_grad_()
        for step in range(4):
            y = module(x)
            gradients = torch.autograd.grad(y.sum(), [x, *module.parameters()])
            found.append((y, *gradients))
            texts.append(f"{rows} {step}: {len(made)}")
        assert all(map(torch.equal, found[-1], found[-4]))
    assert texts[:4] == ["2 0: 0", "2 1: 0", "2 2: 2", "2 3: 2"]
    assert texts[4:] == ["3 0: 2", "3 1: 2", "3 2: 4", "3 3: 4"]
    before = guards._code.cache_info().misses
    for source in made:
        guards.compiled("replayed", source, {"fits": None})
    assert guards._code.cache_info().misses == before
    assert len({*made}) == 2
