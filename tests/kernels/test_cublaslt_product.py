"""Products through cublasLt: what is told to the library, once for a class, and what is chosen."""

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from opsgraph.guards.watching import watching
from opsgraph.kernels import choices
from opsgraph.kernels.cublaslt import gemm
from opsgraph.kernels.cublaslt import library as lt
from opsgraph.kernels.cublaslt import product as products

_CHOICES = products._choices
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def last(candidates: Any) -> str:
    """A measurement by which the last one is the fastest; all have run."""
    for run in candidates.values():
        run()
    return [*candidates][-1]


def value(pointer: Any, size: int) -> int:
    """The number at an address, given as an int or by reference."""
    address = pointer if isinstance(pointer, int) else ctypes.addressof(pointer._obj)
    return int.from_bytes(ctypes.string_at(address, size), "little", signed=True)


class Fake:
    """A library with a number of algorithms that notes what it is told."""

    def __init__(self, algorithms: int = 3) -> None:
        self.algorithms = algorithms
        self.layouts: list[tuple[int, ...]] = []
        self.set: list[tuple[str, int, int]] = []
        self.calls: list[tuple[int, ...]] = []
        self.status = self.needs = 0
        """What products return, and the workspace that a checked algorithm takes."""

    def cublasLtGetVersion(self) -> int:
        return 130000

    def cublasLtCreate(self, made: Any) -> int:
        made._obj.value = 1
        return 0

    def cublasLtMatmulDescInit_internal(self, words: Any, size: int, *kinds: int) -> int:
        return 0 if size >= 256 else 3

    def cublasLtMatrixLayoutCreate(self, made: Any, *numbers: int) -> int:
        self.layouts.append(numbers)
        made._obj.value = len(self.layouts)
        return 0

    def cublasLtMatmulPreferenceCreate(self, made: Any) -> int:
        return 0

    def cublasLtMatmulPreferenceDestroy(self, made: int) -> int:
        return 0

    def cublasLtMatmulDescSetAttribute(self, it: int, key: int, at: Any, size: int) -> int:
        self.set.append(("description", key, value(at, size)))
        return 0

    def cublasLtMatmulPreferenceSetAttribute(self, it: int, key: int, at: Any, size: int) -> int:
        self.set.append(("preference", key, value(at, size)))
        return 0

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments: Any) -> int:
        found = (lt.Algorithm * self.algorithms).from_address(arguments[8])
        for k, each in enumerate(found):
            each.words[0] = k
        arguments[9]._obj.value = self.algorithms
        return 0

    def cublasLtMatmulAlgoCheck(self, *arguments: Any) -> int:
        algorithm = lt.Algorithm.from_address(arguments[6])
        lt.Algorithm.from_address(arguments[7]).workspace = self.needs
        return 0 if algorithm.words[0] < self.algorithms else 7

    def cublasLtMatmul(self, *arguments: Any) -> int:
        algorithm = lt.Algorithm.from_address(arguments[12])
        self.calls.append((algorithm.words[0], *arguments))
        return self.status

    def attribute(self, key: int, kind: str = "description") -> int | None:
        """The last value of one."""
        return next((v for k, a, v in reversed(self.set) if (k, a) == (kind, key)), None)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setattr(lt, "library", lambda: made)
    monkeypatch.setattr(lt, "handle", lambda device: 1)
    monkeypatch.setattr(products, "_products", {})
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(products, "SMALL", 0)
    kept = choices.Choices("product", lambda: ("a chip",), last, files=list)
    monkeypatch.setattr(products, "_choices", lambda device: kept)
    return made


