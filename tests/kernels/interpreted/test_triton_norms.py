"""The Triton norms against fp64 formulas and their autograd gradients, on the CPU."""

from itertools import product
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from kernel_checks import DTYPES, INTERPRETING, close, laid_out, normal, twice
from torch import Tensor
from triton.runtime import interpreter

from benchmarks.numerics import units
from opsgraph.kernels.triton.norms import (
    norm_backward,
    norm_forward,
)

EPS = 1e-5


def norm64(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, zero_centered: bool, center: bool
) -> Tensor:
    if center:
        x = x - x.mean(1, keepdim=True)
    y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + EPS)
    if weight is not None:
        y = y * (1 + weight if zero_centered else weight)
    return y if bias is None else y + bias


class Case(NamedTuple):
    rows: int
    width: int
    dtype: torch.dtype
    center: bool
    affine: str = "both"  # which of weight and bias there are
    zero_centered: bool = False
    residual: bool = False
    x_layout: str = "contiguous"
    dy_layout: str = "contiguous"
    weight_dtype: torch.dtype | None = None


def covering_cases() -> list[Case]:
    """Every width with every dtype and norm; the other choices take turns at coprime periods."""
    shapes = [(1, 1), (4, 3), (33, 17), (5, 100), (2, 431), (7, 1000)]
    if not INTERPRETING:
        shapes += [(1025, 431), (3000, 1024), (700, 4096), (300, 5120), (300, 8192)]
        shapes += [(150, 12288), (150, 16384), (40, 16385), (40, 32768), (40, 65536), (20, 100003)]
    x_layouts = ["contiguous", "strided", "offset", "transposed", "expanded"]
    dy_layouts = ["contiguous", "scalar", "strided", "expanded", "offset", "transposed", "strided"]
    affine = ["both", "weight", "both", "none", "bias"]
    cases = []
    for n, (shape, dtype, center) in enumerate(product(shapes, DTYPES, (False, True))):
        for i in (n, n + 17):
            choices = affine[i % 5], i % 3 == 1, i % 4 > 1
            layouts = x_layouts[i // 2 % 5], dy_layouts[i % 7]
            weight_dtype = torch.float32 if i % 3 else None
            cases.append(Case(*shape, dtype, center, *choices, *layouts, weight_dtype))
    # Wider than the kernels hold in registers: 32768 columns in the forward, as many bytes in the
    # backward.
    cases += [
        Case(2, 33000, torch.bfloat16, True, residual=True, zero_centered=True),
        Case(2, 32776, torch.float16, False, "weight", x_layout="offset"),
        Case(3, 8200, torch.float32, True, dy_layout="scalar", x_layout="strided"),
        Case(1, 8193, torch.float32, False, "none", residual=True),
    ]
    return cases


def name(case: Case) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in case)


class Inputs(NamedTuple):
    x: Tensor
    other: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    dy: Tensor
    dother: Tensor | None


def make(case: Case, device: str) -> Inputs:
    def rows_of(seed: int, layout: str) -> Tensor:
        plain = normal(case.rows, case.width, dtype=case.dtype, device=device, seed=seed)
        return laid_out(plain, layout)

    def columns(seed: int, which: str) -> Tensor | None:
        if case.affine not in ("both", which) or (which == "bias" and not case.center):
            return None
        dtype = case.weight_dtype or case.dtype
        return normal(case.width, dtype=dtype, device=device, seed=seed)

    return Inputs(
        rows_of(1, case.x_layout),
        rows_of(2, case.dy_layout) if case.residual else None,
        columns(3, "weight"),
        columns(4, "bias"),
        rows_of(5, case.dy_layout),
        rows_of(6, case.x_layout) if case.residual else None,
    )


def forward(case: Case, given: Inputs) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """y, mean, rstd, total"""
    x, other, weight, bias, _, _ = given
    args = x, weight, bias if case.center else None, EPS, case.zero_centered, other, case.center
    return twice(norm_forward, *args)


def double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach().cpu().double().requires_grad_()


