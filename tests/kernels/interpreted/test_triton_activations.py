"""The Triton activations against fp64 formulas and their autograd gradients, on the CPU."""

from functools import partial
from itertools import product
from math import pi, sqrt
from typing import NamedTuple

import edges
import pytest
import torch
from kernel_checks import DTYPES, INTERPRETING, close, laid_out, normal, twice
from torch import Tensor
from torch.nn import functional as F

import opsgraph as og
from benchmarks.numerics import error_of, every_number
from benchmarks.numerics_cases import gelu, gelu_erf, mish, sigmoid, swish, tanh
from opsgraph.kernels.reference.activations import Form, halves, joined
from opsgraph.kernels.triton.activations import activation_backward, activation_forward
from opsgraph.kernels.triton.functions import KINDS
from opsgraph.ops import GELU, XIELU, ClippedGELU

FUNCTIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_erf": F.gelu,
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "srelu": lambda x: torch.relu(x).square(),
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu6": lambda x: torch.where(x <= 0, 0, torch.where(x >= 6, 6, x)),
    "hardswish": lambda x: x * torch.where(x <= -3, 0, torch.where(x > 3, 6, x + 3)) / 6,
    "mish": F.mish,
    "leaky_relu": lambda x: torch.where(x > 0, x, x * 0.01),
    "gelu_clipped": lambda x: torch.where(F.gelu(x).abs() > 10, 10, F.gelu(x)),
}
STEPS = {
    "gelu steps": lambda x: 0.5 * x * (
        1.0 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * torch.pow(x, 3.0)))
    ),
    "gelu_fast steps": lambda x: 0.5 * x * (
        1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))
    ),
    "gelu_erf steps": lambda x: x * 0.5 * (1.0 + torch.erf(x / sqrt(2.0))),
    "qgelu steps": lambda x: x * torch.sigmoid(1.702 * x),
}  # fmt: skip
GATES = {
    "geglu": "gelu",
    "geglu_erf": "gelu_erf",
    "qgeglu": "qgelu",
    "reglu": "relu",
    "sreglu": "srelu",
    "swiglu": "silu",
}
GATED = {kind for kind, row in KINDS.items() if row.GATED} | {"clamped_swiglu after"}


def activation64(x: Tensor, kind: str, params: tuple[float, ...]) -> Tensor:
    if kind in FUNCTIONS:
        return FUNCTIONS[kind](x)
    a, b = x.chunk(2, 1)
    if kind in GATES:
        return FUNCTIONS[GATES[kind]](a) * b
    if kind == "glu":
        return torch.sigmoid(a) * b
    limit, alpha, offset = params or (7.0, 1.702, 1.0)
    if kind.endswith("after"):
        gate = a * torch.sigmoid(alpha * a)
        gate = torch.where(gate > limit, limit, gate)
        return gate * (torch.where(b.abs() > limit, limit * b.sign(), b) + offset)
    # Not torch.clamp, whose gradient at the limit differs between versions of PyTorch.
    a = torch.where(a > limit, limit, a)
    b = torch.where(b.abs() > limit, limit * b.sign(), b) + offset
    return a * torch.sigmoid(alpha * a) * b


class Case(NamedTuple):
    kind: str
    rows: int
    width: int  # on each side of the gate
    dtype: torch.dtype
    params: tuple[float, ...] = ()
    bias: bool = False
    x_layout: str = "contiguous"
    dy_layout: str = "contiguous"


def covering_cases() -> list[Case]:
    """Every kind with every dtype; shapes, layouts and the bias take turns at coprime periods."""
    shapes = [(1, 1), (4, 3), (33, 17), (5, 100), (2, 431), (3, 1000), (9, 64)]
    if not INTERPRETING:
        shapes += [(1025, 431), (3000, 1024), (130, 14336), (40, 65536), (7, 100003)]
    x_layouts = ["contiguous", "strided", "offset", "transposed", "expanded"]
    dy_layouts = ["scalar", "contiguous", "strided", "expanded", "offset", "transposed"]
    cases = []
    for n, (kind, dtype) in enumerate(product(sorted(KINDS), DTYPES)):
        for i in (n, n + 5) if INTERPRETING else range(n, n + len(shapes), 2):
            shape = shapes[i % len(shapes)]
            layouts = x_layouts[i % 5], dy_layouts[i % 6]
            cases.append(Case(kind, *shape, dtype, (), i % 2 == 0, *layouts))
    cases += [
        Case("clamped_swiglu", 5, 100, torch.float32, (0.5, 2.0, 0.25)),
        Case("clamped_swiglu", 5, 17, torch.bfloat16, (1.0, 1.0, 0.0), bias=True),
        Case("clamped_swiglu after", 5, 17, torch.float32, (0.5, 1.0, 0.0)),
    ]
    return cases