def operands(m: int = 32, n: int = 48, k: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    out, a, b = (torch.zeros(sizes, dtype=BF16) for sizes in ((m, n), (m, k), (n, k)))
    return out, a, b.t()


def test_the_transpose_is_computed(fake: Fake) -> None:
    out, a, b = operands()
    products.product(out, a, b)
    assert fake.layouts == [(14, 64, 48, 64), (14, 64, 32, 64), (14, 48, 32, 48)]
    assert fake.attribute(lt.TRANSPOSE_A) == 1
    assert fake.attribute(lt.TRANSPOSE_B) == 0
    (_, _, _, _, first, _, second, *_), *_ = fake.calls
    assert (first, second) == (b.data_ptr(), a.data_ptr())


def test_a_class_is_described_once(fake: Fake) -> None:
    out, a, b = operands()
    products.product(out, a, b)
    told = len(fake.set)
    products.product(out.clone(), a.clone(), b)
    assert len(fake.set) == told
    assert [call[0] for call in fake.calls] == [0, 1, 2, 2, 2]  # three are tried
    products.product(out.float(), a, b)
    assert len(fake.set) > told


FIRST, NONE = "00" * 64, "09" + "00" * 63
"""The words of the first algorithm, and those of one that the fake library does not know."""


@pytest.mark.parametrize(
    ("name", "needs"),
    [("nonsense", 0), ("0 00", 0), (f"0 {NONE}", 0), (f"{2**26} {FIRST}", 0), (f"0 {FIRST}", 1)],
)
def test_a_remembered_name_that_names_no_algorithm_for_a_product(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, name: str, needs: int
) -> None:
    fake.needs = needs
    monkeypatch.setattr(choices.Choices, "known", lambda self, key: name)
    products.product(*operands())
    assert [call[0] for call in fake.calls] == [0, 1, 2, 2]  # three are tried, the last is taken


def test_parts_of_the_depth_are_added_in_fp32(fake: Fake) -> None:
    products.product(*operands())
    assert fake.attribute(lt.REDUCTIONS, "preference") == lt.IN_FP32
    assert fake.attribute(lt.ALIGNMENTS[0], "preference") == 16


def test_addresses_that_are_no_multiples_of_16(fake: Fake) -> None:
    out, a, b = operands()
    moved = torch.zeros(a.numel() + 2, dtype=BF16)[2:].view_as(a)
    products.product(out, moved, b)
    assert fake.attribute(lt.ALIGNMENTS[0], "preference") == 4


def test_scales_and_bias_are_addresses_of_each_call(fake: Fake) -> None:
    out, a, b = operands()
    left, right = a.to(FP8), b.t().to(FP8).t()
    scales = torch.ones(()), torch.ones(())
    bias = torch.zeros(48, dtype=BF16)
    products.product(out, left, right, scales, bias=bias, fast=True)
    assert fake.attribute(lt.SCALE_A) == scales[1].data_ptr()
    assert fake.attribute(lt.SCALE_B) == scales[0].data_ptr()
    assert fake.attribute(lt.BIAS) == bias.data_ptr()
    assert fake.attribute(lt.EPILOGUE) == lt.WITH_BIAS
    assert fake.attribute(lt.FAST_ACCUM) == 1
    assert fake.attribute(lt.MODE_A) is None
    told = len(fake.set)
    products.product(out, left, right, scales[::-1], bias=bias, fast=True)
    assert fake.set[told:] == [
        ("description", lt.SCALE_A, scales[0].data_ptr()),
        ("description", lt.SCALE_B, scales[1].data_ptr()),
    ]


def test_modes_of_scales_are_those_of_the_librarys_operands(fake: Fake) -> None:
    out, a, b = operands()
    scales = torch.ones(1, 32), torch.ones(1, 4)
    left, right = a.to(FP8), b.t().to(FP8).t()
    products.product(out, left, right, scales, (lt.BLOCK, lt.SQUARE))
    assert (fake.attribute(lt.MODE_A), fake.attribute(lt.MODE_B)) == (lt.SQUARE, lt.BLOCK)


def test_what_is_added_is_an_operand(fake: Fake) -> None:
    out, a, b = operands()
    products.product(out, a, b, c=out)
    call = fake.calls[-1]
    assert ctypes.c_float.from_address(call[8]).value == 1
    assert call[9] == call[11] == out.data_ptr()


def test_what_is_added_to_is_tried_on_as_much_memory(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the result may be further apart than they are long."""
    _, a, b = operands()
    out = torch.zeros(32, 96, dtype=BF16)[:, :48]
    tried = []

    def measured(key: str, made: Any, given: Any) -> lt.Algorithm:
        tried.append(given[0])
        return made.algorithms[0]  # type: ignore[no-any-return]

    monkeypatch.setattr(products, "_chosen", measured)
    products.product(out, a, b, c=out)
    (scratch,) = tried
    assert scratch.stride() == out.stride()
    assert scratch.data_ptr() != out.data_ptr()


def test_without_memory_to_measure_in_the_first_is_taken(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(candidates: Any) -> str:
        raise torch.OutOfMemoryError

    kept = choices.Choices("product", lambda: ("a chip",), full, files=list)
    monkeypatch.setattr(products, "_choices", lambda device: kept)
    products.product(*operands())
    assert [call[0] for call in fake.calls] == [0]


def test_an_activation_without_the_library() -> None:
    a, b, bias, other = (torch.randn(sizes) for sizes in ((8, 16), (16, 4), (4,), (8, 4)))
    for one, two in ((None, None), (bias, None), (None, other), (bias, other)):
        plain = gemm.matmul(a, b, one, two, 0.5)
        got = gemm.matmul(a, b, one, two, 0.5, "relu")
        torch.testing.assert_close(got, plain.relu())


def test_while_capturing_the_first_is_taken(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    out, a, b = operands()
    with monkeypatch.context() as patch:
        patch.setattr(choices, "measurable", lambda: False)
        products.product(out, a, b)
    assert [call[0] for call in fake.calls] == [0]
    products.product(out, a, b)
    assert [call[0] for call in fake.calls] == [0, 0, 1, 2, 2]


def test_what_is_not_chosen_yet_is_not_replayed(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    told = []

    class Noting:
        def refuse(self, reason: str) -> None:
            told.append(reason)

        def product(self, made: Any, *addresses: Any) -> None:
            told.append(made)

    given = operands()
    with monkeypatch.context() as patch:
        patch.setattr(choices, "measurable", lambda: False)
        patch.setattr(watching, "recorder", Noting())
        products.product(*given)
    assert told == ["what runs fastest is not known yet"]
    products.product(*given)
    with monkeypatch.context() as patch:
        patch.setattr(watching, "recorder", Noting())
        products.product(*given)
    assert told[1:] == [*products._products.values()]


def test_a_choice_that_is_known_is_not_asked_for(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    products.product(*operands())
    fake.calls.clear()
    monkeypatch.setattr(products, "_products", {})  # as in another process
    monkeypatch.setattr(fake, "cublasLtMatmulAlgoGetHeuristic", None)
    products.product(*operands())
    assert [call[0] for call in fake.calls] == [2]


def test_a_small_product_is_not_measured(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "SMALL", 32 * 48 * 64)
    products.product(*operands())
    assert [call[0] for call in fake.calls] == [0]


def test_names_of_algorithms() -> None:
    made = lt.Algorithm(workspace=12)
    made.words[:] = [2**64 - 1 - k for k in range(8)]
    again = lt.Algorithm.of(made.name)
    assert again.workspace == 12
    assert bytes(again.words) == bytes(made.words)


def test_a_library_without_an_algorithm(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.algorithms = 0
    for _ in range(2):  # the second time it is known
        with pytest.raises(lt.CublasError, match="no algorithm"):
            products.product(*operands())
        monkeypatch.setattr(products, "Product", None)


def test_what_may_pass_is_tried_again_and_what_lasts_is_not(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "SMALL", 2**30)
    out, a, b = operands()
    for status, calls in ((3, 1), (14, 2)):
        fake.status = status
        with pytest.raises(lt.CublasError, match=f"cublasLtMatmul: status {status}, "):
            products.product(out, a, b)
        assert len(fake.calls) == calls
    fake.status = 0
    products.product(out, a, b)
    assert len(fake.calls) == 3

    def describe(status: int) -> None:
        monkeypatch.setattr(fake, "cublasLtMatmulDescInit_internal", lambda *_: status)
        with pytest.raises(lt.CublasError, match=f"status {status}, "):
            products.product(*operands(k=80))

    describe(3)
    assert len(products._products) == 1, "memory may be there at the next call"
    describe(15)
    assert len(products._products) == 2
    with pytest.raises(lt.CublasError, match=r"bfloat16 \[\*, 80\] by torch.bfloat16 \[80, 48\]: "):
        products.product(*operands(k=80))


def test_scales_of_rows_and_blocks_have_to_be_aligned(fake: Fake) -> None:
    out, a, b = operands()
    left, right = a.to(FP8), b.t().to(FP8).t()
    scales = torch.ones(33)[1:].view(1, 32), torch.ones(1, 4)
    with pytest.raises(lt.CublasError, match="no multiple of 16 bytes"):
        products.product(out, left, right, scales, (lt.BLOCK, lt.SQUARE))
    assert not fake.calls
    products.product(out, left, right, (scales[0][0, 0], scales[1][0, 1]))  # each of a tensor
    assert fake.calls


def test_forgotten_choices_are_forgotten_in_memory_too(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setattr(choices, "directories", lambda: [tmp_path])
    monkeypatch.setattr(choices, "gpu", lambda device: ("a chip of this test",))
    monkeypatch.setattr(products, "_measured", last)
    monkeypatch.setattr(products, "_choices", _CHOICES.__wrapped__)
    products.product(*operands())
    assert products._products
    assert _CHOICES.__wrapped__(0).forget() == 1
    assert not products._products
    products.product(*operands())
    assert [call[0] for call in fake.calls] == [0, 1, 2, 2] * 2


@pytest.mark.parametrize("sizes, strides, expected", [
    ((3, 5), (5, 1), (False, 5)), ((3, 5), (1, 3), (True, 3)), ((3, 5), (8, 1), (False, 8)),
    ((1, 5), (1, 1), (False, 5)), ((3, 1), (1, 9), (False, 1)), ((3, 5), (10, 2), None),
    ((3, 5), (0, 1), None),
])  # fmt: skip
def test_how_a_matrix_is_stored(sizes: Any, strides: Any, expected: Any) -> None:
    assert products.stored(torch.empty_strided(sizes, strides)) == expected
