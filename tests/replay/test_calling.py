"""Native calls with tensors as they are, and what stands in for them in Python."""

import ctypes
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from replays import ROWS, WIDTH, assert_same_bits, build, is_native, random, replaying, step
from torch import Tensor

import opsgraph as og
from opsgraph.guards import torch_private
from opsgraph.kernels.cpu import build as library
from opsgraph.ops.joined import Joined
from opsgraph.replay import calling, native

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")


@pytest.fixture(params=[True, False], ids=["native", "Python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Both ways; the second is that of a PyTorch that does not tell C where tensors begin."""
    if not request.param:
        monkeypatch.setattr(calling, "begins", None)
    calling.bits.cache_clear()
    yield request.param
    calling.bits.cache_clear()


def test_the_low_bits_of_tensors(way: bool) -> None:
    x = torch.zeros(64, dtype=torch.uint8)
    start = x.data_ptr() % calling.PAGE
    bits = calling.bits()
    assert bits(x) == start
    assert bits(x, x[1:]) == start | (x[1:].data_ptr() % calling.PAGE)
    assert bits(*[x] * 100) == start, "more than the library has room for without asking"
    assert bits(x, torch.zeros(0)) == -1, "it begins nowhere"
    assert ("builtin" in type(bits).__name__) is way


def test_launches_are_of_tensors_that_begin_where_they_may(way: bool) -> None:
    words = native.program([], lambda place: (0, 0), 0, torch.device("cpu"))
    launch, x = calling.launcher(words, [15, 0], "cpu"), torch.zeros(64)
    x = x[-x.data_ptr() // 4 % 4 :]
    assert launch(0, x, x) == 0
    assert launch(0, x[4:], x[1:]) == 0
    assert launch(0, x[1:], x) == -1
    assert launch(0, x, torch.zeros(0)) == -1
    with pytest.raises(RuntimeError):
        launch(0, x, torch.eye(3).to_sparse())
    assert ("builtin" in type(launch).__name__) is way


def test_a_tensor_without_memory_is_an_error(way: bool) -> None:
    with pytest.raises(RuntimeError):
        calling.bits()(torch.eye(3).to_sparse())


def test_threads_that_make_a_function_at_once_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPython keeps its address: where the first that was made is freed, a call of it crashes."""
    monkeypatch.setattr(calling, "_methods", {})
    both, find = threading.Barrier(2, timeout=60), library.library

    def slowly(name: str) -> ctypes.CDLL:
        both.wait()
        return find(name)

    monkeypatch.setattr(library, "library", slowly)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(calling._method, ["opsgraph_bits"] * 2)
    assert first is second


def test_where_a_tensor_is_held_is_not_known_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calling, "held", None)
    x = torch.zeros(8)
    short, unmoved = calling.short([(4, 8 * 4)]), calling.unmoved(*held())
    assert not short(x)
    x.untyped_storage().resize_(8 * 4 - 1)
    assert short(x)
    assert unmoved()
    assert not any("builtin" in type(each).__name__ for each in (short, unmoved))


def test_a_parameter_holds_its_tensor_where_others_do() -> None:
    assert torch_private.held is not None
    for x in torch.zeros(3), torch.nn.Parameter(torch.zeros(3)), torch.zeros(3).as_subclass(Joined):
        assert ctypes.c_int64.from_address(id(x) + torch_private.held).value == x._cdata


def test_a_pass_may_have_any_number_of_tensors(way: bool) -> None:
    x = random(2, 8).requires_grad_()
    module = og.Sequential(*[og.ops.Linear(8, 8, bias=False) for _ in range(70)])
    with replaying(False):
        expected = step(module, x)
    with replaying(True):
        for _ in range(4):
            assert_same_bits(step(module, x), expected)
        assert is_native(module.plan(True, x))


def test_steps_have_the_same_bits(way: bool) -> None:
    module, other = build("llama", torch.float32), build("llama", torch.float32)
    x = random(ROWS, WIDTH).requires_grad_()
    with replaying(False):
        expected = step(other, x)
    with replaying(True):
        for _ in range(4):
            assert_same_bits(step(module, x), expected)
        assert is_native(module.plan(True, x))


@pytest.mark.parametrize("offset", [0, 3])
def test_a_storage_that_ends_before_its_tensor_is_seen(way: bool, offset: int) -> None:
    x, y = torch.zeros(8), torch.zeros(11)[offset:]
    short = calling.short([(4, 8 * 4), (4, 8 * 4)])
    assert not short(x, y)
    y.untyped_storage().resize_((8 + offset) * 4)
    assert not short(x, y)
    y.untyped_storage().resize_((8 + offset) * 4 - 1)
    assert short(x, y)
    y.untyped_storage().resize_(0)
    assert short(x, y)
    with pytest.raises(RuntimeError):
        short(x, torch.eye(3).to_sparse())
    assert ("builtin" in type(short).__name__) is way


def held() -> tuple[list[dict[str, object]], tuple[str, str], list[Tensor]]:
    """Two modules with two buffers each: their dicts, the names, the tensors."""
    modules = [torch.nn.Module() for _ in range(2)]
    for module in modules:
        for name in ("scale", "seen"):
            module.register_buffer(name, torch.zeros(3))
    names = "scale", "seen"
    buffers = [module._buffers[name] for module in modules for name in names]
    return [module.__dict__ for module in modules], names, buffers  # type: ignore[return-value]


def another(host: dict[str, object], buffer: Tensor) -> None:
    host["_buffers"]["seen"] = buffer.clone()  # type: ignore[index]


def elsewhere(host: dict[str, object], buffer: Tensor) -> None:
    buffer.data = buffer.clone()


def missing(host: dict[str, object], buffer: Tensor) -> None:
    del host["_buffers"]["seen"]  # type: ignore[attr-defined]


def freed(host: dict[str, object], buffer: Tensor) -> None:
    buffer.untyped_storage().resize_(0)


def cut(host: dict[str, object], buffer: Tensor) -> None:
    buffer.resize_(2)


@pytest.mark.parametrize("change", [another, elsewhere, missing, freed, cut])
@pytest.mark.parametrize("which", [0, 1])
def test_what_moved_is_seen(way: bool, which: int, change: object) -> None:
    hosts, names, buffers = held()
    unmoved = calling.unmoved(hosts, names, buffers)
    assert unmoved()
    assert unmoved()
    change(hosts[which], buffers[2 * which + 1])  # type: ignore[operator]
    assert not unmoved()
    assert ("builtin" in type(unmoved).__name__) is way
