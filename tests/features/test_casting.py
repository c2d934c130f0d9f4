"""A residual stream in another float dtype than the branches: as PyTorch's `x + f(x)`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from compiled import cold  # noqa: F401
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import (
    Add,
    AddExtraInput,
    ConstantScale,
    Identity,
    Linear,
    MakeExtraOutput,
    Residual,
    RMSNorm,
    ScaledAdd,
    SiLU,
    Tee,
    WeightedAdd,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
PAIRS = ((BF16, FP32), (FP32, BF16), (FP16, FP32), (FP16, BF16), (FP32, FP64), (BF16, BF16))
Call = Callable[..., Any]


def _results(function: Call, inputs: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """Outputs and the gradients of all, in the dtypes they have."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    made = function(*inputs)
    outputs = made if isinstance(made, tuple) else (made,)
    dys = [torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, [*inputs, *parameters], dys)
    return [*(y.detach() for y in outputs), *gradients]


def _compare(found: list[Tensor], expected: list[Tensor]) -> None:
    for k, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype, f"{k}: {one.dtype}, expected {other.dtype}"
        tolerance = 3e-2 if k or other.dtype == BF16 else 4e-3
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "branch, stream, mode",
    [(*pair, mode) for pair in PAIRS for mode in ("eager", "twice")]
    + [(*pair, "compiled") for pair in PAIRS[:2]],
    ids=str,
)
def test_add_of_another_dtype_promotes_as_pytorch_does(
    branch: torch.dtype, stream: torch.dtype, mode: str
) -> None:
    torch.manual_seed(0)
    fc = Linear(8, 8, dtype=branch)
    module = og.Sequential(fc, AddExtraInput(), double_backward=mode == "twice")
    x, r = torch.randn(3, 4, 8, dtype=branch), 100 * torch.randn(3, 4, 8, dtype=stream)
    run = (
        torch.compile(module, fullgraph=True, backend="aot_eager") if mode == "compiled" else module
    )
    parameters = list(module.parameters())

    def plain(x: Tensor, r: Tensor) -> Tensor:
        return nn.functional.linear(x, fc.weight, fc.bias) + r

    expected = _results(plain, [x, r], parameters)
    _compare(_results(run, [x, r], parameters), expected)
    assert expected[0].dtype == torch.promote_types(branch, stream)
    with torch.no_grad():
        assert run(x, r).dtype == expected[0].dtype
        _compare([run(x, r)], expected[:1])


def test_each_gradient_has_its_own_inputs_dtype_whoever_wants_one() -> None:
    module = og.Sequential(SiLU(), Add(), SiLU(), Add())
    for wanted in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
        inputs = [torch.randn(3, 8, dtype=d) for d in (BF16, FP32, FP64)]
        leaves = []
        for x, want in zip(inputs, wanted, strict=True):
            x.requires_grad_(bool(want))
            leaves += [x] * want
        y = module(*inputs)
        plain = nn.functional.silu(nn.functional.silu(inputs[0]) + inputs[1]) + inputs[2]
        assert y.dtype == plain.dtype == FP64
        _compare(
            list(torch.autograd.grad(y.sum(), leaves)),
            list(torch.autograd.grad(plain.sum(), leaves)),
        )


