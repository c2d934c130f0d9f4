"""The CPU's C++ kernels against the formulas in fp64, plain autograd for their gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from opsgraph import ops
from opsgraph.kernels.cpu import activations, build, norms
from opsgraph.kernels.cpu.transpose import transposed
from opsgraph.kernels.reference import activations as reference
from opsgraph.testing.formulas import FORMULAS, layernorm, rmsnorm

pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
]

DTYPES = (torch.float32, torch.bfloat16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
TOLERANCES = {
    torch.float32: (1e-5, 2e-6),
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (8e-3, 1e-5),
}
SAMPLES = [*ops.activations.Activation.sample(), *ops.activations.GatedActivation.sample()]
SWISHES = [op for op in SAMPLES if not getattr(op, "round_steps", False)]
"""All that differ from the formula by their last digit."""
each_activation = pytest.mark.parametrize(
    "op", SWISHES, ids=lambda op: f"{op.kind}-{op.extra_repr()}"
)


def close(found: Tensor | None, expected: Tensor, depth: int = 1) -> None:
    """depth: how many terms a result sums up; its error grows with the root of that."""
    assert found is not None
    rtol, atol = TOLERANCES[found.dtype]
    expected = expected.detach()
    size = max(1.0, float(expected.abs().nan_to_num(posinf=0).max())) if expected.numel() else 1.0
    atol *= size * max(1.0, math.sqrt(depth))
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol, equal_nan=True)


def random(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


class Norm:
    """Random arguments of a norm, its results by the kernels, and in fp64."""

    def __init__(
        self, rows: int, width: int, dtype: torch.dtype, center: bool, affine: bool = True,
        zero_centered: bool = False, weight_dtype: torch.dtype = torch.float32, shift: float = 0.0,
    ) -> None:  # fmt: skip
        self.center, self.eps, self.zero_centered_gamma = center, 1e-5, zero_centered
        self.x = (torch.randn(rows, width) * 2 + shift).to(dtype)
        self.other, self.dother = random(rows, width, dtype=dtype), random(rows, width, dtype=dtype)
        self.dy = random(rows, width, dtype=dtype)
        self.weight = random(width, dtype=weight_dtype) if affine else None
        self.bias = random(width, dtype=weight_dtype) if affine and center else None

    def forward(self, residual: bool, **more: Any) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """y, the sum that the norm read, and its statistics."""
        other = self.other if residual else None
        options = dict(zero_centered=self.zero_centered_gamma, other=other, **more)
        y, mean, rstd, total = norms.norm_forward(
            self.x, self.weight, self.bias, self.eps, center=self.center, **options
        )
        assert (mean is not None) == self.center
        return y, self.x if total is None else total, (mean, rstd)

    def backward(
        self, x: Tensor, statistics: tuple[Tensor, ...], residual: bool, **more: Any
    ) -> tuple[Any, ...]:
        """dx, the parameters' gradients, y."""
        dother = self.dother if residual else None
        options = dict(
            zero_centered=self.zero_centered_gamma, dother=dother,
            want=("x", "weight", "bias", "y"), **more,
        )  # fmt: skip
        return norms.norm_backward(self.dy, x, *statistics, self.weight, self.bias, **options)

    def expected(self, total: Tensor, residual: bool) -> tuple[Tensor, list[Tensor | None]]:
        """y, and gradients of the sum, the weight and the bias."""
        given = {"x": total, "weight": self.weight, "bias": self.bias}
        wide = {k: None if v is None else v.double().requires_grad_() for k, v in given.items()}
        y = (layernorm if self.center else rmsnorm)(self, wide["x"], wide.get)
        inputs = [value for value in wide.values() if value is not None]
        found = iter(torch.autograd.grad(y, inputs, self.dy.double()))
        grads = [None if value is None else next(found) for value in wide.values()]
        if residual:
            assert grads[0] is not None
            grads[0] = grads[0] + self.dother.double()
        return y, grads


