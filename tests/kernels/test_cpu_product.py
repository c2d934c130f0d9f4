"""Products of bf16 by our own C++ kernels, by every unit that this machine has."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsgraph.base.errors import OpError
from opsgraph.kernels.cpu import build, product

REASON = build.why_not()
UNITS = () if REASON else tuple(unit for unit in product.UNITS if product.room(unit, 1))
# Less and more than a register, a block of columns, a part of k and a task have; odd ones, and one.
SIZES = (
    (32, 32, 32), (33, 40, 70), (5, 3, 1), (1, 1, 1), (12, 1, 513), (300, 290, 100),
    (37, 129, 2049), (700, 64, 1027), (1030, 33, 1100), (64, 530, 96), (1, 64, 4100),
    (2065, 16, 16), (500, 16, 1100), (70, 40, 1056), (40, 1100, 64), (600, 600, 1100),
)  # fmt: skip

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]
each_unit = pytest.mark.parametrize("unit", UNITS)


def stored(x: Tensor, by_columns: bool, apart: int = 0) -> Tensor:
    """x in memory of its own, its rows or columns a stride apart."""
    x = x.t() if by_columns else x
    made = torch.full((x.shape[0], x.shape[1] + apart), -7.0, dtype=x.dtype)[:, : x.shape[1]]
    made.copy_(x)
    return made.t() if by_columns else made


def whole_numbers(*shape: int) -> Tensor:
    """So small that their products and sums are exact."""
    return torch.randint(-4, 5, shape).bfloat16()


@each_unit
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sums_are_exact_and_rounded_once(unit: str, sizes: tuple[int, int, int]) -> None:
    m, n, k = sizes
    a, b = whole_numbers(m, k), whole_numbers(k, n)
    bias, above, other = (whole_numbers(*s) / 4 for s in ((n,), (m, 1), (m, n)))
    expected = a.double() @ b.double()
    added = expected + bias.double() + other.double()
    for b_by_columns in (False, True):
        for apart in (0, 1, 6):
            right = stored(b, b_by_columns, apart)
            left = stored(a, unit == product.TRANSPOSES and b_by_columns != bool(apart), apart)
            for by_columns in (False, True):
                room = torch.full((m + 2, n + 2), torch.nan).bfloat16()
                room = room.t().contiguous().t() if by_columns else room
                out = room[1:-1, 1:-1]
                product.multiply(unit, left, right, out)
                assert torch.equal(out, expected.bfloat16())
                out.fill_(torch.nan)
                assert room.isnan().all(), "more than the result was written"
            out = torch.full((m, n), torch.nan).bfloat16()
            product.multiply(unit, left, right, out, bias, stored(other, False, apart))
            assert torch.equal(out, added.bfloat16())
            out = torch.full((n, m), torch.nan).bfloat16().t()
            product.multiply(unit, left, right, out, above, stored(other, True, apart))
            assert torch.equal(out, (expected + above.double() + other.double()).bfloat16())


@each_unit
@pytest.mark.parametrize("sizes", ((1092, 480, 2048), (1100, 655, 800), (520, 1040, 97)), ids=str)
def test_a_thread_writes_into_its_room_alone(
    unit: str, sizes: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes whose rounded shares of rows or columns are more than would fit."""
    m, n, k = sizes
    rooms = []

    def guarded(shape: tuple[int], dtype: torch.dtype) -> Tensor:
        rooms.append(torch.full((shape[0] + 2**20,), 77, dtype=dtype))
        return rooms[-1][: shape[0]]

    monkeypatch.setattr(product.memory, "empty", guarded)
    a, b, out = whole_numbers(m, k), whole_numbers(k, n), torch.empty(m, n).bfloat16()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        product.multiply(unit, a, b, out)
    finally:
        torch.set_num_threads(threads)
    assert (rooms[0][product.room(unit, k) :] == 77).all()
    assert torch.equal(out, (a.double() @ b.double()).bfloat16())


@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit != product.TRANSPOSES])
def test_other_units_refuse_a_left_factor_by_columns(unit: str) -> None:
    a, b, out = whole_numbers(8, 4).t(), whole_numbers(8, 6), torch.empty(4, 6).bfloat16()
    with pytest.raises(OpError, match="stored by columns"):
        product.multiply(unit, a, b, out)


@each_unit
def test_nan_and_inf_stay_where_they_are(unit: str) -> None:
    a, b = torch.ones(70, 100).bfloat16(), torch.ones(100, 90).bfloat16()
    a[3, 5], a[40, 99], a[69, 0] = torch.nan, torch.inf, -torch.inf
    out = torch.empty(70, 90).bfloat16()
    product.multiply(unit, a, b, out)
    expected = a.double() @ b.double()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(), expected.bfloat16().nan_to_num())


@each_unit
def test_products_of_nothing(unit: str) -> None:
    for m, n, k in ((0, 32, 64), (5, 0, 64), (5, 32, 0), (0, 0, 0)):
        a, bias, other = whole_numbers(m, k), whole_numbers(n), whole_numbers(m, n)
        for by_columns in (False, True):
            b = stored(whole_numbers(k, n), by_columns)
            out = stored(torch.full((m, n), torch.nan).bfloat16(), by_columns)
            product.multiply(unit, a, b, out)
            assert torch.equal(out, torch.zeros(m, n).bfloat16())
            product.multiply(unit, a, b, out, bias, other)
            assert torch.equal(out, bias + other)


@each_unit
def test_bits_depend_neither_on_threads_nor_on_what_else_is_multiplied(unit: str) -> None:
    a, b = torch.randn(1200, 2100).bfloat16(), torch.randn(2100, 300).bfloat16()
    out = torch.empty(1200, 300).bfloat16()
    product.multiply(unit, a, b, out)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 40):
            torch.set_num_threads(count)
            again = torch.empty(1200, 300).bfloat16()
            product.multiply(unit, a, b, again)
            assert torch.equal(again, out)
    finally:
        torch.set_num_threads(threads)
    some = torch.empty(77, 130).bfloat16()
    product.multiply(unit, a[601:678], b[:, 10:140], some)
    assert torch.equal(some, out[601:678, 10:140])


@each_unit
def test_threads_of_python_multiply_at_the_same_time(unit: str) -> None:
    given = [(whole_numbers(200, 300), whole_numbers(300, 100 + k)) for k in range(4)]
    wrong = []

    def run(a: Tensor, b: Tensor) -> None:
        expected = (a.double() @ b.double()).bfloat16()
        for _ in range(20):
            out = torch.empty(a.shape[0], b.shape[1]).bfloat16()
            product.multiply(unit, a, b, out)
            if not torch.equal(out, expected):
                wrong.append(b.shape)

    threads = [threading.Thread(target=run, args=pair) for pair in given]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif("tiles" in UNITS, reason="this machine has them")
def test_tiles_in_plain_cpp(tmp_path: Path) -> None:
    """The tests above, by AMX's blocking with its instructions emulated."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment["CXX"] = f"{build.compiler()[0]} -DEMULATE_TILES"
    environment["XDG_CACHE_HOME"] = str(tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        [*command, "-k", "tiles and not plain"], env=environment, capture_output=True, text=True,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    assert f"{len(SIZES) + 7} passed" in done.stdout
