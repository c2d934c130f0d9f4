"""The reference quantizers against `quantize_oracle`, bit for bit, and what they dequantize to."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import quantize_oracle as oracle
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from quantize_oracle import E2M1, Small
from torch import Tensor

from opsgraph.kernels.reference import nvfp4, quantize
from opsgraph.kernels.reference.quantize import E4M3, E5M2

FORMATS = [(E4M3, oracle.E4M3), (E5M2, oracle.E5M2)]
SEED = torch.tensor(3)
SIGNS = [-1.0 if bit == "1" else 1.0 for bit in "0010010000111111"]
"""1 - 2 * bit for the first 16 bits of pi's fraction, 0x243F."""
INF, NAN, TINY = math.inf, math.nan, 2.0**-149


class Case(NamedTuple):
    """A quantizer and the block that one of its scales covers (0: all there is)."""

    function: Callable[..., tuple[Tensor, Tensor]]
    height: int
    width: int


CASES = {
    "tensor": Case(quantize.quantize_tensor, 0, 0),
    "rows": Case(quantize.quantize_rows, 1, 0),
    "blocks": Case(
        lambda x, dtype, eps, power: quantize.quantize_blocks(x, dtype, 1, eps, power), 1, 128
    ),
    "square": Case(
        lambda x, dtype, eps, power: quantize.quantize_blocks(x, dtype, 128, eps, power), 128, 128
    ),
}


def bits(x: Tensor) -> Tensor:
    return x.contiguous().flatten().view(torch.uint8)


def same(actual: Tensor, expected: np.ndarray) -> None:
    """Bit for bit; both are of one dtype, or bytes of an FP8."""
    assert actual.shape == expected.shape
    assert actual.is_contiguous()
    expected_bits = torch.from_numpy(np.ascontiguousarray(expected))
    if actual.dtype == torch.float32:
        expected_bits = expected_bits.float()
    wrong = bits(actual) != bits(expected_bits)
    assert not wrong.any(), f"{int(wrong.sum())} bytes of {wrong.numel()} differ"


def array(x: Tensor) -> np.ndarray:
    return x.float().numpy()


def check_scaled(
    x: Tensor, case: Case, dtype: torch.dtype, small: Small, eps: float, power: bool
) -> None:
    data, scale = case.function(x, dtype, eps, power)
    height, width = case.height or max(1, x.shape[0]), case.width or max(1, x.shape[1])
    codes, grid = oracle.scaled(array(x), small, height, width, eps, power)
    assert data.dtype == dtype
    same(data, codes)
    if case.height == 0:
        grid = grid.reshape(())
    same(scale, grid)
    back = quantize.dequantize(data, scale)
    inverse = oracle.fp32(1 / grid)
    spread = np.kron(inverse, np.ones((height, width)))[: x.shape[0], : x.shape[1]]
    with np.errstate(invalid="ignore"):
        expected = oracle.fp32(oracle.decoded(codes, small) * spread)
    torch.testing.assert_close(
        back, torch.from_numpy(expected).float(), rtol=0, atol=0, equal_nan=True
    )


def check_mx(x: Tensor, dtype: torch.dtype, small: Small) -> None:
    data, scale = quantize.quantize_mxfp8(x, dtype)
    codes, grid = oracle.mxfp8(array(x), small)
    same(data, codes)
    same(scale, grid.astype(np.uint8))
    factor = np.where(grid == 255, NAN, 2.0 ** (grid - 127))
    spread = np.kron(factor, np.ones((1, 32)))[:, : x.shape[1]]
    expected = oracle.fp32(oracle.decoded(codes, small) * spread)
    back = quantize.dequantize_mxfp8(data, scale)
    torch.testing.assert_close(
        back, torch.from_numpy(expected).float(), rtol=0, atol=0, equal_nan=True
    )