def test_a_tee_gathers_gradients_in_its_own_dtype() -> None:
    """The stream is widened between a Tee and its Adds, one of which is after the other."""
    module = og.Sequential(Tee("r", to_caller=True), SiLU(), Add("wide"), Add("r"), Add("r"))
    x, wide = torch.randn(4, 8, dtype=BF16), torch.randn(4, 8)

    def plain(x: Tensor, wide: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.silu(x) + wide + x + x, x

    _compare(_results(module, [x, wide], []), _results(plain, [x, wide], []))


def test_a_stream_that_is_no_float_is_an_error() -> None:
    module = og.Sequential(SiLU(), Add())
    with pytest.raises(og.OpError, match=r"1:Add: got other dtype torch.int64, expected a float"):
        module(torch.ones(2, 8), torch.ones(2, 8, dtype=torch.int64))


def test_what_computes_on_a_wider_stream_still_needs_its_dtype() -> None:
    module = og.Sequential(Linear(8, 8, dtype=BF16), Add(), Linear(8, 8, dtype=BF16))
    with pytest.raises(og.OpError, match=r"2:Linear: got input dtype torch.float32, expected"):
        module(torch.ones(2, 8, dtype=BF16), torch.ones(2, 8))
    norm = og.Sequential(Linear(8, 8, dtype=BF16), Add(), RMSNorm(8, dtype=BF16))
    assert norm(torch.ones(2, 8, dtype=BF16), torch.ones(2, 8)).dtype == FP32


def test_fused_kernels_say_why_they_do_not_add_two_dtypes() -> None:
    module = og.Sequential(Linear(8, 8, dtype=BF16), Add())
    x, r = torch.ones(2, 8, dtype=BF16, requires_grad=True), torch.ones(2, 8)
    module(x, r)
    (plan,) = module._stages[0].plans.values()
    assert "adds torch.float32 to torch.bfloat16" in str(plan)


def test_norms_and_scales_add_two_dtypes_in_one_pass() -> None:
    weights = {"dtype": BF16}
    norm = RMSNorm(8, normalized_dtype="weight", **weights)
    module = og.Sequential(
        Tee("r"), norm, Linear(8, 8, **weights), og.ops.LayerScale(8, **weights), Add("r"), norm
    )
    x = torch.randn(3, 8, requires_grad=True)
    plan = str(module.plan(x=x))
    taken = [name for name in ("NormKernel", "ScaleKernel") if name in plan]
    if not taken:
        pytest.skip("no kernels")
    assert "4-5  ScaleKernel" in plan
    two = og.Sequential(Linear(8, 8, **weights), Add(), norm)
    x, r = torch.randn(3, 8, dtype=BF16), torch.randn(3, 8)
    y = two(x, r)
    (made,) = two._stages[0].plans.values()
    assert "2-3  NormKernel" in str(made)
    assert torch.equal(y, norm(two[0](x) + r))


# -- autocast --


def _branch() -> list[nn.Module]:
    return [Linear(8, 8), SiLU(), Linear(8, 8)]


class _Plain(nn.Module):
    """The ops' modules run by torch.nn: `x + f(x)`, twice."""

    def __init__(self, ops: list[nn.Module]) -> None:
        super().__init__()
        self.ops = ops

    def forward(self, x: Tensor) -> Tensor:
        for start in (0, 3):
            first, _, second = self.ops[start : start + 3]
            h = nn.functional.silu(nn.functional.linear(x, first.weight, first.bias))
            x = x + nn.functional.linear(h, second.weight, second.bias)
        return x


def _streams() -> dict[str, tuple[og.Sequential, list[nn.Module]]]:
    torch.manual_seed(0)
    a, b = _branch(), _branch()
    return {
        "Residual": (og.Sequential(Residual(*a), Residual(*b)), a + b),
        "Tee and Add": (og.Sequential(Tee("r"), *a, Add("r"), Tee("s"), *b, Add("s")), a + b),
        "nested": (og.Sequential(og.Sequential(Residual(*a)), og.Sequential(Residual(*b))), a + b),
        "plain between": (
            og.Sequential(Tee("r"), *a, nn.Identity(), Add("r"), nn.Identity(), Residual(*b)),
            a + b,
        ),
        "identities": (og.Sequential(Identity(), Residual(*a), Identity(), Residual(*b)), a + b),
        "checkpoint": (og.Sequential(Residual(*a), Residual(*b), checkpoint=True), a + b),
        "optimal": (og.Sequential(Residual(*a), Residual(*b), planner="optimal"), a + b),
    }


STREAMS = _streams()


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", STREAMS)
def test_autocast_leaves_a_residual_stream_in_its_dtype(name: str, dtype: torch.dtype) -> None:
    module, ops = STREAMS[name]
    x = torch.randn(3, 8).to(dtype) + 100  # where bf16 has a unit of 0.5
    plain, parameters = _Plain(ops), list(module.parameters())

    def cast(function: Call) -> Call:
        return torch.autocast("cpu", dtype=BF16)(function)

    expected = _results(cast(plain), [x], parameters)
    found = _results(cast(module), [x], parameters)
    _compare(found, expected)
    with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
        y = module(x)
    assert torch.equal(y, found[0])
    if dtype == FP32:
        assert not torch.equal(y, y.bfloat16().float())


@pytest.mark.parametrize("name", ["Residual", "plain between"])
def test_autocast_of_a_compiled_stream(name: str) -> None:
    module, ops = STREAMS[name]
    x = torch.randn(3, 8) + 100
    plain, compiled = _Plain(ops), torch.compile(module, fullgraph=True, backend="aot_eager")

    def cast(function: Call) -> Call:
        return torch.autocast("cpu", dtype=BF16)(function)

    parameters = list(module.parameters())
    _compare(_results(cast(compiled), [x], parameters), _results(cast(plain), [x], parameters))


def test_autocast_leaves_what_a_tee_hands_out_and_what_an_add_takes() -> None:
    torch.manual_seed(0)
    fc = Linear(8, 8)
    module = og.Sequential(MakeExtraOutput(), fc, AddExtraInput())
    x, r = torch.randn(3, 8), torch.randn(3, 8)

    def plain(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return nn.functional.linear(x, fc.weight, fc.bias) + r, x

    with torch.autocast("cpu", dtype=BF16):
        found = _results(module, [x, r], list(module.parameters()))
        _compare(found, _results(plain, [x, r], list(module.parameters())))
        assert torch.equal(found[1], x)
        narrow = module(x, r.bfloat16())
    assert [y.dtype for y in narrow] == [BF16, FP32]


def test_autocast_of_what_has_no_stream_in_another_dtype_is_planned_as_before() -> None:
    module = og.Sequential(Linear(8, 8), Tee("r"), SiLU(), Add("r"))
    with torch.autocast("cpu", dtype=BF16):
        assert "Cast" not in str(module.plan(x=torch.ones(2, 8)))
        assert "Cast" in str(og.Sequential(Residual(Linear(8, 8))).plan(x=torch.ones(2, 8)))
    assert "Cast" not in str(og.Sequential(Residual(Linear(8, 8))).plan(x=torch.ones(2, 8)))


def test_autocast_of_a_stream_under_a_recipe() -> None:
    torch.manual_seed(0)
    module = og.Sequential(Residual(RMSNorm(32), Linear(32, 32), SiLU(), Linear(32, 32)))
    x = torch.randn(32, 32)
    for recipe in (og.recipe.Float8CurrentScaling(), og.recipe.DelayedScaling()):
        with torch.autocast("cpu", dtype=BF16), og.autocast(recipe=recipe):
            found = _results(module, [x], list(module.parameters()))
        expected = _results(module, [x], list(module.parameters()))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            assert (one - other).norm() < 0.12 * other.norm()


class _Named(og.Op):
    """Its values are called as a cast's would be."""

    saves = ("xc",)

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.full((8,), 1.5))

    def fwd(self, x: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return x * c, (x + 0,)

    def bwd(self, dy: Tensor, xc: Tensor, c: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        return dy * c, ((dy * xc).sum(0),)


class _Twice(Add):
    def fwd(self, x: Tensor, other: Tensor) -> tuple[Tensor, tuple[()]]:
        return x + 2 * other, ()


def test_a_cast_takes_nobodys_name() -> None:
    named = _Named()
    module = og.Sequential(Identity(), Residual(named))
    x = torch.randn(3, 8)

    def plain(x: Tensor) -> Tensor:
        return x + x.bfloat16() * named.c.bfloat16()

    with torch.autocast("cpu", dtype=BF16):
        assert "cc2" in str(module.plan(x=x))
        _compare(_results(module, [x], [named.c]), _results(plain, [x], [named.c]))


def test_what_add_says_of_its_sum_counts_for_no_other_fwd() -> None:
    x, r = torch.ones(2, 8, dtype=BF16), torch.ones(2, 8)
    with pytest.raises(og.OpError, match=r"1:_Twice: got other dtype torch.float32, expected"):
        og.Sequential(SiLU(), _Twice())(x, r)
    assert og.Sequential(SiLU(), _Twice())(x, x).dtype == BF16


class _ToBF16(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.bfloat16()


def test_an_fp32_stream_without_autocast_has_its_cast_in_a_plain_module() -> None:
    torch.manual_seed(0)
    norm, fc = RMSNorm(8), Linear(8, 8, dtype=BF16)
    module = og.Sequential(Tee("r"), norm, _ToBF16(), fc, Add("r"))
    x, parameters = torch.randn(3, 8) + 100, list(module.parameters())

    def plain(x: Tensor) -> Tensor:
        h = nn.functional.rms_norm(x, (8,), norm.weight, norm.eps).bfloat16()
        return x + nn.functional.linear(h, fc.weight, fc.bias)

    _compare(_results(module, [x], parameters), _results(plain, [x], parameters))


def test_autocast_casts_again_after_a_wider_sum() -> None:
    """The first op computes, so the input is cast; the sum is wide, and what follows casts it."""
    torch.manual_seed(0)
    one, two = Linear(8, 8), Linear(8, 8)
    module = og.Sequential(one, AddExtraInput(), two, AddExtraInput())
    inputs = [torch.randn(3, 8) for _ in range(3)]

    def plain(x: Tensor, r: Tensor, s: Tensor) -> Tensor:
        h = nn.functional.linear(x, one.weight, one.bias) + r
        return nn.functional.linear(h, two.weight, two.bias) + s

    with torch.autocast("cpu", dtype=BF16):
        found = _results(module, inputs, list(module.parameters()))
        _compare(found, _results(plain, inputs, list(module.parameters())))
    assert found[0].dtype == FP32


@pytest.mark.parametrize(
    "norm", [og.ops.LayerNorm(64), RMSNorm(64), RMSNorm(64, normalized_dtype="weight")]
)
def test_autocast_norms_read_a_stream_as_it_is(norm: og.Op) -> None:
    """Rounded to bf16, these rows would have nothing left that a LayerNorm could read."""
    torch.manual_seed(0)
    fc, x = Linear(64, 64), torch.randn(6, 64) + 1000 * isinstance(norm, og.ops.LayerNorm)
    module, parameters = og.Sequential(Residual(norm, fc)), [*norm.parameters(), *fc.parameters()]
    centered = isinstance(norm, og.ops.LayerNorm)

    def plain(x: Tensor) -> Tensor:
        h = (
            nn.functional.layer_norm(x, (64,), norm.weight, norm.bias)
            if centered
            else nn.functional.rms_norm(x, (64,), norm.weight, 1e-5)
        )
        return x + nn.functional.linear(h, fc.weight, fc.bias)

    with torch.autocast("cpu", dtype=BF16):
        plan = module.plan(x=x)
        assert "Cast" not in str(plan)
        found, expected = (_results(f, [x], parameters) for f in (module, plain))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() < 1e-2 * other.norm()
    assert torch.equal(found[0], module.forward(x)) is False  # that is fp32 throughout


def test_autocast_norms_of_no_stream_give_autocasts_dtype() -> None:
    module = og.Sequential(RMSNorm(8, normalized_dtype="weight"), Linear(8, 8))
    with torch.autocast("cpu", dtype=BF16):
        assert module(torch.randn(3, 8)).dtype == BF16
        scaled = og.Sequential(Tee("r"), Linear(8, 8), og.ops.LayerScale(8), Add("r"))
        assert scaled(torch.randn(3, 8)).dtype == FP32


@pytest.mark.parametrize("add", [lambda: WeightedAdd("b", 8), lambda: ScaledAdd("b", 0.5)])
def test_the_check_casts_gradients_of_promoting_sums_too(
    monkeypatch: pytest.MonkeyPatch, add: Callable[[], og.Op]
) -> None:
    """Under autocast x is bf16, and the sum fp32: the fused backward's dx is cast behind it."""
    x, b = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    found = []
    for check in ("0", "1"):
        monkeypatch.setenv("OPSGRAPH_CHECK", check)
        module = og.Sequential(ConstantScale(0.5), add())
        with torch.autocast("cpu"):
            y = module(x, b)
        found.append([y, *torch.autograd.grad(y.sum(), [x, b, *module.parameters()])])
    for one, other in zip(*found, strict=True):
        assert one.dtype == torch.float32
        assert torch.equal(one, other)
