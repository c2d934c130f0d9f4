"""What the recorder notes of a line, and what it does not know and therefore refuses."""

import os
import threading
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from replays import random
from torch import Tensor

from opsgraph.guards.torch_private import dispatch_modes, mode_flags
from opsgraph.guards.watching import watching
from opsgraph.kernels.cpu import build as library
from opsgraph.kernels.cpu import memory
from opsgraph.kernels.cpu.norms import norm_forward
from opsgraph.replay import recorder
from opsgraph.replay.recorder import MOST_WORDS, Aten, Buffer, Kernel, Place, Recorder, span

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")


def watch(call: Callable[..., Any], *arguments: Tensor) -> tuple[Recorder, Any, Any]:
    """A recorder that knows the arguments and saw the call; its events; why it has none."""
    recorder = Recorder(len(arguments))
    for k, argument in enumerate(arguments):
        recorder.argument(k, argument)
    with recorder:
        recorder.kept = call(*arguments)  # type: ignore[attr-defined]
    return recorder, *recorder.take()


def test_span() -> None:
    assert span(torch.empty(3, 4)) == 48
    assert span(torch.empty(3, 8)[:, 2:4]) == 4 * (2 * 8 + 2)
    assert span(torch.ones(()).expand(5, 6)) == 4
    assert span(torch.empty(0, 4)) == 0
    assert span(torch.empty(3, 4, dtype=torch.bfloat16).t()) == 24


def test_products_and_what_they_read() -> None:
    a, b = random(4, 8), random(8, 6)
    recorder, events, reason = watch(torch.mm, a[:, 2:], b[2:])
    assert reason is None
    (event,) = events
    assert (event.kind, [o.place for o in event.operands]) == (
        "mm", [Place(2, 0), Place(0, 0), Place(1, 0)],
    )  # fmt: skip
    assert event.operands[1].sizes == (4, 6)
    assert event.operands[1].strides == (8, 1)
    assert recorder.buffers[2] == Buffer(4 * 6 * 4, CPU)
    assert recorder.buffers[0].argument == 0


@pytest.mark.parametrize(
    "call, kinds",
    [
        (lambda x: x.t().reshape(-1), ["copy"]),
        (lambda x: x.clone(), ["copy"]),
        (lambda x: x.to(torch.bfloat16), ["copy"]),
        (lambda x: torch.zeros(3, 4), ["zero"]),
        (lambda x: torch.zeros_like(x).zero_(), ["zero", "zero"]),
        (lambda x: torch.empty_like(x).copy_(x), ["copy"]),
        (lambda x: x.new_empty(4, 4).copy_(x[:1]), ["copy"]),
        (lambda x: torch.addmm(x, x, x, beta=0.5, alpha=2), ["addmm"]),
        (lambda x: torch.mm(x, x, out=torch.empty(4, 4)), ["mm"]),
        (lambda x: torch.bmm(x[None], x[None]), ["bmm"]),
        (lambda x: x.t().view(4, 4)[1:].unsqueeze(0).detach().expand(2, 3, 4), []),
    ],
)
def test_ops_that_replays_know(call: Callable[[Tensor], Tensor], kinds: list[str]) -> None:
    _, events, reason = watch(call, random(4, 4))
    assert reason is None
    assert [event.kind for event in events] == kinds


def test_scalars() -> None:
    _, (event,), _ = watch(lambda x: torch.addmm(x, x, x, beta=0.5, alpha=2), random(4, 4))
    assert event.scalars == (0.5, 2.0)


@pytest.mark.parametrize(
    "call, reason",
    [
        (lambda x: x + 1, "aten.add.Tensor: replays do not know it"),
        (lambda x: x.sum().item(), "aten.sum.default: replays do not know it"),
        (lambda x: x[0, 0].item(), "aten._local_scalar_dense.default: replays do not know it"),
        (lambda x: bool(x[0, 0] > 0), "aten.gt.Scalar: replays do not know it"),
        (lambda x: torch.rand(3), "aten.rand.default: replays do not know it"),
        (lambda x: x.copy_(x.clone()), "aten.copy_.default: it writes to what it was handed"),
        (lambda x: x.zero_(), "aten.zero_.default: it writes to what it was handed"),
        (lambda x: torch.mm(x, x, out=x.t()), "aten.mm.out: it writes to what it was handed"),
        (lambda x: x[:0].clone(), "aten.clone.default: an operand is empty"),
        (lambda x: torch.mm(OTHER, x), "aten.mm.default: it reads memory that no value"),
        (lambda x: torch.mm(x, x + 1), "aten.add.Tensor: replays do not know it"),
    ],
)
def test_what_is_refused(call: Callable[[Tensor], Any], reason: str) -> None:
    _, events, found = watch(call, random(4, 4))
    assert events == []
    assert found is not None
    assert found.startswith(reason)


OTHER = random(4, 4)


def test_the_first_reason_stays() -> None:
    _, _, reason = watch(lambda x: (x.sin(), x.cos()), random(2, 2))
    assert reason == "aten.sin.default: replays do not know it"


def test_operands_of_a_line_that_stays_in_python_are_not_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = list[Any]()
    monkeypatch.setattr(Recorder, "_operand", lambda self, tensor: looked.append(tensor))
    _, events, reason = watch(lambda x: torch.mm(x * x.sum().item(), x), random(4, 4))
    assert (events, looked) == ([], [])
    assert reason is not None


def test_a_kernel_of_more_words_than_the_library_has_room_for_is_refused() -> None:
    recorder = Recorder()
    for words, reason in (
        (MOST_WORDS, None),
        (MOST_WORDS + 1, "a kernel takes more than 96 words"),
    ):
        with recorder:
            recorder.kernel(1, bytes(8 * words), ())
        events, told = recorder.take()
        assert (len(events), told) == (reason is None, reason)