@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize(
    "options",
    [{}, {"zero_centered": True}, {"affine": False}, {"weight_dtype": torch.bfloat16},
     {"weight_dtype": torch.float16, "zero_centered": True}],
    ids=["plain", "zero-centred", "no affine", "bf16 weight", "fp16 weight"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(5, 1), (1, 64), (37, 431), (300, 100), (3, 5000)], ids=str)
@pytest.mark.parametrize("center", [False, True], ids=["RMSNorm", "LayerNorm"])
@each_dtype
def test_norms_equal_the_formula(
    dtype: torch.dtype, center: bool, shape: tuple[int, int], options: Any, residual: bool
) -> None:
    norm = Norm(*shape, dtype, center, **options)
    y, total, statistics = norm.forward(residual)
    if residual:
        assert torch.equal(total, norm.x + norm.other)
    expected, (dx, dweight, dbias) = norm.expected(total, residual)
    close(y, expected)
    found = norm.backward(total, statistics, residual)
    if shape[1] > 1:  # of one column the gradient is rounding errors alone
        close(found[0], dx)
    if dweight is not None:
        assert found[1].dtype == norm.weight.dtype
        close(found[1], dweight, shape[0])
    if dbias is not None:
        close(found[2], dbias, shape[0])
    assert torch.equal(found[-1], y), "y computed again has other bits"


@pytest.mark.parametrize("center", [False, True], ids=["RMSNorm", "LayerNorm"])
def test_statistics_are_those_of_the_formula(center: bool) -> None:
    norm = Norm(9, 77, torch.bfloat16, center)
    x = norm.x.double()
    *mean, rstd = norm.forward(False)[2]
    assert rstd.shape == (9, 1)
    centred = x - x.mean(1, keepdim=True) if center else x
    close(rstd, (centred.square().mean(1, keepdim=True) + norm.eps).rsqrt())
    if center:
        close(mean[0], x.mean(1, keepdim=True))


def test_layernorm_of_rows_with_a_large_mean() -> None:
    norm = Norm(20, 1000, torch.float32, True, affine=False, shift=1e4)
    y, total, _ = norm.forward(False)
    error = (y.double() - norm.expected(total, False)[0]).abs().max()
    assert error < 1e-3, "the mean itself is rounded to 2^-11 here"


@pytest.mark.parametrize("center", [False, True], ids=["RMSNorm", "LayerNorm"])
@each_dtype
def test_norms_keep_bad_rows_to_themselves(dtype: torch.dtype, center: bool) -> None:
    norm = Norm(6, 50, dtype, center, affine=False)
    norm.x[1, 7], norm.x[2, 3] = float("nan"), float("inf")
    norm.x[3] = 1e-40
    y, total, statistics = norm.forward(False)
    assert y[1:3].isnan().any(1).all()
    close(y[[0, 3, 4, 5]], norm.expected(total, False)[0][[0, 3, 4, 5]])
    dx = norm.backward(total, statistics, False)[0]
    assert dx[[0, 3, 4, 5]].isfinite().all()
    assert dx[1].isnan().all()


@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("center", [False, True], ids=["RMSNorm", "LayerNorm"])
def test_empty_norms(shape: tuple[int, int], center: bool) -> None:
    norm = Norm(*shape, torch.float32, center)
    y, total, statistics = norm.forward(True)
    assert y.shape == total.shape == shape
    dx, dweight, *_ = norm.backward(total, statistics, True)
    assert dx.shape == shape
    assert torch.equal(dweight, torch.zeros(shape[1]))


def strided(x: Tensor) -> dict[str, Tensor]:
    """The same values in other layouts."""
    rows, width = x.shape
    padded = torch.full((rows, width + 3), float("nan"), dtype=x.dtype)
    padded[:, 1 : width + 1] = x
    return {
        "rows apart": padded[:, 1 : width + 1],
        "by columns": x.t().contiguous().t(),
        "rows reversed": x.flip(0).contiguous().flip(0),
    }


