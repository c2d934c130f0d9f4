"""`launch` takes the kernel that Triton would take, for every trait that kernels are compiled for.

A driver that compiles for sm_90 and launches nothing stands in for a GPU's.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from opsgraph.kernels.triton import launch as launching
from opsgraph.kernels.triton.launch import ceil_div, launch


@triton.jit(do_not_specialize=["count"])
def scale_kernel(x, y, count, factor, stride, BLOCK: tl.constexpr, SQUARE: tl.constexpr = True):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at * stride, at < count) * factor
    if SQUARE:
        value *= value
    if y is not None:
        tl.store(y + at, value, at < count)


class Driver:
    """What Triton asks of a driver, without a device; remembers what was launched."""

    def __init__(self) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self.utils = self

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, *_: Any) -> tuple[object, object, int, int, int]:
        return object(), object(), 32, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        signature = tuple(source.signature.values()), tuple(source.attrs)

        def run(*args: Any) -> None:
            grid, operands = args[:3], args[9:]
            self.launched.append((signature, source.constants, grid, operands))

        return run


@triton.jit(do_not_specialize=["rows"])
def described_kernel(x, y, rows, WIDTH: tl.constexpr):
    """Needs scratch memory for the descriptors that it makes."""
    first = tl.make_tensor_descriptor(x, [rows, WIDTH], [WIDTH, 1], [8, WIDTH])
    second = tl.make_tensor_descriptor(y, [rows, WIDTH], [WIDTH, 1], [8, WIDTH])
    second.store([tl.program_id(0) * 8, 0], first.load([tl.program_id(0) * 8, 0]))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(launching, "_launchable", {})
    monkeypatch.setattr(driver, "_active", made)
    return made


def calls() -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments that differ in every trait."""
    plain = torch.zeros(64)
    for x, y, count, stride, square in itertools.product(
        (plain, plain[1:], plain.bfloat16()), (plain, None), (5, 2**31), (1, 16, 3), (False, True)
    ):
        yield (x, y, count, 0.5, stride), {"SQUARE": square, "BLOCK": 16, "num_warps": 2}


def test_launches_are_those_of_triton(device: Driver) -> None:
    chosen = list(calls())[::5]
    expected = []
    for operands, constants in chosen:
        scale_kernel[(2,)](*operands, **constants)
        expected.append(device.launched[-1])
    assert len({str(signature) + str(given) for signature, given, *_ in expected}) > 9
    for _ in range(2):
        device.launched.clear()
        for operands, constants in chosen:
            launch(scale_kernel, (2,), *operands, **constants)
        for found, wanted in zip(device.launched, expected, strict=True):
            assert found[:3] == wanted[:3]
            assert all(map(lambda a, b: a is b or a == b, found[3], wanted[3]))


def test_second_launch_does_not_ask_triton(device: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(64)
    launch(scale_kernel, (1, 1), x, None, 5, 0.5, 3, BLOCK=16, SQUARE=True)
    monkeypatch.setattr(scale_kernel, "run", None)
    launch(scale_kernel, (3, 2), x, None, 7, 0.25, 5, BLOCK=16, SQUARE=True)
    assert device.launched[-1][2] == (3, 2, 1)
    assert device.launched[-1][3][2:] == (7, 0.25, 5, 16, True)
    with pytest.raises(TypeError):  # another trait: a stride that 16 divides
        launch(scale_kernel, (1,), x, None, 7, 0.25, 32, BLOCK=16, SQUARE=True)


def test_a_constant_that_is_left_out_has_its_default(device: Driver) -> None:
    for square in ({}, {"SQUARE": False}):
        for _ in range(2):
            launch(scale_kernel, (1,), torch.zeros(64), None, 5, 0.5, 3, BLOCK=32, **square)
            assert device.launched[-1][3][-1] is not bool(square)


@pytest.mark.parametrize(("size", "block", "blocks"), [(0, 4, 0), (1, 4, 1), (8, 4, 2), (9, 4, 3)])
def test_ceil_div(size: int, block: int, blocks: int) -> None:
    assert ceil_div(size, block) == blocks


class Noting:
    """A recorder that notes launches."""

    def __init__(self) -> None:
        self.refused: list[str] = []
        self.launches: list[tuple[Any, ...]] = []

    def refuse(self, reason: str) -> None:
        self.refused.append(reason)

    def launch(self, *noted: Any) -> None:
        self.launches.append(noted)


@pytest.mark.skipif(not hasattr(tl, "make_tensor_descriptor"), reason="an older Triton")
def test_descriptors_get_scratch_that_recorders_know(
    device: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each launch its own: the parameter after the kernel's. An allocator that is set stays."""
    asked: list[int] = []
    triton.set_allocator(lambda size, *_: asked.append(size))
    made: list[torch.Tensor] = []
    empty = launching._bytes

    def noted(size: int, where: torch.device) -> torch.Tensor:
        made.append(empty(size, where))
        return made[-1]

    monkeypatch.setattr(launching, "_bytes", noted)
    x, y = torch.zeros(16, 64), torch.zeros(16, 64)
    recorder = Noting()
    monkeypatch.setattr(launching.watching, "recorder", recorder)
    for _ in range(3):
        launch(described_kernel, (2,), x, y, 16, WIDTH=64, num_warps=4)
    assert len(device.launched) == 3
    assert recorder.refused == ["a kernel was compiled, or is interpreted"]
    assert [scratch.numel() for scratch in made] == [2 * 2 * 128] * 2
    for noted_launch, scratch in zip(recorder.launches, made, strict=True):
        *_, words, addresses = noted_launch
        assert len(words) == 8 * 5
        assert addresses == [(0, x.data_ptr()), (1, y.data_ptr()), (3, scratch.data_ptr())]
    launch_allocator = triton.runtime._allocation._allocator.get()
    launch_allocator(7, 128, 0)
    assert asked == [7]