def name(case: Case) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in case)


@pytest.mark.sampled(32)
@pytest.mark.parametrize("case", covering_cases(), ids=name)
def test_forward_and_backward(case: Case, device: str) -> None:
    total = case.width * 2 if case.kind in GATED else case.width
    x = normal(case.rows, total, dtype=case.dtype, device=device) * 3
    limit = case.params[0] if case.params else 7.0
    edges = torch.tensor([0.0, limit, -limit, 20.0], dtype=case.dtype)
    x.view(-1)[: min(4, x.numel())] = edges[: min(4, x.numel())].to(device)
    x = laid_out(x, case.x_layout)
    bias = normal(total, dtype=case.dtype, device=device, seed=1) if case.bias else None
    y = twice(activation_forward, x, case.kind, case.params, bias=bias)
    pre = x if bias is None else (x.float() + bias.float()).to(case.dtype)
    pre64 = pre.cpu().double().requires_grad_()
    y64 = activation64(pre64, case.kind, case.params)
    close(y, y64.detach())

    dy = normal(case.rows, case.width, dtype=case.dtype, device=device, seed=2)
    dy = laid_out(dy, case.dy_layout)
    args, want = (dy, pre, case.kind, case.params), ("x", "y", "bias")
    dx, again, dbias = twice(activation_backward, *args, want=want)
    (dx64,) = torch.autograd.grad(y64, pre64, dy.cpu().double())
    # A slope is a difference of terms as large as the value, times dy.
    terms = dy.cpu().double() * y64.detach().abs()
    close(dx, dx64, terms)
    close(dbias, dx64.sum(0), dx64.abs().sum(0) + terms.abs().amax())
    assert torch.equal(again, y), "the backward's activation is not the forward's, bit for bit"


@pytest.mark.sampled(4)
@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("kind", ["swiglu", "geglu_erf", "reglu", "sreglu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_rounded_gate_is_an_activation_and_a_product(
    dtype: torch.dtype, kind: str, second: bool, device: str
) -> None:
    """Bit for bit what the activation gives alone, multiplied by PyTorch, and so the gradients."""
    x = normal(40, 200, dtype=dtype, device=device) * 3
    dy = normal(40, 100, dtype=dtype, device=device, seed=1)
    a, b = halves(x, None, second)
    act = activation_forward(a, GATES[kind])
    da = activation_backward(dy * b, a, GATES[kind])[0]
    given = str(Form(kind, rounded=True, second=second))
    assert torch.equal(activation_forward(x, given), act * b)
    dx, y, _ = activation_backward(dy, x, given, want=("x", "y"))
    assert torch.equal(y, act * b)
    assert torch.equal(dx, joined(da, dy * act, None, second))
    once = activation_forward(x, str(Form(kind, second=second)))
    assert torch.equal(once, y) == (kind == "reglu")  # max(a, 0) has no digit to round


def test_a_rounded_geglu_is_that_of_pytorch(device: str) -> None:
    x = normal(40, 200, dtype=torch.bfloat16, device=device)
    a, b = x.chunk(2, 1)
    expected = F.gelu(a, approximate="tanh") * b
    y = activation_forward(x, "geglu rounded")
    assert (y != expected).double().mean() < 2e-3
    assert (y != activation_forward(x, "geglu")).double().mean() > 0.1
    dy = normal(40, 100, dtype=torch.bfloat16, device=device, seed=1)
    assert torch.equal(activation_backward(dy, x, "geglu rounded", want=("y",))[1], y)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("width", [24, 300])
@pytest.mark.parametrize("block", [1, 3, 12])
@pytest.mark.parametrize("kind", ["swiglu", "geglu_erf second", "clamped_swiglu rounded"])
def test_an_interleaved_gate_is_that_of_halves(
    kind: str, block: int, width: int, device: str
) -> None:
    """Bit for bit what the halves give, in another order."""
    plain = normal(7, 2 * width, dtype=torch.bfloat16, device=device) * 3
    dy = normal(7, width, dtype=torch.bfloat16, device=device, seed=1)
    bias = normal(2 * width, dtype=torch.float32, device=device, seed=2)
    x, mixed = (joined(*t.chunk(2, 1), block) for t in (plain, bias[None]))
    y = activation_forward(x, kind, (), mixed[0], interleave=block)
    assert torch.equal(y, activation_forward(plain, kind, (), bias))
    want = ("x", "y", "bias")
    found = activation_backward(dy, x, kind, want=want, interleave=block)
    expected = activation_backward(dy, plain, kind, want=want)
    assert torch.equal(found[0], joined(*expected[0].chunk(2, 1), block))
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[2], joined(*expected[2][None].chunk(2, 1), block)[0])


