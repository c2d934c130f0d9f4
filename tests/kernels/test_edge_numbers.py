"""Numbers at the edge, by the formulas in PyTorch and by the C++ kernels.

`interpreted` has the same tests of Triton's kernels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import edges
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import opsgraph as og
from benchmarks.numerics_cases import mish, sigmoid, swish
from opsgraph import ops
from opsgraph.kernels.cpu import activations as cpu_activations
from opsgraph.kernels.cpu import build
from opsgraph.kernels.cpu import norms as cpu_norms
from opsgraph.kernels.reference import activations, norms

pytestmark = pytest.mark.usefixtures("seeded")
needs_compiler = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
each_backend = pytest.mark.parametrize(
    "backend", ["reference", pytest.param("cpu", marks=needs_compiler)]
)
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}
each_dtype = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
PARAMS = {"clamped_swiglu": (7.0, 1.702, 1.0)}


def forward(backend: str, x: Tensor, kind: str) -> Tensor:
    if backend == "cpu":
        return cpu_activations.activation_forward(x, kind)[0]
    if cpu_activations.KINDS[kind].gated:
        return activations.activation_forward(x, kind, PARAMS.get(kind, ()))
    return activations.activation_forward(x, kind)


def backward(backend: str, dy: Tensor, x: Tensor, kind: str) -> Tensor:
    if backend == "cpu":
        dx = cpu_activations.activation_backward(dy, x, kind)[0]
        assert dx is not None
        return dx
    if cpu_activations.KINDS[kind].gated:
        return activations.activation_backward(dy, x, kind, PARAMS.get(kind, ()))
    return activations.activation_backward(dy, x, kind)


def close(found: Tensor, expected: Tensor) -> None:
    expected = expected.to(found.dtype)
    rtol = TOLERANCES[found.dtype]
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-6, equal_nan=True)


FAR_BELOW = {
    -12.0: (-1.63598544935348106e-61, -5.29040335252255846e-60),
    -8.0: (-3.10778293750111122e-21, -4.71478450410684158e-20),
    -5.0: (-2.29179619662950605e-7, -1.5463619875325946e-6),
    -0.75: (-0.170039444834379696, 0.00106174386258570234),
    2.0: (1.95459769408777502, 1.08609925662361838),
}
"""GELU with tanh and its slope, of 300 digits."""


@pytest.mark.parametrize("kind", ["gelu", "gelu_fast"])
def test_gelu_in_fp64_is_exact_where_pytorchs_is_0(kind: str) -> None:
    x = torch.tensor([*FAR_BELOW], dtype=torch.float64)
    right = torch.tensor([*FAR_BELOW.values()], dtype=torch.float64)
    found = (
        activations.activation_forward(x, kind),
        activations.activation_backward(torch.ones_like(x), x, kind),
    )
    torch.testing.assert_close(torch.stack(found, 1), right, rtol=1e-13, atol=0)


@each_backend
@each_dtype
@pytest.mark.parametrize("kind", edges.SMOOTH)
def test_smooth_activations_have_their_limits(backend: str, dtype: torch.dtype, kind: str) -> None:
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("has no kernel for it")
    x, value, slope = edges.smooth_limits(kind, dtype)
    if not cpu_activations.KINDS[kind].gated:
        close(forward(backend, x, kind), value)
        close(backward(backend, torch.ones_like(x), x, kind), slope)
        return
    both = torch.cat((x, torch.full_like(x, 1.5)), 1)
    close(forward(backend, both, kind), 1.5 * value)
    close(backward(backend, torch.ones_like(x), both, kind), torch.cat((1.5 * slope, value), 1))


@each_backend
@pytest.mark.parametrize("kind", edges.MASKED)
def test_masked_gradients_are_zero_whatever_they_are_multiplied_with(
    backend: str, kind: str
) -> None:
    dy, a, b = edges.masked_cases(kind)
    y, da, db = edges.masked_gradients(kind, dy, a, b)
    gated = cpu_activations.KINDS[kind].gated
    x = torch.cat((a, b), 1) if gated else a
    assert edges.no_worse(forward(backend, x, kind), y)
    dx = backward(backend, dy, x, kind)
    known = ~a.isnan() & ~(b.isnan() & torch.tensor(kind == "clamped_swiglu"))
    assert edges.no_worse(dx[:, :1][known], da[known])
    assert not gated or edges.no_worse(dx[:, 1:][known], db[known])
    masked = (a > 7) if kind == "clamped_swiglu" else a <= 0
    assert not dx[:, :1][masked].any()


@needs_compiler
@pytest.mark.parametrize("alpha", [-1.702, 0.0, 1e-3, 1e30])
def test_clamped_swiglu_of_any_alpha(alpha: float) -> None:
    a = torch.tensor([[-300.0, -60.0, -1.0, -0.0, 0.5, 3.0, 6.9]]).t().contiguous()
    x, params = torch.cat((a, a.flip(0)), 1), (7.0, alpha, 1.0)
    y = cpu_activations.activation_forward(x, "clamped_swiglu", params)[0]
    close(y, activations.activation_forward(x.double(), "clamped_swiglu", params))
    dx = cpu_activations.activation_backward(y, x, "clamped_swiglu", params)[0]
    assert dx is not None
    expected = activations.activation_backward(y.double(), x.double(), "clamped_swiglu", params)
    close(dx, expected)


FAR = {
    "silu": swish, "qgelu": partial(swish, alpha=1.702), "glu": sigmoid, "mish": mish,
    "clamped_swiglu": partial(swish, alpha=1.702),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("kind", FAR)
def test_far_below_zero_results_have_all_digits(kind: str) -> None:
    """No product that an exponential takes is rounded; none overflows before PyTorch's does."""
    gated, alpha = cpu_activations.KINDS[kind].gated, 1.702 if "q" in kind or "cl" in kind else 1.0
    a = -torch.linspace(20, 88.7, 5001)[None] / alpha
    ones = torch.ones_like(a)
    x = torch.cat((a, 0 * a if kind == "clamped_swiglu" else ones), 1) if gated else a
    exact = FAR[kind](a.double())
    off = (forward("cpu", x, kind) / exact.value - 1).abs()
    assert off.max() < 3 * 2.0**-23
    dx = backward("cpu", ones, x, kind)[:, : a.shape[1]]
    off = (dx / exact.slope - 1).abs()[exact.slope.abs() > 2.0**-119]
    assert off.max() < 4 * 2.0**-23