@each_dtype
def test_strided_and_expanded_tensors(dtype: torch.dtype) -> None:
    norm = Norm(40, 30, dtype, True)
    y, x, statistics = norm.forward(True)
    alone = norm.forward(False)[0]
    grads = norm.backward(x, statistics, True)
    pre, dy = random(40, 30, dtype=dtype), random(40, 15, dtype=dtype)
    act, dpre = activations.activation_forward(pre, "swiglu")[0], None
    dpre = activations.activation_backward(dy, pre, "swiglu")[0]
    for layout in ("rows apart", "by columns", "rows reversed"):
        other = Norm(40, 30, dtype, True)
        other.__dict__ |= norm.__dict__
        for name in ("x", "dy", "other", "dother"):
            setattr(other, name, strided(getattr(norm, name))[layout])
        assert torch.equal(other.forward(True)[0], y), layout
        assert torch.equal(other.forward(False)[0], alone), layout
        again = other.backward(strided(x)[layout], statistics, True)
        for one, two in zip(again, grads, strict=True):
            assert torch.equal(one, two), layout
        found = activations.activation_forward(strided(pre)[layout], "swiglu")[0]
        assert torch.equal(found, act), layout
        found = activations.activation_backward(
            strided(dy)[layout], strided(pre)[layout], "swiglu"
        )[0]
        assert torch.equal(found, dpre), layout
    one = torch.ones((), dtype=dtype)
    expected = activations.activation_backward(one.repeat(40, 30), pre, "silu")[0]
    for ones in (one.expand(40, 30), one.repeat(1, 30).expand(40, 30)):
        assert torch.equal(activations.activation_backward(ones, pre, "silu")[0], expected)


def test_the_residual_is_expanded_or_refused() -> None:
    x, other = random(6, 8), random(1, 8)
    y, _, _, total = norms.norm_forward(x, None, None, 1e-5, other=other)
    assert torch.equal(total, x + other)
    close(y, FORMULAS[ops.RMSNorm](ops.RMSNorm(8), total.double(), lambda name: None))
    with pytest.raises(RuntimeError):
        norms.norm_forward(x, None, None, 1e-5, other=random(5, 8))


@pytest.mark.parametrize("center", [False, True], ids=["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("width", [33, 5000])
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[::-1]], ids=str)
def test_a_residual_of_another_dtype(dtypes: Any, width: int, center: bool) -> None:
    """Bit for bit the norm of PyTorch's sum, which is fp32."""
    x, other = random(7, width, dtype=dtypes[0]), random(7, width, dtype=dtypes[1])
    weight, bias = random(width), random(width) if center else None
    for to in (None, "once to bfloat16"):
        more = {"center": center, "normalized_dtype": to}
        found = norms.norm_forward(x, weight, bias, 1e-5, other=other, **more)
        expected = norms.norm_forward(x + other, weight, bias, 1e-5, **more)
        assert torch.equal(found[3], x + other)
        assert found[0].dtype == (torch.float32 if to is None else torch.bfloat16)
        assert all(torch.equal(found[k], expected[k]) for k in ((0, 1, 2) if center else (0, 2)))


def formula(op: Any, x: Tensor) -> Tensor:
    return FORMULAS[type(op)](op, x, lambda name: None)


def shape_of(op: Any) -> tuple[Any, ...]:
    return op.kind, getattr(op, "params", ()), getattr(op, "glu_interleave_size", None)


