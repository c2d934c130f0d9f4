"""Emulated products of quantized operands, against fp64 products of what the copies stand for."""

import pytest
import torch
from torch import Tensor

from opsgraph.precision import products as scaled_gemm
from opsgraph.precision.products import product
from opsgraph.quantizers import (
    BlockQuantizer,
    Copy,
    MXQuantizer,
    NVFP4Quantizer,
    Quantized,
    Quantizer,
    RowQuantizer,
    TensorQuantizer,
)

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
QUANTIZERS = {
    "tensor": (TensorQuantizer(E4M3), TensorQuantizer(E5M2)),
    "rows": (RowQuantizer(E4M3), RowQuantizer(E5M2)),
    "powers": (RowQuantizer(E4M3, power_of_two=True), TensorQuantizer(E5M2, power_of_two=True)),
    "blocks": (BlockQuantizer(E4M3, 128), BlockQuantizer(E4M3)),
    "f32 blocks": (BlockQuantizer(E4M3, 128, power_of_two=False), BlockQuantizer(E5M2)),
    "mx": (MXQuantizer(), MXQuantizer(E5M2)),
    "nvfp4": (NVFP4Quantizer(16), NVFP4Quantizer(hadamard=True)),
    "mixed": (MXQuantizer(), RowQuantizer(E5M2)),
    "tensor and row": (TensorQuantizer(E4M3), RowQuantizer(E4M3)),
}
BITS = {torch.float32: 24, torch.bfloat16: 8, torch.float16: 11}