@pytest.mark.parametrize("kind", STEPS)
def test_rounded_steps_are_those_of_pytorch(kind: str, device: str) -> None:
    x = torch.linspace(-8, 8, 4001, device=device).bfloat16()[None]
    y, plain = activation_forward(x, kind), kind.removesuffix(" steps")
    assert (y != STEPS[kind](x)).double().mean() < 2e-3
    assert (y != activation_forward(x, plain)).double().mean() > 0.1
    dy = normal(*x.shape, dtype=torch.bfloat16, device=device)
    dx, again, _ = activation_backward(dy, x, kind, want=("x", "y"))
    assert torch.equal(dx, activation_backward(dy, x, plain)[0])
    assert torch.equal(again, y)


SUBSETS = [(), ("x",), ("y",), ("bias",), ("x", "y"), ("y", "bias"), ("x", "bias")]


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("want", SUBSETS, ids="+".join)
def test_backward_computes_what_is_wanted(want: tuple[str, ...], kind: str, device: str) -> None:
    x = normal(70, 34, dtype=torch.float16, device=device)
    dy = normal(70, 17 if kind in GATED else 34, dtype=torch.float16, device=device, seed=1)
    got = activation_backward(dy, x, kind, want=want, bias_dtype=torch.float32)
    x64 = x.cpu().double().requires_grad_()
    y64 = activation64(x64, kind, ())
    (dx64,) = torch.autograd.grad(y64, x64, dy.cpu().double())
    for key, value, value64 in zip(
        ("x", "y", "bias"), got, (dx64, y64.detach(), dx64.sum(0)), strict=True
    ):
        assert (value is None) == (key not in want)
        if value is not None:
            assert value.dtype == (torch.float32 if key == "bias" else x.dtype)
            close(value, value64, dx64.abs().sum(0) if key == "bias" else 0.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["gelu", "swiglu", "clamped_swiglu"])