def norm(
    backend: str, x: Tensor, dy: Tensor, weight: Tensor, center: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dweight."""
    found: tuple[Any, ...]
    if backend == "cpu":
        y, mean, rstd, _ = cpu_norms.norm_forward(x, weight, None, 1e-5, center=center)
        found = cpu_norms.norm_backward(dy, x, mean, rstd, weight, want=("x", "weight"))
    elif center:
        y, mean, rstd = norms.layernorm_forward(x, weight, None, 1e-5, False)
        wanted = (True, True, False)
        found = norms.layernorm_backward(dy, x, mean, rstd, weight, None, False, wanted)
    else:
        y, rstd = norms.rmsnorm_forward(x, weight, 1e-5, False)
        found = norms.rmsnorm_backward(dy, x, rstd, weight, False, True, True)
    return y, found[0], found[1]


@each_backend
@each_dtype
@pytest.mark.parametrize("width", [1, 100, 4099])
@pytest.mark.parametrize("center", [False, True], ids=["RMSNorm", "LayerNorm"])
def test_norms_of_rows_that_are_equal_or_huge(
    backend: str, dtype: torch.dtype, width: int, center: bool
) -> None:
    if backend == "cpu" and dtype == torch.float16:
        pytest.skip("has no kernel for it")
    dy, weight = torch.rand(2, width).to(dtype), torch.randn(width)
    for name, rows in edges.norm_rows(width).items():
        x = rows.to(dtype)
        if not x.isfinite().all():
            continue
        y, dx, dweight = norm(backend, x, dy, weight, center)
        y64, dx64, dweight64 = edges.norm64(x, dy, weight, center)
        rtol = max(
            TOLERANCES[dtype], 1e-3 if name == "nearly equal" else 0.0
        )  # the mean's rounding
        for found, expected in ((y, y64), (dx, dx64), (dweight, dweight64)):
            size = max(float(expected.abs().max()), 1e-37)
            if not center and width == 1 and found is dx:
                size = float((dy.double() * weight / x.double().abs().clamp_min(1e-3)).abs().max())
            error = (found.double() - expected).abs().max()
            assert error <= rtol * size + 1e-37, f"{name}: {error} of {size}"
        if center and name.startswith("equal"):
            assert not y.any()
            assert not dweight.any()


@each_backend
def test_norms_of_wide_rows_are_as_exact_as_pytorchs(backend: str) -> None:
    width = 65536
    for x in (torch.full((1, width), 3.3), torch.tensor([3.3, -3.3]).repeat(width // 2)[None]):
        weight, dy = torch.ones(width), torch.rand(1, width)
        for center in (False, True):
            y = norm(backend, x, dy, weight, center)[0]
            error = (y - edges.norm64(x, dy, weight, center)[0]).abs().max()
            assert error < 5e-8, "half a unit in the last place of 1 is 6e-8"


def test_layernorms_weight_has_no_gradient_from_equal_values() -> None:
    for dtype, size in ((torch.float16, 5e4), (torch.float32, 1e6), (torch.bfloat16, 3e38)):
        for width in (1, 24):
            module = og.Sequential(ops.LayerNorm(width, dtype=dtype))
            x = torch.full((3, width), size, dtype=dtype, requires_grad=True)
            module(x).backward(torch.rand(3, width).to(dtype))
            assert not module[0].weight.grad.any()
            assert x.grad is not None
            assert x.grad.isfinite().all()
            assert width > 1 or not x.grad.any()


def test_l2normalization_of_huge_rows() -> None:
    module = og.Sequential(ops.L2Normalization())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((2, 4), 3e38, dtype=dtype, requires_grad=True)
        y = module(x)
        assert torch.equal(y, torch.full_like(y, 0.5))
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.isfinite().all()


def test_an_rmsnorm_of_no_columns_trains_in_fp16() -> None:
    module = og.Sequential(ops.RMSNorm(0, dtype=torch.float16))
    x = torch.empty(3, 0, dtype=torch.float16, requires_grad=True)
    module(x).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("function", [F.silu, F.relu], ids=["silu", "relu"])
def test_usual_values_are_pytorchs(
    dtype: torch.dtype, function: Callable[[Tensor], Tensor]
) -> None:
    x = torch.randn(20, 30).to(dtype)
    kind = {F.silu: "silu", F.relu: "relu"}[function]
    assert torch.equal(activations.activation_forward(x, kind), function(x.float()).to(dtype))