@pytest.mark.sampled(20)
@pytest.mark.parametrize("case", covering_cases(), ids=name)
def test_forward_and_backward(case: Case, device: str) -> None:
    given = make(case, device)
    y, mean, rstd, total = forward(case, given)
    read = given.x
    if given.other is not None:
        read = (given.x.float() + given.other.float()).to(case.dtype)
        assert torch.equal(total, read)
    x64, weight64, bias64 = double(read), double(given.weight), double(given.bias)
    y64 = norm64(x64, weight64, bias64, case.zero_centered, case.center)
    close(y, y64.detach())
    if case.center:
        close(mean, x64.detach().mean(1, keepdim=True))
    variance = x64.detach().var(1, keepdim=True, correction=0)
    square = variance if case.center else x64.detach().square().mean(1, keepdim=True)
    close(rstd, torch.rsqrt(square + EPS))

    dy64 = given.dy.cpu().double()
    args = given.dy, read, mean, rstd, given.weight, None, case.zero_centered
    dx, dweight, dbias = twice(norm_backward, *args, dother=given.dother)
    (dx64,) = torch.autograd.grad(y64, x64, dy64, retain_graph=True)
    m64 = dy64 if weight64 is None else dy64 * (weight64.detach() + case.zero_centered)
    terms = m64 * rstd.cpu()
    close(dx, dx64 if given.dother is None else dx64 + given.dother.cpu().double(), terms)
    assert (dweight is None) == (given.weight is None)
    if weight64 is not None:
        (dweight64,) = torch.autograd.grad(y64, weight64, dy64, retain_graph=True)
        normed = norm64(x64.detach(), None, None, False, case.center)
        close(dweight, dweight64, (dy64 * normed).abs().sum(0))
        assert dweight.dtype == given.weight.dtype
    if case.center:
        close(dbias, dy64.sum(0), dy64.abs().sum(0))
    else:
        assert mean is dbias is None


SUBSETS = [(), ("x",), ("weight",), ("bias",), ("weight", "bias"), ("x", "bias"), ("x", "weight")]


@pytest.mark.sampled(7)
@pytest.mark.parametrize("width", [17, 8200])
@pytest.mark.parametrize("want", SUBSETS, ids="+".join)
def test_backward_computes_what_is_wanted(want: tuple[str, ...], width: int, device: str) -> None:
    case = Case(3, width, torch.float32, True, weight_dtype=torch.float16)
    given = make(case, device)
    _, mean, rstd, _ = forward(case, given)
    x64, weight64, bias64 = double(given.x), double(given.weight), double(given.bias)
    y64 = norm64(x64, weight64, bias64, False, True)
    wanted64 = torch.autograd.grad(y64, (x64, weight64, bias64), given.dy.cpu().double())
    got = norm_backward(
        given.dy, given.x, mean, rstd, given.weight, given.bias.bfloat16(), want=want
    )
    dtypes = torch.float32, torch.float16, torch.bfloat16
    for key, value, value64, dtype in zip(
        ("x", "weight", "bias"), got, wanted64, dtypes, strict=True
    ):
        assert (value is None) == (key not in want)
        if value is not None:
            assert value.dtype == dtype
            close(value, value64, 20.0)  # sums of three rows of normal values
    if "bias" not in want:
        given_rstd = rstd if want else rstd.clone()
        args = given.dy, given.x, None, given_rstd, given.weight
        dx, dweight, _ = norm_backward(*args, want=want)
        assert (dx is None, dweight is None) == ("x" not in want, "weight" not in want)


@pytest.mark.parametrize("want", [(), ("mean",), ("rstd",), ("mean", "rstd")], ids="+".join)
def test_forward_saves_what_is_wanted(want: tuple[str, ...], device: str) -> None:
    x = normal(3, 17, dtype=torch.float32, device=device)
    y, mean, rstd, total = norm_forward(x, None, None, EPS, center=True, want=want)
    full = norm_forward(x, None, None, EPS, center=True)
    assert total is None
    torch.testing.assert_close(y, full[0])
    for key, value, expected in (("mean", mean, full[1]), ("rstd", rstd, full[2])):
        assert (value is None) == (key not in want)
        assert value is None or torch.equal(value, expected)
    _, _, rms, _ = norm_forward(x, None, None, EPS, want=want)
    assert (rms is None) == ("rstd" not in want)