@pytest.mark.parametrize("shape", [(1, 8), (50, 1208), (300, 24)], ids=str)
@each_activation
@each_dtype
def test_activations_equal_the_formula(dtype: torch.dtype, op: Any, shape: Any) -> None:
    x = random(*shape, dtype=dtype, scale=3)
    bias = random(shape[1])
    pre = (x + bias).to(dtype) if dtype == torch.float32 else (x.float() + bias).to(dtype)
    wide = pre.double().requires_grad_()
    expected = formula(op, wide)
    y, kept = activations.activation_forward(x, *shape_of(op), bias, pre=True)
    assert torch.equal(kept, pre)
    close(y, expected)
    dy = random(*y.shape, dtype=dtype)
    (dx,) = torch.autograd.grad(expected, wide, dy.double())
    found, again, dbias = activations.activation_backward(
        dy, pre, *shape_of(op), want=("x", "y", "bias")
    )
    close(found, dx)
    if dtype == torch.bfloat16 and getattr(
        op, "round_gate", False
    ):  # each term of the sum is of rounded factors
        sizes = found.double().abs().sum(0)
        assert ((dbias - dx.sum(0)).abs() <= sizes * torch.finfo(dtype).eps + 1e-6).all()
    else:
        close(dbias, dx.sum(0), shape[0])
    assert torch.equal(again, y), "y computed again has other bits"
    assert torch.equal(y, activations.activation_forward(pre, *shape_of(op))[0])


@each_activation
@each_dtype
def test_activations_of_extreme_values(dtype: torch.dtype, op: Any) -> None:
    inf, nan = math.inf, math.nan
    sizes = [0.0, 1e-40, 1e-30, 1e-4, 0.39, 0.41, 7.0, 20.0, 86.0, 87.5, 89.0, 104.0, 1e4, 1e18]
    values = torch.tensor([*sizes, *(-s for s in sizes), inf, -inf, nan, -0.0])
    x, gate = values[:, None], int(getattr(op, "gate_second", False))
    if op_gates(op):
        x = torch.stack((values, torch.full_like(values, 1.5)), 1)
        x = x.flip(1) if gate else x
    if getattr(op, "glu_interleave_size", None):
        x = x.repeat_interleave(op.glu_interleave_size, 1)
    x = x.to(dtype)
    y = activations.activation_forward(x, *shape_of(op))[0]
    expected = formula(op, x.double()).to(torch.float32).to(dtype)
    expected[expected.isnan() & (x[:, [gate]] == -inf)] = 0  # the formula multiplies 0 by inf
    torch.testing.assert_close(y, expected, rtol=8e-3, atol=1e-6, equal_nan=True)
    finite = x.isfinite().all(1) & (x[:, gate].abs() < 1e10)
    dx = activations.activation_backward(torch.ones_like(y), x, *shape_of(op))[0]
    assert dx[finite].isfinite().all()
    rectifies = op.kernel.split()[0] in ("relu", "reglu", "relu6", "leaky_relu")
    assert rectifies or dx[x[:, gate].isnan(), gate].isnan().all()


def op_gates(op: Any) -> bool:
    return activations.row(op.kind, op.params).gated


GATES = {"swiglu": "silu", "glu": "sigmoid", "sreglu": "srelu", "reglu": "relu"}


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("interleave", [None, 3])
@pytest.mark.parametrize("kind", GATES)
def test_a_rounded_gate_is_an_activation_and_a_product(
    kind: str, interleave: int | None, second: bool
) -> None:
    """Bit for bit what the activation gives alone, multiplied by PyTorch, and so the gradients."""
    x, dy = random(70, 1212, dtype=torch.bfloat16, scale=3), random(70, 606, dtype=torch.bfloat16)
    a, b = reference.halves(x, interleave, second)
    act = activations.activation_forward(a, GATES[kind])[0]
    da = activations.activation_backward(dy * b, a, GATES[kind])[0]
    given = str(reference.Form(kind, rounded=True, second=second)), (), interleave
    assert torch.equal(activations.activation_forward(x, *given)[0], act * b)
    dx, y, _ = activations.activation_backward(dy, x, *given, want=("x", "y"))
    assert torch.equal(y, act * b)
    assert torch.equal(dx, reference.joined(da, dy * act, interleave, second))
    plain = str(reference.Form(kind, second=second))
    once = activations.activation_forward(x, plain, (), interleave)[0]
    assert torch.equal(once, y) == (kind == "reglu")  # max(a, 0) has no digit to round