def check_nvfp4(x: Tensor, height: int, seed: int | None, amax: float | None = None) -> None:
    given_amax = quantize.amax_of(x) if amax is None else torch.tensor(amax)
    given_seed = None if seed is None else torch.tensor(seed)
    data, scale = nvfp4.quantize_nvfp4(x, given_amax, height, given_seed)
    known = oracle.largest(array(x)) if amax is None else float(given_amax)
    codes, scales, value = oracle.nvfp4(array(x), known, height, seed)
    assert scale.dtype == E4M3
    same(scale, scales)
    padded = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    same(data, padded[:, ::2] + 16 * padded[:, 1::2])
    back = nvfp4.dequantize_nvfp4(data, scale, given_amax, x.shape[1])
    expected = torch.from_numpy(value).float()
    torch.testing.assert_close(back, expected, rtol=0, atol=0, equal_nan=True)


def check_all(x: Tensor, eps: float = 0.0) -> None:
    for dtype, small in FORMATS:
        for case in CASES.values():
            for power in (False, True):
                check_scaled(x, case, dtype, small, eps, power)
        check_mx(x, dtype, small)
    for height in (1, 16):
        check_nvfp4(x, height, None)


def special(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Ordinary rows among rows of zeros, of infinities, NaNs, subnormals, huge and tiny values."""
    generator = torch.Generator().manual_seed(rows * 1000 + cols)
    x = torch.randn(rows, cols, generator=generator)
    kinds = [
        lambda row: row,
        lambda row: row * 0,
        lambda row: torch.where(torch.arange(cols) % 50 == 3, INF, row),
        lambda row: torch.where(torch.arange(cols) % 70 == 5, NAN, row),
        lambda row: row * 2.0**-140,
        lambda row: row * 2.0**124,
        lambda row: row * 2.0**-120,
        lambda row: torch.where(row > 0, -INF, 0.0),
    ]
    return torch.stack([kinds[i % len(kinds)](x[i]) for i in range(rows)]).to(dtype)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(8, 128), (9, 1), (1, 33), (11, 31), (16, 300), (130, 17), (129, 129)]
)
def test_special_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = special(*shape, dtype)
    check_all(x)
    check_all(x.t())


@pytest.mark.parametrize("value", [0.0, -0.0, INF, -INF, NAN, TINY, -TINY, 2.0**-127, 3.4e38])
def test_tensors_of_one_value(value: float) -> None:
    x = torch.full((3, 40), value)
    check_all(x)
    check_all(x, eps=1e-3)
    x[1, 7] = 1.0
    check_all(x)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5), (5, 0)])
def test_empty(shape: tuple[int, int]) -> None:
    x = torch.empty(shape)
    for case in CASES.values():
        data, scale = case.function(x, E4M3, 0.0, True)
        assert data.shape == shape
        assert (scale == 1).all()
    assert quantize.quantize_mxfp8(x)[1].numel() == 0
    assert nvfp4.quantize_nvfp4(x, quantize.amax_of(x))[0].numel() == 0


def every_bfloat16() -> Tensor:
    return torch.arange(65536).to(torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**-130, 2.0**127, 3.3e-4, 77.77])
@pytest.mark.parametrize(("dtype", "small"), FORMATS)
def test_cast_of_every_bfloat16(dtype: torch.dtype, small: Small, scale: float) -> None:
    x = every_bfloat16().view(256, 256)
    data = quantize.cast(x, torch.tensor(scale), dtype)
    same(data, oracle.rounded(oracle.times(array(x), float(np.float32(scale))), small))


@pytest.mark.parametrize("shape", [(512, 128), (128, 512)])
def test_every_bfloat16(shape: tuple[int, int]) -> None:
    """By rows one exponent in a row, and by columns all of them."""
    x = every_bfloat16().view(shape if shape[0] > shape[1] else shape[::-1])
    x = x if shape[0] > shape[1] else x.t()
    for name in ("rows", "blocks"):
        check_scaled(x, CASES[name], E4M3, oracle.E4M3, 0.0, name == "blocks")
        check_scaled(x, CASES[name], E5M2, oracle.E5M2, 0.0, name == "rows")
    check_mx(x, E4M3, oracle.E4M3)
    check_nvfp4(x, 1, None, amax=2.0**80)


def test_every_fp8_value_survives() -> None:
    """Values of the format are their own rounding, and halves between two go to the even code."""
    for dtype, small in FORMATS:
        values = torch.from_numpy(small.values).float()[None]
        data, scale = quantize.quantize_tensor(values, dtype)
        assert scale == 1
        assert torch.equal(data.float(), values)
        middle = (values[:, 1:] + values[:, :-1]) / 2
        codes = quantize.cast(middle, torch.ones(()), dtype).view(torch.uint8)
        assert (codes % 2 == 0).all()


bit_patterns = st.integers(0, 2**32 - 1) | st.sampled_from(
    [0, 1, 0x80000000, 0x7F800000, 0x7FC00000, 0xFF800000, 0x7F7FFFFF, 0x00800000, 0x43E00000]
)


@given(st.lists(bit_patterns, min_size=1, max_size=120), st.integers(1, 120), st.booleans())
@example([0x7F7FFFFF] * 40, 33, False)
def test_any_fp32(patterns: list[int], cols: int, power: bool) -> None:
    cols = min(cols, len(patterns))
    rows = len(patterns) // cols
    x = torch.from_numpy(np.array(patterns[: rows * cols], np.uint32).view(np.float32).copy())
    x = x.view(rows, cols)
    for case in CASES.values():
        check_scaled(x, case, E4M3, oracle.E4M3, 0.0, power)
        check_scaled(x, case, E5M2, oracle.E5M2, 1e-4, power)
    check_mx(x, E4M3, oracle.E4M3)
    check_mx(x, E5M2, oracle.E5M2)
    check_nvfp4(x, 1, None)


@given(st.integers(-150, 127), st.sampled_from([-1, 0, 1]))
def test_mxfp8_exponents_at_powers_of_two(exponent: int, ulp: int) -> None:
    """amax / 448 a power of two, or one unit in the last place beside it."""
    amax = np.float32(448 * 2.0 ** min(exponent, 119))
    towards = amax if not ulp else np.nextafter(amax, np.float32(ulp * np.inf))
    check_mx(torch.tensor([[float(towards), 0.0]]), E4M3, oracle.E4M3)


def test_a_nan_of_either_sign() -> None:
    """Reductions and 0 / 0 give negative NaNs on some machines."""
    nans = torch.tensor([0x7FC00000, -0x400000, 0x7F800001, -1], dtype=torch.int32)
    nans = nans.view(torch.float32)
    assert quantize.e8m0_of(nans, E4M3).tolist() == [255] * 4
    assert quantize.scale_of(nans, E4M3).tolist() == [1.0] * 4
    assert bits(quantize.cast(nans, torch.ones(()), E5M2)).tolist() == [0x7F] * 4
    assert nvfp4.tensor_multiplier(nans).tolist() == [1.0] * 4
    assert nvfp4.e2m1(nans[None]).tolist() == [[7] * 4]


@pytest.mark.parametrize("height", [1, 16])
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
def test_nvfp4_stochastic_rounding(seed: int, height: int) -> None:
    check_nvfp4(special(17, 35, torch.float32), height, seed)


def test_stochastic_rounding_is_unbiased() -> None:
    for value in (0.1, 0.75, 2.6, 4.5, -5.0):
        codes = nvfp4.e2m1(torch.full((64, 1024), value), torch.tensor(7))
        found = nvfp4.from_e2m1(codes)
        step = found.max() - found.min()
        assert step <= 2
        assert abs(found.mean().item() - value) < 4 * step.item() / 2 / math.sqrt(found.numel())


def test_e2m1_values() -> None:
    values = torch.from_numpy(E2M1.values).float()
    assert values.tolist() == [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    codes = nvfp4.e2m1(torch.stack((values, -values)))
    assert codes.tolist() == [list(range(8)), list(range(8, 16))]
    assert torch.equal(nvfp4.from_e2m1(codes), torch.stack((values, -values)))
    odd = torch.arange(15, dtype=torch.uint8).view(3, 5)
    assert torch.equal(nvfp4.unpack(nvfp4.pack(odd), 5), odd)


@pytest.mark.parametrize("cols", [16, 40])
def test_hadamard(cols: int) -> None:
    generator = torch.Generator().manual_seed(1)
    whole = torch.randint(-50, 50, (6, cols), generator=generator).float()
    expected = torch.from_numpy(oracle.hadamard(whole.numpy(), SIGNS))
    assert torch.equal(nvfp4.hadamard(whole).double(), expected)
    x, y = torch.randn(6, cols, generator=generator), torch.randn(6, cols, generator=generator)
    torch.testing.assert_close(nvfp4.hadamard(x) @ nvfp4.hadamard(y).t(), x @ y.t())
    assert sorted(SIGNS) == [-1.0] * 8 + [1.0] * 8


def test_a_tensor_and_a_square_share_their_transpose() -> None:
    x = special(300, 200, torch.bfloat16)
    for name in ("tensor", "square"):
        data, scale = CASES[name].function(x, E4M3, 0.0, True)
        col, col_scale = CASES[name].function(x.t(), E4M3, 0.0, True)
        assert torch.equal(bits(col), bits(data.t()))
        assert torch.equal(col_scale, scale.t())
    amax = quantize.amax_of(x[:2])
    data, scale = nvfp4.quantize_nvfp4(x[:2], amax, 16)
    col, col_scale = nvfp4.quantize_nvfp4(x[:2].t(), amax, 16)
    assert torch.equal(nvfp4.unpack(col, 2), nvfp4.unpack(data, 200).t())
    assert torch.equal(bits(col_scale), bits(scale.t()))


class Delayed:
    """Delayed scaling of one tensor, as a list and a float."""

    def __init__(self, length: int) -> None:
        self.history = [0.0] * length
        self.scale = 1.0

    def update(self, amax: float, largest: float, margin: int, algorithm: str) -> None:
        self.history[0] = amax
        chosen = oracle.largest(np.array(self.history)) if algorithm == "max" else amax
        self.history = [0.0, *self.history[2:], amax] if len(self.history) > 1 else [0.0]
        if 0 < chosen < INF:
            self.scale = min(float(oracle.fp32(largest / chosen)) / 2.0**margin, oracle.FP32_MAX)


@pytest.mark.parametrize("length", [1, 2, 5])
@pytest.mark.parametrize("algorithm", ["max", "most_recent"])
@pytest.mark.parametrize("margin", [0, 3])
def test_delayed_scaling(length: int, algorithm: str, margin: int) -> None:
    amaxes = [0.0, 3.3, 0.0, 2e-38, 7.5, INF, 1.0, 1.0, NAN, 2.0, 0.5, 0.25, 1e-44, 0.1, 0.1, 0.1]
    history, scale, expected = torch.zeros(length), torch.ones(()), Delayed(length)
    for amax in amaxes:
        history = history.clone()
        history[0] = amax
        before = history.clone()
        new, scale = quantize.delayed_update(history, scale, 448.0, margin, algorithm)
        torch.testing.assert_close(history, before, rtol=0, atol=0, equal_nan=True)
        history = new
        expected.update(float(np.float32(amax)), 448.0, margin, algorithm)
        assert scale.item() == expected.scale
        torch.testing.assert_close(
            history, torch.tensor(expected.history), rtol=0, atol=0, equal_nan=True
        )


def test_delayed_scaling_of_several_with_a_function() -> None:
    history = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    new, scale = quantize.delayed_update(
        history, torch.ones(2), 448.0, algorithm=lambda history: history.mean(0)
    )
    assert new.tolist() == [[0.0, 0.0], [1.0, 2.0]]
    assert torch.equal(scale, 448 / torch.tensor([2.5, 5.0]))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: quantize.quantize_tensor(x, E5M2),
        lambda x: quantize.dequantize(*quantize.quantize_blocks(x.t(), E4M3)),
        quantize.quantize_mxfp8,
        lambda x: nvfp4.quantize_nvfp4(nvfp4.hadamard(x), quantize.amax_of(x), 1, SEED),
    ],
)
def test_traceable(function: Callable[[Tensor], object]) -> None:
    x = special(9, 40, torch.bfloat16)
    traced = torch.compile(function, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(x), function(x), rtol=0, atol=0, equal_nan=True)