@pytest.fixture(params=["fp32 units", "bf16 units"])
def units(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways in which a CPU may compute them."""
    there = request.param == "bf16 units"
    if there and not scaled_gemm.multiplies_bf16():
        pytest.skip("this CPU has no bf16 units")
    monkeypatch.setattr(scaled_gemm, "multiplies_bf16", lambda: there)


def close(found: Tensor, a: Tensor, b: Tensor) -> None:
    """`a @ b.T` rounded once, from sums that are as good as fp32 ones in any order.

    2^-22 of the magnitudes per sqrt(depth): what fp32 sums of random terms are off, and more. A
    second rounding to bf16 or fp16 would show: it is off by up to half a unit in the last place.
    """
    a, b = a.double(), b.double()
    exact, size = a @ b.t(), a.abs() @ b.abs().t()
    half = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - BITS[found.dtype] - 1)
    if found.dtype == torch.float16:
        half = half.clamp_min(2.0**-25)  # of its subnormal numbers
    allowed = half + 2.0**-22 * a.shape[1] ** 0.5 * size
    error = (found.double() - exact).abs()
    assert found.shape == exact.shape
    assert (error <= allowed).all(), f"{float((error / allowed).max())} times what is allowed"


def operands(name: str, rows: int, device: str, size: float = 1.0) -> tuple[Quantized, ...]:
    torch.manual_seed(rows)
    first, second = QUANTIZERS[name]
    x, weight, dy = (
        torch.randn(*shape, device=device) * size
        for shape in ((rows, 160), (144, 160), (rows, 144))
    )
    return second(x), first(weight), second(dy)


@pytest.mark.parametrize("rows", [1, 48, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.usefixtures("units")
def test_products(name: str, dtype: torch.dtype, rows: int, device: str) -> None:
    x, weight, dy = operands(name, rows, device)
    for a, b in ((x.row, weight.row), (dy.row, weight.col), (dy.col, x.col)):
        assert a is not None
        assert b is not None
        found = product(a, b, dtype)
        assert found.dtype == dtype
        close(found, a.dequantize(), b.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.usefixtures("units")
def test_plain_gradients(name: str, dtype: torch.dtype, device: str) -> None:
    """With a `backward_override` the gradient is as it came: strided, or expanded."""
    x, weight, _ = operands(name, 48, device)
    for dy in (torch.randn(144, 48, device=device).to(dtype).t(), torch.ones((), device=device)):
        dy = dy.to(dtype).expand(48, 144)
        assert weight.row is not None
        assert x.row is not None
        close(scaled_gemm.dgrad(dy, weight), dy, weight.row.dequantize()[:, :160].t())
        close(scaled_gemm.wgrad(dy, x), dy.t(), x.row.dequantize()[:, :160].t())


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.usefixtures("units")
def test_sums_for_main_grad_are_not_rounded(name: str) -> None:
    x, _, dy = operands(name, 48, "cpu")
    assert dy.col is not None
    assert x.col is not None
    dy = dy._replace(dtype=torch.bfloat16)
    found = scaled_gemm.wgrad(dy, x, True)
    assert found.dtype == torch.float32
    close(found, dy.col.dequantize(), x.col.dequantize())


def test_fp64_is_multiplied_in_fp64() -> None:
    x, weight, _ = operands("tensor", 48, "cpu")
    assert x.row is not None
    assert weight.row is not None
    expected = x.row.dequantize(torch.float64) @ weight.row.dequantize(torch.float64).t()
    assert torch.equal(product(x.row, weight.row, torch.float64), expected)


@pytest.mark.parametrize("sizes", [(1e-30, 1e30), (1e-18, 1e-18), (1e18, 1e18), (1e-25, 1e-25)])
@pytest.mark.parametrize("name", ["tensor", "nvfp4"])
@pytest.mark.usefixtures("units")
def test_scales_of_any_size(name: str, sizes: tuple[float, float]) -> None:
    """Also where both factors together are no fp32 number in full."""
    a, b = operands(name, 48, "cpu", sizes[0])[0].row, operands(name, 32, "cpu", sizes[1])[0].row
    assert a is not None
    assert b is not None
    found = product(a, b, torch.bfloat16)
    exact = a.dequantize(torch.float64) @ b.dequantize(torch.float64).t()
    sums = 1e-5 * a.data.shape[1] * sizes[0] * sizes[1]
    # Below the least normal number bf16 has steps of 2^-133.
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2.0**-133 + sums)


@pytest.mark.usefixtures("units")
def test_what_bf16_units_leave_out_is_below_the_least_normal_number() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 96) * 2.0 ** torch.randint(-128, -118, (64, 1))
    weight = torch.randn(32, 96)
    quantizer = MXQuantizer()
    a, b = quantizer(x).row, quantizer(weight).row
    assert a is not None
    assert b is not None
    values, other = a.dequantize(torch.float64), b.dequantize(torch.float64)
    found, exact = product(a, b, torch.bfloat16).double(), values @ other.t()
    dropped = 2.0**-126 * (values.shape[1] + other.abs().sum(1))
    assert ((found - exact).abs() <= 2.0**-8 * exact.abs() + dropped).all()


@pytest.mark.parametrize("name", ["tensor", "rows", "blocks", "mx", "nvfp4"])
@pytest.mark.usefixtures("units")
def test_nan_stays_in_its_row(name: str) -> None:
    torch.manual_seed(0)
    _, quantizer = QUANTIZERS[name]
    x, weight = torch.randn(48, 160), quantizer(torch.randn(144, 160)).row
    x[5, 7] = torch.nan
    a = quantizer(x).row
    assert a is not None
    assert weight is not None
    found = product(a, weight, torch.bfloat16)
    assert found[5].isnan().all()
    if name != "nvfp4":  # the scale of a tensor with a NaN is 1: much of it then saturates
        assert not found[torch.arange(48) != 5].isnan().any()


@pytest.mark.parametrize("kind", [E4M3, E5M2])
def test_every_code_is_a_bf16_number(kind: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(kind)
    found = RowQuantizer(kind).operand(Copy(RowQuantizer(kind), codes[None], torch.ones(1, 1)))
    torch.testing.assert_close(
        found.values.double(), codes[None].double(), rtol=0, atol=0, equal_nan=True
    )


def test_a_quantizer_of_ones_own_is_dequantized() -> None:
    """One that says nothing of bf16 has the products that it had."""

    class Plain(Quantizer):
        def dequantize(self, copy: Copy, dtype: torch.dtype) -> Tensor:
            return copy.data.to(dtype) / copy.scale

    torch.manual_seed(0)
    made = [Copy(Plain(), torch.randn(32, 64), torch.tensor(3.0)) for _ in range(2)]
    found = product(made[0], made[1], torch.bfloat16)
    close(found, made[0].dequantize(), made[1].dequantize())