@pytest.mark.parametrize("approximate", ["tanh", "none"])
def test_a_rounded_geglu_has_the_bits_of_pytorch(approximate: str) -> None:
    """Where all but a tanh beyond -4, which has another last bit, is the same."""
    x, dy = random(70, 1212, dtype=torch.bfloat16), random(70, 606, dtype=torch.bfloat16)
    wide = x.clone().requires_grad_()
    a, b = wide.chunk(2, 1)
    expected = torch.nn.functional.gelu(a, approximate=approximate) * b
    expected.backward(dy)
    kind = "geglu" if approximate == "tanh" else "geglu_erf"
    y = activations.activation_forward(x, f"{kind} rounded")[0]
    assert (y != expected).double().mean() < 1e-3
    dx, again, _ = activations.activation_backward(dy, x, f"{kind} rounded", want=("x", "y"))
    assert torch.equal(again, y)
    torch.testing.assert_close(dx, wide.grad, rtol=1e-2, atol=1e-3)


def test_a_rounded_swiglu_has_the_bits_of_pytorch() -> None:
    x, dy = random(70, 1212, dtype=torch.bfloat16, scale=3), random(70, 606, dtype=torch.bfloat16)
    wide = x.clone().requires_grad_()
    a, b = wide.chunk(2, 1)
    expected = torch.nn.functional.silu(a) * b
    expected.backward(dy)
    assert torch.equal(activations.activation_forward(x, "swiglu rounded")[0], expected)
    dx = activations.activation_backward(dy, x, "swiglu rounded")[0]
    assert (dx != wide.grad).double().mean() < 1e-3  # a slope's last fp32 bit is not PyTorch's


STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu steps": lambda x: 0.5 * x * (
        1.0 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0)))
    ),
    "gelu_fast steps": lambda x: 0.5 * x * (
        1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x))
    ),
    "gelu_erf steps": lambda x: x * 0.5 * (1.0 + torch.erf(x / math.sqrt(2.0))),
    "qgelu steps": lambda x: x * torch.sigmoid(1.702 * x),
}  # fmt: skip


