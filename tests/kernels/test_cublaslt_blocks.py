"""FP8 products with scales of blocks: the library's or Triton's, as was measured; by stubs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from opsgraph.base import backend
from opsgraph.guards.watching import watching
from opsgraph.kernels import choices
from opsgraph.kernels.cublaslt import blocks, scaled_mm
from opsgraph.kernels.cublaslt import library as lt
from opsgraph.kernels.cublaslt import product as products

_CHOICES = blocks._choices
BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2


class Stubs:
    """What was called, by name; which of two is measured to be faster; why Triton cannot."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.fastest, self.reason = blocks.TRITON, ""
        self.missing = False
        """Whether the library has no algorithm."""

    def product(
        self, out: Tensor, a: Tensor, b: Tensor, scales: Any, modes: Any, bias: Any = None,
        fast: bool = False,
    ) -> None:  # fmt: skip
        assert b.shape == (a.size(1), out.size(1))
        assert not fast
        self.called.append(blocks.LIBRARY)
        if self.missing:
            raise lt.CublasError("no algorithm")

    def block_product(self, out: Tensor, *operands: Any) -> None:
        self.called.append(blocks.TRITON)

    def why_not(self, out: Tensor, *operands: Tensor) -> str | None:
        return self.reason or None

    def measure(self, runs: Any) -> str:
        assert [*runs] == [blocks.LIBRARY, blocks.TRITON]
        for run in runs.values():
            run()
        return self.fastest


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch) -> Stubs:
    made = Stubs()
    kept = choices.Choices("blocks", lambda: ("a chip",), made.measure, files=list)
    monkeypatch.setattr(blocks, "_choices", lambda device: kept)
    monkeypatch.setattr(blocks, "_chosen", {})
    monkeypatch.setattr(blocks, "SMALL", 0)
    monkeypatch.setattr(blocks, "product", made.product)
    monkeypatch.setattr(scaled_mm, "product", made.product)
    monkeypatch.setattr(blocks, "block_product", made)
    everywhere = backend.Backend("triton", "a stub")
    monkeypatch.setitem(backend._BACKENDS, "triton", everywhere)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    return made