@pytest.mark.parametrize("width", [1000, 1023, 431, 32801])
def test_large_mean_and_small_deviation(width: int, device: str) -> None:
    """One-pass variance loses every digit here, as does counting columns past the end."""
    x = normal(3, width, dtype=torch.float32, device=device) + 1000
    y, mean, rstd, _ = twice(norm_forward, x, None, None, EPS, center=True)
    x64 = double(x)
    y64 = norm64(x64, None, None, False, True)
    # The mean of fp32 values is itself rounded to fp32: half a unit in the last place of 1000.
    close(y, y64.detach(), 1000.0)
    close(mean, x64.detach().mean(1, keepdim=True), 1000.0)
    close(rstd, torch.rsqrt(x64.detach().var(1, keepdim=True, correction=0) + EPS))
    dy = normal(3, width, dtype=torch.float32, device=device, seed=1)
    dx, _, _ = norm_backward(dy, x, mean, rstd, None, want=("x",))
    # The saved mean's rounding error shifts xc, which dx multiplies by mean(dy * xc).
    (dx64,) = torch.autograd.grad(y64, x64, dy.cpu().double())
    close(dx, dx64, 1000.0)


@pytest.mark.parametrize("shape", [(0, 17), (3, 0), (0, 0), (0, 40000)])
def test_empty(shape: tuple[int, int], device: str) -> None:
    x, weight = torch.empty(*shape, device=device), torch.ones(shape[1], device=device)
    y, mean, rstd, total = norm_forward(x, weight, weight, EPS, other=x, center=True)
    assert y.shape == total.shape == shape
    assert mean.shape == rstd.shape == (shape[0], 1)
    dx, dweight, dbias = norm_backward(x, x, mean, rstd, weight, dother=x)
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(weight))


@pytest.mark.parametrize("width", [100, 32776])
def test_weights_with_a_stride(width: int, device: str) -> None:
    """Views such as `weight[::2]` and an expanded scalar are read by their strides."""
    x = normal(2, width, dtype=torch.float32, device=device)
    weight = normal(2 * width, dtype=torch.float32, device=device, seed=1)[::2]
    bias = torch.full((1,), 2.0, device=device).expand(width)
    y, mean, rstd, _ = twice(norm_forward, x, weight, bias, EPS, center=True)
    plain = weight.contiguous(), bias.contiguous()
    assert torch.equal(y, norm_forward(x, *plain, EPS, center=True)[0])
    dx, _, _ = norm_backward(x, x, mean, rstd, weight, want=("x",))
    expected = norm_backward(x, x, mean, rstd, plain[0], want=("x",))[0]
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("width", [1, 100, 33000])
def test_layernorm_of_equal_values_is_the_bias(width: int, device: str) -> None:
    for dtype, size in ((torch.float32, 1.2345e9), (torch.float32, 3e38), (torch.bfloat16, 3e38)):
        x = torch.full((2, width), size, dtype=dtype, device=device)
        weight, bias = torch.randn(width, device=device), torch.randn(width, device=device)
        y, mean, rstd, _ = norm_forward(x, weight, bias, EPS, center=True)
        assert torch.equal(y, bias.to(dtype).expand(2, width))
        assert mean is not None
        assert rstd is not None
        assert torch.equal(mean, x[:, :1].float())
        dy = torch.rand(2, width, device=device).to(dtype)
        dx, dweight, _ = norm_backward(dy, x, mean, rstd, weight)
        assert dweight is not None
        assert not dweight.any()
        m = dy.double() * weight.double()
        assert dx is not None
        expected = (m - m.mean(1, keepdim=True)) * EPS**-0.5
        rtol = 1e-4 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(dx.double(), expected, rtol=rtol, atol=1e-2)


