"""The library that replays: its programs, and that nothing is lost where it cannot be built."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from replays import ROWS, WIDTH, assert_same_bits, build, is_native, leaves, random, step, told

from opsgraph.kernels.cpu import build as library
from opsgraph.replay import native, recording, shim
from opsgraph.replay.recorder import MOST_WORDS, Aten, Kernel, Launch, Operand, Place

needs_kernels = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")
CPU = torch.device("cpu")
X = random(ROWS, WIDTH)


def test_words_of_a_program() -> None:
    def locate(place: Place) -> tuple[int, int]:
        return place.buffer + 100, place.offset

    operand = Operand(Place(3, 8), torch.float32, CPU, (2, 5), (5, 1))
    words = native.program(
        [
            (0, Kernel(77, bytes(24), ((1, Place(1, 4)),))),
            (1, Launch(88, (7, 1, 1), 128, 512, bytes(8), ((0, Place(2, 0)),))),
            (2, Aten("addmm", (operand, None), (0.0, 0.0))),
        ],
        locate, 4096, CPU,
    )  # fmt: skip
    described = [shim.dtype_code(torch.float32), shim.device_code("cpu"), 0, 2, 2, 5, 5, 1]
    assert [*words] == [
        4096, -1,
        native.KERNEL, 0, 14, 77, 0, 0, 0, 0, 0, 3, 1, 1, 101, 4, 0, 0, 0,
        native.LAUNCH, 1, 12, 88, 7, 1, 1, 128, 512, 1, 1, 0, 102, 0, 0,
        native.ATEN, 2, 21, 1, 0, 2, 103, 8, *described, native.NONE, 0, 0, 0, 0, 0, 0, 0,
        native.END,
    ]  # fmt: skip


def test_codes_agree_with_the_librarys_source() -> None:
    source = (Path(library.__file__).parent / "source" / "replay.cpp").read_text()
    names = "END", "KERNEL", "LAUNCH", "ATEN", "MATMUL"
    assert f"enum Opcode : Word {{ {', '.join(names)} }};" in source
    assert [getattr(native, name) for name in names] == [*range(len(names))]
    kinds = ", ".join(kind.upper() for kind in native.KINDS)
    assert f"enum Aten : Word {{ {kinds} }};" in source
    assert f"MOST_WORDS = {MOST_WORDS}," in source
    assert f"NONE = {native.NONE}, ARENA = {native.ARENA};" in source


def test_dtypes_of_the_interface() -> None:
    codes = [shim.dtype_code(dtype) for dtype in (torch.float32, torch.bfloat16, torch.uint8)]
    assert None not in codes
    assert len(set(codes)) == 3
    assert shim.device_code("cpu") != shim.device_code("cuda")


@needs_kernels
def test_where_replays_can_be() -> None:
    assert native.why_not("cpu") is None
    assert native.why_not("meta") == "replays are for CPUs and CUDA, not for meta"
    if not torch.cuda.is_available():
        assert native.why_not("cuda") == "what replays call is not there: no CUDA device"


def test_without_a_compiler_everything_runs_in_python_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here of this library alone; tests/kernels/test_cpu_build.py has no compiler at all."""

    def none(name: str) -> object:
        raise library.BuildError("no C++ compiler: none of c++, g++ and clang++ is found")

    missing = SimpleNamespace(library=none, BuildError=library.BuildError)
    monkeypatch.setattr(native, "build", missing)
    assert stays_in_python() == "no C++ compiler: none of c++, g++ and clang++ is found"


def stays_in_python() -> str:
    """Why the passes of a module do that, which give the right results."""
    native.replay.cache_clear()
    try:
        module, expected = build("llama"), leaves(step(build("llama"), X))
        for _ in range(4):
            assert_same_bits(leaves(step(module, X)), expected)
        texts = told(module.plan(True, X))
    finally:
        native.replay.cache_clear()
    assert texts["forward"] == texts["backward"]
    (text,) = texts["forward"]
    assert text.startswith("in Python: ")
    return text.removeprefix("in Python: ")


@needs_kernels
def test_without_the_interface_everything_runs_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*arguments: object) -> int:
        raise AttributeError("undefined symbol: aoti_torch_cpu_mm_out")

    monkeypatch.setattr(shim, "address", missing)
    reason = "what replays call is not there: undefined symbol: aoti_torch_cpu_mm_out"
    assert stays_in_python() == reason


@needs_kernels
def test_without_tensor_guards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layouts are then compared in Python, at every call."""
    monkeypatch.setattr(recording, "same_layouts", lambda tensors: None)
    module = build("llama")
    inputs = [X, X[:3], X.t().contiguous().t(), X.double()[:0].float(), X]
    expected = [leaves(step(build("llama"), x)) for x in inputs]
    for _ in range(4):
        for x, right in zip(inputs, expected, strict=True):
            assert_same_bits(leaves(step(module, x)), right)
    plan = module.plan(True, X)
    assert is_native(plan)
    assert plan.passes.forward.last is None
    assert sum(record is not None for record in plan.passes.forward.records.values()) == 3