@pytest.mark.parametrize("kind", STEPS)
def test_rounded_steps_are_those_of_pytorch(kind: str) -> None:
    """Of every bf16, but for a function's last fp32 bit that rounds to the other side."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every[every.isfinite() & (every.abs() < 1e4)].view(1, -1)
    y, expected = activations.activation_forward(x, kind)[0], STEPS[kind](x)
    assert (y != expected).double().mean() < 1e-3
    torch.testing.assert_close(y, expected, rtol=1e-2, atol=1e-2)
    plain = kind.removesuffix(" steps")
    assert (y != activations.activation_forward(x, plain)[0]).double().mean() > 1e-2
    dy = random(*x.shape, dtype=torch.bfloat16)
    dx, again, _ = activations.activation_backward(dy, x, kind, want=("x", "y"))
    assert torch.equal(dx, activations.activation_backward(dy, x, plain)[0])
    assert torch.equal(again, y)
    gated = f"{kind} gated rounded"
    both = torch.stack((x[0], x[0].flip(0)), 1)
    assert torch.equal(activations.activation_forward(both, gated)[0][:, 0], y[0] * x[0].flip(0))


def test_a_clamped_gate_of_rounded_steps_is_that_of_gpt_oss() -> None:
    x = random(70, 1212, dtype=torch.bfloat16, scale=5)
    a, b = reference.halves(x, 1)
    a, b = a.clamp(max=7.0), b.clamp(-7.0, 7.0)
    expected = (b + 1) * (a * torch.sigmoid(a * 1.702))
    y = activations.activation_forward(x, "clamped_swiglu rounded steps", (7.0, 1.702, 1.0), 1)[0]
    assert (y != expected).double().mean() < 1e-3


def test_no_denormal_is_flushed() -> None:
    for dtype in DTYPES:
        x = torch.tensor([[1e-39, 3e-40, -2e-39, 1e-38]], dtype=dtype)
        total = norms.norm_forward(x, None, None, 1e-5, other=torch.zeros_like(x))[3]
        assert torch.equal(total, x)
        assert torch.equal(activations.activation_forward(x, "relu")[0], x.clamp(min=0))
    assert torch.tensor(1e-39) * 0.5 != 0, "the whole process flushes denormals"


def test_bf16_is_rounded_to_nearest_even_for_every_value() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = every.view(256, 256)
    other = x.roll(77).t().contiguous()
    total = norms.norm_forward(x, None, None, 1e-5, other=other)[3]
    expected = x + other
    assert torch.equal(total.isnan(), expected.isnan())
    keep = ~expected.isnan()
    assert torch.equal(total[keep].view(torch.int16), expected[keep].view(torch.int16))


@pytest.mark.parametrize("rows", [3, 40, 700, 2100])
@each_dtype
def test_results_are_the_same_bits_for_any_number_of_threads(dtype: torch.dtype, rows: int) -> None:
    norm = Norm(rows, 200, dtype, True)
    pre, dy = random(rows, 200, dtype=dtype), random(rows, 100, dtype=dtype)

    def results() -> list[Tensor]:
        y, x, statistics = norm.forward(True)
        made = activations.activation_backward(dy, pre, "swiglu", want=("x", "y", "bias"))
        return [y, *statistics, *norm.backward(x, statistics, True), *made, transposed(pre)]

    torch.set_num_threads(1)
    first = results()
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        for one, two in zip(first, results(), strict=True):
            assert torch.equal(one, two), f"{threads} threads"


@pytest.mark.parametrize("shape", [(1, 2), (31, 62), (128, 1100), (300, 70), (0, 6)], ids=str)
@each_dtype
def test_transposed_copies(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = random(*shape, dtype=dtype)
    assert torch.equal(transposed(x), x.t())
    for kind in ("gelu", "swiglu", "situglu"):
        expected = activations.activation_forward(x, kind)[0]
        room = torch.full(expected.t().shape, float("nan"), dtype=dtype)
        y = activations.activation_forward(x, kind, y_t=room)[0]
        assert torch.equal(room, expected.t())
        assert torch.equal(y, expected)
        assert y.t().is_contiguous()


@pytest.mark.parametrize("kind", ["gelu", "relu"])
@each_dtype
def test_the_gradient_in_the_place_of_the_one_it_is_made_of(dtype: torch.dtype, kind: str) -> None:
    x, dy = random(37, 1100, dtype=dtype), random(37, 1100, dtype=dtype)
    expected = activations.activation_backward(dy, x, kind, want=("x", "y", "bias"))
    found = activations.activation_backward(dy, x, kind, want=("x", "y", "bias"), out=dy)
    assert found[0] is dy
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("kind", activations.KINDS)
@each_dtype
def test_gradients_in_the_place_of_what_they_are_made_of(dtype: torch.dtype, kind: str) -> None:
    gated = activations.KINDS[kind].gated
    x, dy = random(37, 1100 * (1 + gated), dtype=dtype), random(37, 1100, dtype=dtype)
    for interleave in (None, 44) if gated else (None,):
        given = kind, (), interleave, ("x", "bias")
        expected = activations.activation_backward(dy, x, *given)
        room = x.clone()
        found = activations.activation_backward(dy, room, *given, out=room)
        assert found[0] is room
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[2], expected[2])


@pytest.mark.parametrize("center", [False, True], ids=["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("residual", [False, True])
@each_dtype
def test_a_norms_gradient_in_the_place_of_the_one_it_is_made_of(
    dtype: torch.dtype, residual: bool, center: bool
) -> None:
    given = Norm(37, 431, dtype, center)
    _, x, statistics = given.forward(residual)
    expected = given.backward(x, statistics, residual)
    found = given.backward(x, statistics, residual, out=given.dy)
    assert found[0] is given.dy
    for one, two in zip(found, expected, strict=True):
        assert (one is two is None) or torch.equal(one, two)


@pytest.mark.parametrize("kind", activations.KINDS)
@each_dtype
def test_some_columns_of_an_activation(dtype: torch.dtype, kind: str) -> None:
    gated = activations.KINDS[kind].gated
    x = random(37, 1200 * (1 + gated), dtype=dtype)
    for interleave in (None, 40) if gated else (None,):
        whole = activations.activation_forward(x, kind, (), interleave)[0]
        for first, last in ((0, 1200), (40, 720), (1160, 1200)):
            part, room = slice(first, last), torch.empty((last - first, 37), dtype=dtype)
            for y_t in (None, room):
                y = activations.activation_forward(x, kind, (), interleave, y_t=y_t, columns=part)[
                    0
                ]
                assert torch.equal(y, whole[:, part])
            assert torch.equal(room, whole[:, part].t())


def test_a_transposed_copy_at_any_address() -> None:
    x = random(70, 40, dtype=torch.bfloat16)
    room = torch.empty(40 * 70 + 1, dtype=torch.bfloat16)[1:].view(40, 70)
    y = activations.activation_forward(x, "silu", y_t=room)[0]
    assert torch.equal(room, y.t())


@pytest.mark.parametrize("kind", ["silu", "swiglu"])
@pytest.mark.parametrize("shape", [(0, 16), (4, 0)], ids=str)
def test_empty_activations(kind: str, shape: tuple[int, int]) -> None:
    x = random(*shape)
    y = activations.activation_forward(x, kind)[0]
    dx, again, dbias = activations.activation_backward(y, x, kind, want=("x", "y", "bias"))
    assert dx.shape == shape
    assert again.shape == y.shape
    assert torch.equal(dbias, torch.zeros(shape[1]))


def test_unknown_kinds_and_params_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown activation 'cubic'"):
        activations.activation_forward(random(2, 2), "cubic")
    with pytest.raises(ValueError, match=r"'gelu' got params \(1.0,\)"):
        activations.activation_forward(random(2, 2), "gelu", (1.0,))
    with pytest.raises(ValueError, match=r"'swiglu twice': got \['twice'\]"):
        activations.activation_forward(random(2, 2), "swiglu twice")


def test_under_modes_and_transforms_the_formulas_run() -> None:
    """The kernels read memory, which a fake tensor has not and a transform does not see."""
    with FakeTensorMode():
        x, weight = torch.empty(3, 8), torch.empty(8)
        y, _, rstd, total = norms.norm_forward(x, weight, None, 1e-5, other=x)
        assert (y.shape, rstd.shape, total.shape) == ((3, 8), (3, 1), (3, 8))
        made = norms.norm_backward(x, x, rstd, rstd, weight, weight, want=("x", "y", "bias"))
        assert [None if t is None else tuple(t.shape) for t in made] == [(3, 8), None, (8,), (3, 8)]
        made = activations.activation_backward(x, x, "gelu", want=("x", "y", "bias"))
        assert [tuple(t.shape) for t in made] == [(3, 8), (3, 8), (8,)]
        assert transposed(x).shape == (8, 3)
    x, dy = random(4, 3, 8), random(4, 3, 8)
    mapped = torch.func.vmap(lambda x: activations.activation_forward(x, "silu")[0])(x)
    close(mapped, x.double() * torch.sigmoid(x.double()))
    mapped = torch.func.vmap(lambda dy, x: activations.activation_backward(dy, x, "relu")[0])(dy, x)
    assert torch.equal(mapped, dy * (x > 0))
