"""Matrix products in every layout, against fp64; which one is taken is given, never timed."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from opsgraph.kernels.choices import Choices
from opsgraph.kernels.cpu import gemm, product
from opsgraph.kernels.cpu.product import UNITS

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCES = {
    torch.float32: (1e-4, 1e-4),
    torch.bfloat16: (2e-2, 2e-2),
    torch.float16: (4e-3, 4e-3),
}


class Chooser:
    """A measurement that answers with a given layout, and says what it was asked for."""

    def __init__(self) -> None:
        self.answer, self.asked = "mm", list[list[str]]()

    def __call__(self, candidates: Mapping[str, object]) -> str:
        self.asked.append(list(candidates))
        ours = gemm.LAYOUTS[self.answer].unit in UNITS
        return "mm" if ours and self.answer not in candidates else self.answer


@pytest.fixture(autouse=True)
def chooser(monkeypatch: pytest.MonkeyPatch) -> Chooser:
    made = Chooser()
    monkeypatch.setattr(gemm, "SMALL", 0)
    monkeypatch.setattr(gemm, "TINY", 0)
    monkeypatch.setattr(gemm, "FEW", -1)
    monkeypatch.setattr(gemm, "LARGE", 0)
    monkeypatch.setattr(gemm, "choices", Choices("gemm", tuple, made, list))
    monkeypatch.setattr(gemm, "_chosen", {})
    return made


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCES[dtype]
    assert found.dtype == dtype
    assert found.is_contiguous()
    size = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol * size)


def check(x: Tensor, weight: Tensor, bias: Tensor, dy: Tensor) -> None:
    dtype = x.dtype
    x64, w64, b64, dy64 = (t.double() for t in (x, weight, bias, dy))
    added, dx = dy.flip(1), x.flip(0)
    by_columns = weight.t().contiguous().t()  # TransposedLinear's
    for stored in (weight, by_columns):
        close(gemm.linear(x, stored), x64 @ w64.t(), dtype)
        close(gemm.linear(x, stored, bias), x64 @ w64.t() + b64, dtype)
        close(gemm.dgrad(dy, stored), dy64 @ w64, dtype)
        out = torch.empty((dy.shape[0], stored.shape[1]), dtype=dtype)
        assert gemm.dgrad(dy, stored, out=out) is out
        close(out, dy64 @ w64, dtype)
        close(gemm.linear(x, stored, None, added), x64 @ w64.t() + added.double(), dtype)
        close(gemm.linear(x, stored, bias, added), x64 @ w64.t() + b64 + added.double(), dtype)
        close(gemm.dgrad(dy, stored, dx), dy64 @ w64 + dx.double(), dtype)
    assert torch.equal(added, dy.flip(1)), "what is added was written to"
    assert torch.equal(dx, x.flip(0)), "what is added was written to"
    for dy_given in (dy, dy.t().contiguous().t()):
        for x_given in (x, x.t().contiguous().t()):
            close(gemm.wgrad(dy_given, x_given), dy64.t() @ x64, dtype)
            room = torch.zeros((dy.shape[1], 2 * x.shape[1] + 3), dtype=dtype)
            some = room[:, 1 : 1 + x.shape[1]]
            assert gemm.wgrad(dy_given, x_given, out=some) is some
            close(some.contiguous(), dy64.t() @ x64, dtype)
            assert not room[:, 1 + x.shape[1] :].any(), "more than its columns was written"


def operands(rows: int, depth: int, width: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    shapes = (rows, depth), (width, depth), (width,), (rows, width)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


def dtype_of(name: str) -> torch.dtype:
    """One that a layout takes; skips where this machine has none."""
    dtype = torch.bfloat16 if gemm.LAYOUTS[name].unit in UNITS else torch.float32
    if not gemm._available(gemm.LAYOUTS[name], dtype):
        pytest.skip("this machine does not have it")
    return dtype


FEW_ROWS = [f"{unit} flipped" for unit in UNITS]
"""Layouts for products of few rows alone."""


@pytest.mark.parametrize("rows", [1, 2, 16, 31])
@pytest.mark.parametrize("name", FEW_ROWS)
def test_few_rows(chooser: Chooser, name: str, rows: int, monkeypatch) -> None:
    monkeypatch.setattr(gemm, "FEW", 32)
    chooser.answer = name
    check(*operands(rows, 12, 40, dtype_of(name)))
    assert any(name in asked for asked in chooser.asked)
    units = {other.name for other in gemm.LAYOUTS.values() if other.unit in UNITS}
    assert all("mm" in asked and {*asked} <= units | {"mm"} for asked in chooser.asked)


@pytest.mark.parametrize("name", FEW_ROWS)
def test_no_rows_after_a_choice_for_few(chooser: Chooser, name: str, monkeypatch) -> None:
    monkeypatch.setattr(gemm, "FEW", 32)
    chooser.answer, dtype = name, dtype_of(name)
    for rows in (2, 1, 0):
        check(*operands(rows, 12, 40, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", sorted({*gemm.LAYOUTS} - {*FEW_ROWS}))
def test_every_layout_equals_fp64(chooser: Chooser, name: str, dtype: torch.dtype) -> None:
    if not gemm._available(gemm.LAYOUTS[name], dtype):
        pytest.skip(f"this machine does not have it for {dtype}")
    chooser.answer = name
    check(*operands(37, 12, 40, dtype))
    assert any(name in asked for asked in chooser.asked)


@pytest.mark.parametrize("sizes", [(0, 8, 8), (1, 8, 8), (3, 1, 1), (1, 1, 1), (65, 7, 131)])
@pytest.mark.parametrize("name", gemm.LAYOUTS)
def test_odd_sizes(chooser: Chooser, name: str, sizes: tuple[int, int, int]) -> None:
    chooser.answer = name
    check(*operands(*sizes, dtype_of(name)))


@pytest.mark.parametrize("name", gemm.LAYOUTS)
def test_strided_and_expanded_operands(chooser: Chooser, name: str) -> None:
    chooser.answer, dtype = name, dtype_of(name)
    x, weight, bias, dy = operands(12, 24, 40, dtype)
    wide, ones = torch.randn(12, 48).to(dtype), torch.ones((), dtype=dtype)
    check(wide[:, ::2], weight, bias, dy)
    check(wide[:, 24:], weight, bias, dy[:1].expand(12, 40))
    check(x.t().contiguous().t(), weight.t().contiguous().t(), bias, ones.expand(12, 40))
    check(x[::3], torch.randn(40, 48).to(dtype)[:, ::2], bias.expand(40), dy[::3])


def test_measured_once_for_each_class(chooser: Chooser) -> None:
    x, weight, bias, dy = operands(100, 16, 24, torch.float32)
    for rows in (100, 65, 80):  # all of them are products of 128 rows
        gemm.linear(x[:rows], weight)
    assert len(chooser.asked) == 1
    gemm.linear(x[:64], weight)
    gemm.linear(x, weight, bias)
    gemm.dgrad(dy, weight)
    gemm.wgrad(dy, x)
    gemm.linear(x, weight, None, dy)
    gemm.linear(x, weight, bias, dy)
    gemm.dgrad(dy, weight, x)
    assert not gemm.wgrad_transposes_x(x, 24, 16)
    assert len(chooser.asked) == 8
    gemm.linear(x.bfloat16(), weight.bfloat16())
    assert len(chooser.asked) == 9
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        gemm.linear(x, weight)
    finally:
        torch.set_num_threads(threads)
    assert len(chooser.asked) == 10


def test_copies_that_the_weight_gradient_wants(chooser: Chooser) -> None:
    chooser.answer = "onednn first second"
    assert gemm.wgrad_transposes_x(torch.empty(64, 8), 8, 8)
    chooser.answer = "mm first"
    assert not gemm.wgrad_transposes_x(torch.empty(128, 8), 8, 8)


@pytest.mark.parametrize("name", [name for name, layout in gemm.LAYOUTS.items() if layout.first])
def test_a_large_gradient_is_transposed_in_pieces(
    chooser: Chooser, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gemm, "PIECE", 2048)
    monkeypatch.setattr(gemm, "LEAST_COLUMNS", 64)
    made = []
    monkeypatch.setattr(gemm, "transposed", lambda x: made.append(x.shape) or x.t().contiguous())
    chooser.answer, dtype = name, dtype_of(name)
    x, dy = torch.randn(10, 24).to(dtype), torch.randn(10, 200).to(dtype)
    close(gemm.wgrad(dy, x), dy.double().t() @ x.double(), dtype)
    pieces = [shape[1] for shape in made if shape[1] != 24]
    assert pieces == [64, 64, 64, 8]
    assert len(made) - len(pieces) == gemm.LAYOUTS[name].second


@pytest.mark.parametrize(("limit", "value"), [("SMALL", 10**6), ("FEW", 12)])
def test_small_products_are_pytorchs_and_not_measured(
    chooser: Chooser, monkeypatch: pytest.MonkeyPatch, limit: str, value: int
) -> None:
    monkeypatch.setattr(gemm, limit, value)
    monkeypatch.setattr(gemm, "LARGE", 40 * 24 + 1)
    monkeypatch.setattr(gemm, "_onednn", lambda dtype: True)
    x, weight, bias, dy = operands(12, 24, 40, torch.bfloat16)
    linear = torch.nn.functional.linear
    assert torch.equal(gemm.linear(x, weight, bias), linear(x, weight, bias))
    assert torch.equal(gemm.linear(x, weight, bias, dy), linear(x, weight, bias) + dy)
    assert torch.equal(gemm.linear(x, weight, None, dy), torch.addmm(dy, x, weight.t()))
    assert torch.equal(gemm.dgrad(dy, weight), dy @ weight)
    assert torch.equal(gemm.dgrad(dy, weight, x), torch.addmm(x, dy, weight))
    assert torch.equal(gemm.wgrad(dy, x), dy.t() @ x)
    assert not gemm.wgrad_transposes_x(x, 40, 24)
    assert not chooser.asked


@pytest.mark.parametrize("rows", [12, 64])
def test_without_the_librarys_bf16_small_products_are_measured_too(
    chooser: Chooser, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(gemm, "_onednn", lambda dtype: False)
    for limit in ("SMALL", "LARGE"):
        monkeypatch.setattr(gemm, limit, 10**9)
    check(*operands(rows, 24, 40, torch.bfloat16))
    assert chooser.asked
    chooser.asked.clear()
    monkeypatch.setattr(gemm, "TINY", rows * 24 * 40)
    check(*operands(rows, 24, 40, torch.bfloat16))
    assert not chooser.asked


@pytest.mark.parametrize("kind", [gemm.FORWARD, gemm.DGRAD, gemm.WGRAD])
def test_tiles_are_the_usual_way_where_there_are_such(kind: str, monkeypatch) -> None:
    def first(dtype: torch.dtype, *found: str) -> gemm.Layout:
        monkeypatch.setattr(product, "units", lambda: found)
        return gemm.LAYOUTS[next(iter(gemm._candidates(kind, 64, 24, 16, dtype, False, False)))]

    assert first(torch.bfloat16, "tiles").entry == "tiles"
    assert first(torch.bfloat16, "floats", "pairs").entry == "mm"
    assert first(torch.float32, "tiles").entry == "mm"


@pytest.mark.parametrize("kind", [gemm.FORWARD, gemm.DGRAD, gemm.WGRAD])
def test_candidates_run_the_product_that_they_are_for(kind: str, monkeypatch) -> None:
    shapes = []

    def product(_, layout, *given, out=None):
        shapes.append(tuple(None if t is None else tuple(t.shape) for t in given))

    monkeypatch.setattr(gemm, "_product", product)
    bias, add = kind == gemm.FORWARD, kind != gemm.WGRAD
    runs = gemm._candidates(kind, 64, 24, 16, torch.float32, bias, add)
    assert next(iter(runs)) == "mm", "the usual one is the first"
    for run in runs.values():
        run()
    expected = {
        gemm.FORWARD: ((64, 16), (24, 16), (24,), (64, 24)),
        gemm.DGRAD: ((64, 24), (24, 16), None, (64, 16)),
        gemm.WGRAD: ((64, 24), (64, 16)),
    }
    assert set(shapes) == {expected[kind]}
    assert len(shapes) == len(runs) >= 3


@pytest.mark.parametrize("name", gemm.LAYOUTS)
def test_repeatable(chooser: Chooser, name: str) -> None:
    chooser.answer = name
    x, weight, bias, dy = operands(200, 64, 96, dtype_of(name))
    for run in (
        lambda: gemm.linear(x, weight, bias),
        lambda: gemm.dgrad(dy, weight),
        lambda: gemm.wgrad(dy, x),
    ):
        first = run()
        assert all(torch.equal(first, run()) for _ in range(3))


def test_fake_tensors_and_transforms_see_pytorchs_product(chooser: Chooser) -> None:
    x, weight, bias, dy = operands(12, 24, 40, torch.float32)
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) for t in (x, weight, bias, dy)]
        assert gemm.linear(*fake[:3]).shape == (12, 40)
        assert gemm.dgrad(fake[3], fake[1]).shape == (12, 24)
        assert gemm.wgrad(fake[3], fake[0]).shape == (40, 24)
        assert not gemm.wgrad_transposes_x(fake[0], 40, 24)
    many = torch.stack((x, 2 * x))
    found = torch.func.vmap(gemm.linear, in_dims=(0, None))(many, weight)
    torch.testing.assert_close(found, many @ weight.t())
    assert not chooser.asked


def test_candidates_are_on_the_cpu_whatever_the_default_device_is() -> None:
    with torch.device("meta"):
        for run in gemm._candidates(gemm.WGRAD, 8, 4, 4, torch.float32, False, False).values():
            assert run().device.type == "cpu"