def test_results_may_be_written_over_what_they_are_made_of(
    kind: str, bias: bool, device: str
) -> None:
    dtype, want = torch.bfloat16, ("x", "y", "bias") if bias else ("x", "y")
    x = normal(37, 144 if "glu" in kind else 72, dtype=dtype, device=device)
    dy = normal(37, 72, dtype=dtype, device=device, seed=1)
    expected = activation_backward(dy, x, kind, want=want)
    found = activation_backward(dy, x, kind, want=want, to=(x, dy))
    assert found[0] is x
    assert found[1] is dy
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    strided = normal(37, 144, dtype=dtype, device=device)[:, :72]
    made = activation_backward(dy, x, kind, want=("y",), to=(None, strided))[1]
    assert made is not strided


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (0, 0)])
def test_empty(kind: str, shape: tuple[int, int], device: str) -> None:
    x = torch.empty(*shape, device=device)
    y = activation_forward(x, kind)
    assert y.shape == (shape[0], shape[1] // 2 if kind in GATED else shape[1])
    dx, again, dbias = activation_backward(y, x, kind, want=("x", "y", "bias"))
    assert (dx.shape, again.shape) == (x.shape, y.shape)
    assert torch.equal(dbias, torch.zeros(shape[1], device=device))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_nan_stays(kind: str, device: str) -> None:
    """A clamp or a relu that swallows NaN would hide a diverged run."""
    x = torch.ones(1, 6, device=device)
    x[0, 1] = x[0, 5] = float("nan")
    y = activation_forward(x, kind)
    expected = activation64(x.cpu().double(), kind, ())
    assert torch.equal(y.cpu().isnan(), expected.isnan())


def test_errors(device: str) -> None:
    x = torch.ones(2, 7, device=device)
    with pytest.raises(ValueError, match=r"unknown activation 'cubic'; known: gelu, "):
        activation_forward(x, "cubic")
    with pytest.raises(ValueError, match=r"swiglu halves its input's width, which is odd: 7"):
        activation_forward(x, "swiglu")
    with pytest.raises(ValueError, match=r"expected \(limit, alpha, offset\)"):
        activation_forward(x, "clamped_swiglu", (1.0,))
    with pytest.raises(ValueError, match=r"'gelu' got params \(1.0,\), expected none"):
        activation_forward(x, "gelu", (1.0,))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", edges.SMOOTH)
def test_smooth_activations_have_their_limits(kind: str, dtype: torch.dtype, device: str) -> None:
    x, value, slope = edges.smooth_limits(kind, dtype)
    expected, dx = value, slope
    if kind in GATED:
        x = torch.cat((x, torch.full_like(x, 1.5)), 1)
        expected, dx = 1.5 * value, torch.cat((1.5 * slope, value), 1)
    x, dy = x.to(device), torch.ones_like(value, dtype=dtype, device=device)
    found, again, _ = activation_backward(dy, x, kind, want=("x", "y"))
    for got, right in ((activation_forward(x, kind), expected), (again, expected), (found, dx)):
        assert got is not None
        rtol = 2e-5 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(got.cpu(), right.to(dtype), rtol=rtol, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("kind", edges.MASKED)
def test_masked_gradients_are_zero_whatever_they_are_multiplied_with(
    kind: str, device: str
) -> None:
    dy, a, b = edges.masked_cases(kind)
    y, da, db = edges.masked_gradients(kind, dy, a, b)
    x = torch.cat((a, b), 1) if kind in GATED else a
    assert edges.no_worse(activation_forward(x.to(device), kind).cpu(), y)
    found = activation_backward(dy.to(device), x.to(device), kind)[0]
    assert found is not None
    dx = found.cpu()
    known = ~a.isnan() & ~(b.isnan() & torch.tensor(kind == "clamped_swiglu"))
    assert edges.no_worse(dx[:, :1][known], da[known])
    assert kind not in GATED or edges.no_worse(dx[:, 1:][known], db[known])
    masked = (a > 7) if kind == "clamped_swiglu" else a <= 0
    assert not dx[:, :1][masked].any()


EXACT = {
    "silu": (swish, 3.0), "qgelu": (partial(swish, alpha=1.702), 3.0), "sigmoid": (sigmoid, 4.0),
    "tanh": (tanh, 3.0), "mish": (mish, 4.0), "gelu": (gelu, 110.0), "gelu_erf": (gelu_erf, 60.0),
}  # fmt: skip
"""fp64, and the units in the last place that fp32 may be off: GELUs have e to a rounded power."""


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", EXACT)
def test_fp32_has_all_digits_at_every_exponent(kind: str, device: str) -> None:
    """Far below 0, too, where the argument of an exponential is large and its result is small."""
    x = every_number(torch.float32, 32)[None]
    function, units = EXACT[kind]
    exact, one = function(x.double()), torch.ones_like(x)
    y = activation_forward(x.to(device), kind).cpu()
    dx = activation_backward(one.to(device), x.to(device), kind)[0]
    assert dx is not None
    results = ((y, exact.value, exact.value.abs()), (dx.cpu(), exact.slope, exact.size))
    for found, right, size in results:
        off = error_of(found, right, size)[size > 2.0**-119]
        assert off.max() <= units


def test_the_slope_of_tanh_in_16_bits_does_not_cancel(device: str) -> None:
    """Where tanh is 1 to all digits it still has one."""
    x = torch.tensor([[0.3, 0.5, 3.0, 9.0, 16.0, 40.0]], dtype=torch.bfloat16)
    x = torch.cat((x, -x), 1)
    found = activation_backward(torch.ones_like(x).to(device), x.to(device), "tanh")[0]
    assert found is not None
    exact = torch.cosh(x.double()) ** -2
    torch.testing.assert_close(found.cpu().double(), exact, rtol=0.02, atol=0.0)


@pytest.mark.parametrize("activation", [GELU, ClippedGELU, XIELU])
def test_what_has_no_gate_does_not_interleave(activation: type[og.Op], device: str) -> None:
    """Such an attribute is none of its own."""
    backends = "triton", "aten", "reference"
    module = og.Sequential(activation(), backends=backends, device=device, dtype=torch.float32)
    x = normal(5, 48, dtype=torch.float32, device=device).requires_grad_()
    found = []
    for size in (None, 4):
        module[0].glu_interleave_size = size
        y = module(x)
        found.append([y, *torch.autograd.grad(y, x, y.detach())])
    assert all(map(torch.equal, *found))