@pytest.mark.parametrize("width", [33, 64, 40000])
@pytest.mark.parametrize("center", [False, True], ids=["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float16)],
    ids=str,
)
def test_a_residual_of_another_dtype(
    dtypes: tuple[torch.dtype, torch.dtype], center: bool, width: int, device: str
) -> None:
    """The norm of PyTorch's sum, which is fp32; in the interpreter, bit for bit.

    A GPU's threads hold other elements where an operand has another width, so a row's sum may
    differ in its last bit.
    """
    x = normal(3, width, dtype=dtypes[0], device=device)
    other = normal(3, width, dtype=dtypes[1], device=device, seed=1)
    weight = normal(width, dtype=torch.float32, device=device, seed=2)
    for to in (None, "once to bfloat16"):
        more = {"center": center, "normalized_dtype": to}
        found = norm_forward(x, weight, weight, EPS, other=other, **more)
        expected = norm_forward(x + other, weight, weight, EPS, **more)
        assert torch.equal(found[3], x + other)
        assert found[0].dtype == (torch.float32 if to is None else torch.bfloat16)
        for one, of_sum in zip(found[::2], expected[::2], strict=True):
            if INTERPRETING:
                assert torch.equal(one, of_sum)
            else:
                close(one, of_sum.cpu().double())


@pytest.mark.parametrize("width", [100, 8200])
@pytest.mark.parametrize("center", [False, True], ids=["RMSNorm", "LayerNorm"])
def test_gradients_of_rows_whose_rstd_cubed_is_zero(device: str, center: bool, width: int) -> None:
    x = normal(2, width, dtype=torch.float32, device=device, seed=1) * 2.0**52
    dy = normal(2, width, dtype=torch.float32, device=device, seed=2)
    _, mean, rstd, _ = norm_forward(x, None, None, EPS, center=center)
    dx = norm_backward(dy, x, mean, rstd, None, want=("x",))[0]
    wide = x.double().requires_grad_()
    (expected,) = torch.autograd.grad(norm64(wide, None, None, False, center), wide, dy.double())
    assert (dx - expected).abs().max() < 1e-5 * expected.abs().max()


def fused(self: Any, x: Any, y: Any, z: Any) -> Any:
    """A multiply-add that rounds once, as on the chip; the interpreter's rounds twice."""
    a, b, c = (handle.data.astype(numpy.float64) for handle in (x, y, z))
    return interpreter.TensorHandle((a * b + c).astype(x.data.dtype), x.dtype.scalar)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_the_gradient_through_layernorm_of_one_column_is_0(
    affine: bool, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A multiply-add would leave half a unit of `dy * weight`; an infinity leaves a NaN."""
    if INTERPRETING:
        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)
    x, dy = (normal(67, 1, dtype=dtype, device=device, seed=seed) for seed in range(2))
    weight, bias = 2 * [torch.full((1,), 0.7, dtype=dtype, device=device)] if affine else 2 * [None]
    dy[5] = torch.inf
    _, mean, rstd, _ = norm_forward(x, weight, bias, EPS, center=True)
    assert rstd is not None
    dx, *_ = norm_backward(dy, x, mean, rstd, weight, bias)
    assert dx is not None
    expected = torch.zeros_like(dx)
    expected[5] = torch.nan
    assert torch.equal(dx.nan_to_num(7), expected.nan_to_num(7))


@pytest.mark.skipif(not INTERPRETING, reason="on a GPU benchmarks/numerics.py measures it")
@pytest.mark.parametrize("center, of_y, of_dx", [(False, 0.21, 0.25), (True, 0.193, 0.285)])
def test_products_on_the_way_lose_nothing_of_fp32(
    center: bool, of_y: float, of_dx: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quadratic means of errors, in units of each row's largest result.

    With what is normalized, or the gradient times the weight, rounded before it is used, they are
    0.225 and 0.261 of RMSNorm, where they are 0.194 and 0.236; 0.198 and 0.308 of LayerNorm, where
    they are 0.188 and 0.263.
    """
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", fused)
    generator = torch.Generator().manual_seed(0)
    rows, width = 2048, 64
    x, dy, weight, bias = (
        value + 0.5 * value.sign()
        for value in (
            torch.randn(shape, generator=generator)
            for shape in 2 * [(rows, width)] + 2 * [(width,)]
        )
    )
    given = (bias,) if center else (None,)
    y, mean, rstd, _ = norm_forward(x, weight, *given, EPS, center=center)
    assert rstd is not None
    dx, *_ = norm_backward(dy, x, mean, rstd, weight, *given)
    exact_x = x.double().requires_grad_()
    wide = (weight.double(), None if given[0] is None else given[0].double())
    exact = norm64(exact_x, *wide, False, center)
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy.double())
    for found, right, allowed in ((y, exact.detach(), of_y), (dx, exact_dx, of_dx)):
        assert found is not None
        off = (found.double() - right) / units(right.abs().amax(1, keepdim=True), torch.float32)
        assert float(off.square().mean().sqrt()) < allowed
