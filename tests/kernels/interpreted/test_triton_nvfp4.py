"""The NVFP4 kernels give the bits of the reference quantizer, of the unfused kernels' output.

The reference is itself held to an independent oracle: `test_reference_quantize.py`.
"""

from collections.abc import Callable

import pytest
import torch
from kernel_checks import DTYPES, LAYOUTS, bits, laid_out, normal
from torch import Tensor

from opsgraph.kernels.formats import NVFP4, Copies
from opsgraph.kernels.triton.activations import activation_backward, activation_forward
from opsgraph.kernels.triton.norms import norm_forward
from opsgraph.kernels.triton.quantize import activation_quantize, quantize
from opsgraph.kernels.triton.quantize_backward import activation_backward_quantize
from opsgraph.kernels.triton.quantize_norms import (
    norm_quantize,
)
from opsgraph.quantizers import NVFP4Quantizer

EPS, BOTH = 1e-5, ("row", "col")
FEW = [NVFP4(), NVFP4(1, True, True), NVFP4(16)]
TARGETS = [NVFP4(h, s, t) for h in (1, 16) for s in (False, True) for t in (False, True)]


def check(made: Callable[[], Copies], x: Tensor, to: NVFP4, want: tuple[str, ...]) -> None:
    """made gives the reference's copies of x, from the same state of the device's generator."""
    torch.manual_seed(3)
    found = made()
    torch.manual_seed(3)
    expected = NVFP4Quantizer(*to)(x, want)
    for one, other in ((found.row, expected.row), (found.col, expected.col)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            for part, right in zip(one, other.parts, strict=True):
                assert (part.shape, part.dtype) == (right.shape, right.dtype)
                assert part.is_contiguous()
                numbers = part.dtype == torch.float32 and bool(part.isnan())
                assert right.isnan() if numbers else torch.equal(bits(part), bits(right))


def special(rows: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows of zeros, of either sign, and small values among ordinary ones."""
    x = normal(rows, width, dtype=torch.float32, device=device, seed=width)
    x[1::7] = 0.0
    x[2::7, ::3] = -0.0
    x[4::7] *= 2.0**-20
    return x.to(dtype)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("to", TARGETS, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "dtype"), [(80, 96, torch.bfloat16), *((33, 70, dtype) for dtype in DTYPES)]
)
def test_quantize(rows: int, width: int, dtype: torch.dtype, to: NVFP4, device: str) -> None:
    x = special(rows, width, dtype, device)
    check(lambda: quantize(x, to, want=BOTH), x, to, BOTH)


@pytest.mark.parametrize("power", [-140, 120])
@pytest.mark.parametrize("to", TARGETS, ids=str)
def test_extreme_values(to: NVFP4, power: int, device: str) -> None:
    x = special(20, 40, torch.float32, device) * 2.0**power
    check(lambda: quantize(x, to, want=BOTH), x, to, BOTH)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("to", FEW, ids=str)
def test_what_is_not_finite(to: NVFP4, value: float, device: str) -> None:
    x = special(20, 40, torch.bfloat16, device)
    x[3, 5] = value
    check(lambda: quantize(x, to, want=BOTH), x, to, BOTH)


@pytest.mark.parametrize("want", [("row",), ("col",)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_wishes(layout: str, want: tuple[str, ...], device: str) -> None:
    x, to = laid_out(special(18, 48, torch.bfloat16, device), layout), NVFP4(1, True, True)
    check(lambda: quantize(x, to, want=want), x, to, want)


def test_no_wish_is_no_copy(device: str) -> None:
    x = special(18, 48, torch.bfloat16, device)
    assert quantize(x, NVFP4(1, True, True), want=())[:3] == (None, None, None)


@pytest.mark.parametrize("shape", [(0, 16), (5, 0), (1, 1)])
@pytest.mark.parametrize("to", TARGETS[:4], ids=str)
def test_empty_and_tiny(to: NVFP4, shape: tuple[int, int], device: str) -> None:
    x = torch.ones(shape, device=device)
    check(lambda: quantize(x, to, want=BOTH), x, to, BOTH)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("to", [NVFP4(), NVFP4(1, True, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms(dtype: torch.dtype, to: NVFP4, device: str) -> None:
    x, other = (normal(33, 200, dtype=dtype, device=device, seed=i) for i in (1, 2))
    weight, bias = (normal(200, dtype=torch.float32, device=device, seed=i) for i in (3, 4))
    y, _, rstd, total = norm_forward(x, weight, None, EPS, True, other)
    found = []

    def rmsnorm() -> Copies:
        found[:] = norm_quantize(x, weight, None, EPS, to, True, other, want=(*BOTH, "rstd"))
        return found[0]

    check(rmsnorm, y, to, BOTH)
    assert torch.equal(found[2], rstd)
    assert torch.equal(found[3], total)
    y = norm_forward(x, weight, bias, EPS, center=True)[0]
    for want in (("row",), BOTH):
        check(
            lambda want=want: norm_quantize(x, weight, bias, EPS, to, center=True, want=want)[0],
            y, to, want,
        )  # fmt: skip


@pytest.mark.parametrize("to", [NVFP4(), NVFP4(1, True, True)], ids=str)
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations(dtype: torch.dtype, kind: str, to: NVFP4, device: str) -> None:
    x = normal(33, 140, dtype=dtype, device=device)
    y = activation_forward(x, kind)
    check(lambda: activation_quantize(x, kind, to, want=BOTH), y, to, BOTH)


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("kind", "dtype", "width"),
    [("gelu", torch.bfloat16, 70), ("swiglu", torch.bfloat16, 80), ("geglu", torch.float32, 16)],
)
@pytest.mark.parametrize("to", FEW, ids=str)
def test_activation_backward(
    to: NVFP4, kind: str, dtype: torch.dtype, width: int, device: str
) -> None:
    x = normal(90, width * 2 if "glu" in kind else width, dtype=dtype, device=device)
    dy = normal(90, width, dtype=dtype, device=device, seed=1)
    dx, y, dbias = activation_backward(dy, x, kind, want=("x", "y", "bias"))
    y_to, found = to._replace(stochastic=False), []

    def backward(y_want: tuple[str, ...] = ("col",), dbias: torch.dtype | None = torch.float32):
        found[:] = activation_backward_quantize(
            dy, x, kind, to, want=BOTH, y_to=y_to, y_want=y_want, dbias=dbias
        )
        return found[0]

    check(backward, dx, to, BOTH)
    check(lambda: found[1], y, y_to, ("col",))
    torch.testing.assert_close(found[2], dbias.float(), rtol=1e-2, atol=0.5)
    check(lambda: backward((), None), dx, to, BOTH)
    assert tuple(found[1:]) == (Copies(None, None, None), None)


def test_bias_gradient_alone_and_of_nothing(device: str) -> None:
    """The sums are of unrounded values: in fp64, closer than those of bf16 could be."""
    x, dy = (normal(300, 64, dtype=torch.bfloat16, device=device, seed=i) for i in (1, 2))
    *copies, dbias = activation_backward_quantize(
        dy, x, "relu", NVFP4(), want=(), dbias=torch.float32
    )
    assert copies == [Copies(None, None, None)] * 2
    right = torch.where(x > 0, dy, 0.0).double().sum(0)
    torch.testing.assert_close(dbias.double(), right, rtol=1e-5, atol=1e-5)
    none = x[:0]
    dx, _, dbias = activation_backward_quantize(
        none, none, "relu", NVFP4(), want=BOTH, dbias=torch.float32
    )
    check(lambda: dx, none, NVFP4(), BOTH)
    assert torch.equal(dbias, torch.zeros(64, device=device))


def test_errors() -> None:
    x = torch.ones(2, 16)
    with pytest.raises(ValueError, match="NVFP4 has blocks of 1 or 16 rows, got 2"):
        quantize(x, NVFP4(2))
    with pytest.raises(ValueError, match="NVFP4 takes no scale and gives no amax but"):
        quantize(x, NVFP4(), torch.ones(()))
    with pytest.raises(ValueError, match="NVFP4 takes no scale and gives no amax but"):
        quantize(x, NVFP4(), want=("amax",))
    with pytest.raises(ValueError, match="swiglu has halves of 8 columns, expected a multiple of"):
        activation_backward_quantize(x[:, :8], x, "swiglu", NVFP4())
    with pytest.raises(ValueError, match="that differ in dtype or rounding alone"):
        activation_backward_quantize(x, x, "gelu", NVFP4(), y_to=NVFP4(hadamard=True))