def test_memory_that_is_given_out_again_is_a_buffer_of_its_own() -> None:
    storage = torch.UntypedStorage(64)

    def call(x: Tensor) -> Tensor:
        for _ in range(2):
            made = torch.empty(0).set_(storage, 0, (4, 4))  # type: ignore[call-overload]
            torch.mm(x, x, out=made)
        return made

    recorder, (one, other), _ = watch(call, random(4, 4))
    assert one.operands[0].place == Place(1, 0)
    assert other.operands[0].place == Place(2, 0)
    assert recorder.find(storage.data_ptr()) == Place(2, 0)


@pytest.mark.parametrize("arguments", [1, 8])
def test_places_are_those_that_a_look_at_all_buffers_finds(arguments: int) -> None:
    draw, memory = Random(0), bytearray(600)
    recorder, there = Recorder(arguments), dict[int, range]()
    base = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    for number in range(60):
        start, size = draw.randrange(500), draw.choice((1, 5, 20, 100))
        tensor = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=size)
        if number < arguments:  # arguments, which may share memory
            recorder.argument(number, tensor)
        else:
            recorder.allocated(tensor)
            over = range(start, start + size)
            there = {n: r for n, r in there.items() if r.stop <= start or over.stop <= r.start}
        there[number] = range(start, start + size)
        for address in range(600):
            having = [n for n, r in there.items() if address in r]
            if len({there[n].start for n in having}) == 1 and (
                len(having) == 1 or number < arguments
            ):
                place = Place(having[0], address - there[having[0]].start)
                assert recorder.find(base + address) == place
            else:
                assert recorder.find(base + address) is None


def test_values_that_share_memory_are_told_apart_by_what_a_line_reads() -> None:
    x, recorder = random(4, 4), Recorder(2)
    assert recorder.argument(0, x) == Place(0, 0)
    assert recorder.argument(1, x[1:]) == Place(1, 0)
    address = x[2:].data_ptr()
    assert recorder.find(x.data_ptr()) == Place(0, 0), "only one is there"
    assert recorder.find(address) is None
    for reading, place in ({0}, Place(0, 32)), ({1, 7}, Place(1, 16)), ({0, 1}, None):
        recorder.reading = reading
        assert recorder.find(address) == place


def test_one_tensor_given_twice_has_to_be_so_in_replays() -> None:
    x, recorder = random(4, 4), Recorder(3)
    places = [recorder.argument(k, x) for k in range(4)]
    recorder.reading = {1, 2}
    assert recorder.find(x.data_ptr()) == places[1]
    assert recorder.shared == {(1, 2)}
    recorder.reading = {2, 3}
    assert recorder.find(x.data_ptr()) is None, "the last one is no argument"


def test_what_a_line_in_python_allocates_is_no_buffer() -> None:
    recorder, _, reason = watch(lambda x: torch.mm(x, x).sin_(), random(4, 4))
    assert reason is not None
    assert recorder.find(recorder.kept.data_ptr()) is None  # type: ignore[attr-defined]


@needs_kernels
def test_kernels_tell_of_themselves() -> None:
    x, weight = random(4, 8), random(8)
    recorder, events, reason = watch(lambda x, w: norm_forward(x, w, None, 1e-5, False), x, weight)
    assert reason is None
    assert {type(event) for event in events} == {Kernel}
    (event,) = events
    buffers = {place.buffer for _, place in event.places}
    assert {0, 1} < buffers
    assert len(event.words) % 8 == 0
    for word, place in event.places:
        start = int.from_bytes(event.words[8 * word : 8 * word + 8], "little")
        assert recorder.find(start) == place


@needs_kernels
def test_what_overwrites_what_it_alone_holds_is_refused() -> None:
    made: list[bool] = []
    _, _, reason = watch(lambda x: made.append(memory.ours(x)), random(4, 4))
    assert reason == "it overwrites what nobody else holds"
    assert made == [False]


def test_kernels_have_nothing_to_hide_from_a_recorder() -> None:
    before = dispatch_modes()
    with Recorder(0) as recorder:
        assert watching.recorder is recorder
        assert dispatch_modes() == before
    assert watching.recorder is None
    assert dispatch_modes() == before


def test_a_line_that_fails_leaves_no_recorder() -> None:
    with pytest.raises(RuntimeError):
        watch(lambda x: torch.mm(x, x), random(3, 4))
    assert watching.recorder is None
    assert watching.modes == 0
    assert isinstance(watch(lambda x: x.clone(), random(2, 2))[1][0], Aten)


def test_recorders_of_two_threads_leave_torch_compile_on() -> None:
    """PyTorch's modes set flags of the process, and the last to end has seen the other's."""
    before, entered, left = mode_flags(), threading.Event(), threading.Event()

    def other() -> None:
        with Recorder():
            entered.set()
            left.wait(60)

    thread = threading.Thread(target=other)
    with Recorder():
        thread.start()
        assert entered.wait(60)
        assert mode_flags() != before
    left.set()
    thread.join()
    assert mode_flags() == before
    count = 0

    def backend(graph: torch.fx.GraphModule, examples: list[Tensor]) -> Callable[..., Any]:
        nonlocal count
        count += 1
        return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(2))
    assert count == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_has_no_recorder_of_another_thread() -> None:
    """Nor is a lock held for ever there that another thread held."""
    before, entered, left = mode_flags(), threading.Event(), threading.Event()

    def other() -> None:
        with Recorder(), recorder._turn:
            entered.set()
            left.wait(60)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(60)
    child = os.fork()
    if not child:
        free = recorder._turn.acquire(timeout=10)
        os._exit(0 if free and mode_flags() == before else 1)
    left.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0