def multiply(
    rows: int = 256, columns: int = 384, depth: int = 512, of: torch.dtype = E4M3,
    dtype: torch.dtype = BF16, modes: tuple[int, int] = blocks.MODES, bias: Tensor | None = None,
    offset: int = 0,
) -> Tensor:  # fmt: skip
    """offset: bytes from a multiple of 16 to where a begins."""
    a = torch.zeros(rows * depth + offset, dtype=of)[offset:].view(rows, depth)
    b = torch.zeros(columns, depth, dtype=E4M3)
    scales = torch.zeros(depth // 128, rows), torch.zeros(columns // 128, depth // 128)
    left, right = (scaled_mm.Factors(*f) for f in zip((a, b), scales, modes, strict=True))
    return scaled_mm.fp8(left, right, rows, dtype, True, bias)


BOTH = [blocks.LIBRARY, blocks.TRITON]


@pytest.mark.parametrize("fastest", BOTH)
def test_the_faster_one_is_measured_once(stubs: Stubs, fastest: str) -> None:
    stubs.fastest = fastest
    for _ in range(3):
        assert multiply().shape == (256, 384)
    assert stubs.called == [*BOTH, *[fastest] * 3]


def test_a_class_is_of_sizes_dtypes_a_bias_and_alignment(stubs: Stubs) -> None:
    multiply()
    others: list[dict[str, Any]] = [
        {"rows": 260}, {"columns": 512}, {"depth": 640}, {"of": E5M2}, {"dtype": torch.float16},
        {"bias": torch.zeros(384, dtype=BF16)}, {"offset": 8},
    ]  # fmt: skip
    for other in others:
        stubs.called.clear()
        multiply(**other)
        assert stubs.called == [*BOTH, blocks.TRITON]
    assert len(blocks._chosen) == 1 + len(others)


@pytest.mark.parametrize(
    "other",
    [
        {"dtype": torch.float32},
        {"modes": (lt.SQUARE, lt.BLOCK)},
        {"modes": (lt.BLOCK, lt.BLOCK)},
    ],
)
def test_what_is_the_librarys(stubs: Stubs, other: dict[str, Any]) -> None:
    multiply(**other)
    assert stubs.called == [blocks.LIBRARY]


def test_a_small_product_is_not_measured(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "SMALL", 256 * 384 * 512)
    multiply()
    assert stubs.called == [blocks.LIBRARY]
    multiply(rows=260)
    assert stubs.called[1:] == [*BOTH, blocks.TRITON]


def test_what_triton_does_not_take(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    stubs.reason = "it is for sm_90"
    multiply()
    assert stubs.called == [blocks.LIBRARY]
    stubs.reason = ""
    multiply()  # a class is asked for once
    assert stubs.called == [blocks.LIBRARY] * 2
    absent = backend.Backend("triton", "a stub", probe=lambda: "it is not installed")
    monkeypatch.setitem(backend._BACKENDS, "triton", absent)
    monkeypatch.setattr(blocks, "block_product", None)
    multiply(rows=260)
    assert stubs.called == [blocks.LIBRARY] * 3


def test_the_library_stays_where_nothing_can_be_measured(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    recorder = SimpleNamespace(refuse=told.append)
    with monkeypatch.context() as patch:
        patch.setattr(choices, "measurable", lambda: False)
        multiply()
        patch.setattr(watching, "recorder", recorder)
        multiply()
    assert stubs.called == [blocks.LIBRARY] * 2
    assert told == ["what runs fastest is not known yet"]
    multiply()
    assert stubs.called[2:] == [*BOTH, blocks.TRITON]
    with monkeypatch.context() as patch:  # what is known is taken, and may be recorded
        patch.setattr(choices, "measurable", lambda: False)
        patch.setattr(watching, "recorder", recorder)
        multiply()
        patch.setattr(blocks, "_chosen", {})  # known from the disk
        multiply()
    assert stubs.called[5:] == [blocks.TRITON] * 2
    assert len(told) == 1


def test_without_memory_to_measure_in_the_library_multiplies(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(runs: Any) -> str:
        raise torch.OutOfMemoryError

    kept = choices.Choices("blocks", lambda: ("a chip",), full, files=list)
    monkeypatch.setattr(blocks, "_choices", lambda device: kept)
    multiply()
    assert stubs.called == [blocks.LIBRARY]


def test_a_library_without_an_algorithm_is_an_error(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of all its products: PyTorch multiplies then."""
    stubs.missing = True
    for _ in range(2):
        with pytest.raises(lt.CublasError, match="no algorithm"):
            multiply()
    assert not blocks._chosen


def test_what_does_not_run_is_not_taken(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*operands: Any) -> None:
        raise RuntimeError("out of resources")

    def last(runs: Any) -> str:
        return [*runs][-1]

    monkeypatch.setattr(stubs, "block_product", broken)
    monkeypatch.setattr(products, "fastest_on_cuda", last)
    kept = choices.Choices("blocks", lambda: ("a chip",), products._measured, files=list)
    monkeypatch.setattr(blocks, "_choices", lambda device: kept)
    multiply()
    assert stubs.called == [blocks.LIBRARY] * 2  # tried, and then taken


def test_choices_are_kept_and_forgotten(
    stubs: Stubs, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """On disk, for the versions of the library and of Triton; in memory too."""
    pytest.importorskip("triton")
    monkeypatch.setattr(choices, "directories", lambda: [tmp_path])
    monkeypatch.setattr(choices, "gpu", lambda device: ("a chip of this test",))
    monkeypatch.setattr(lt, "library", lambda: SimpleNamespace(cublasLtGetVersion=lambda: 130000))
    monkeypatch.setattr(products, "_measured", stubs.measure)
    monkeypatch.setattr(blocks, "_choices", _CHOICES.__wrapped__)
    multiply()
    (kept,) = choices.kept()
    assert kept.kind == "blocks"
    assert kept.machine[:2] == ("a chip of this test", "cublasLt 130000")
    assert kept.machine[2].startswith("triton ")
    assert [choice.name for choice in kept.choices.values()] == [blocks.TRITON]
    assert _CHOICES.__wrapped__(0).forget() == 1
    assert not blocks._chosen
    stubs.fastest = blocks.LIBRARY
    stubs.called.clear()
    multiply()
    assert stubs.called == [*BOTH, blocks.LIBRARY]
