"""Every op against its fp64 formula, forward and backward, on every kind of input."""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from compare import LAYOUTS, Case, check
from torch import nn

import opsgraph as og
from opsgraph import ops
from opsgraph.op import row
from opsgraph.ops import (
    GEGLU,
    GELU,
    GLU,
    QGEGLU,
    QGELU,
    XIELU,
    Add,
    AddExtraInput,
    BasicLinear,
    Bias,
    ClampedSwiGLU,
    ClippedGELU,
    ConstantScale,
    Dropout,
    Gated,
    Hardswish,
    Identity,
    L2Normalization,
    LayerNorm,
    LayerScale,
    LeakyReLU,
    Linear,
    MakeExtraOutput,
    Mish,
    ReGLU,
    ReLU,
    ReLU6,
    Reshape,
    Residual,
    RMSNorm,
    ScaledAdd,
    Sigmoid,
    SiLU,
    SiTUGLU,
    SReGLU,
    SReLU,
    SwiGLU,
    Tanh,
    Tee,
    TransposedLinear,
    WeightedAdd,
)
from tests.ops.test_extra_ops import EXTRA_OPS


class Entry(NamedTuple):
    """How an op is built and compared: `gemm` and `rounded` as in `compare.assert_close`."""

    build: Callable[[], Sequence[nn.Module]]
    gemm: bool = False
    rounded: bool = False
    multiple: int = 1
    """Of what the width is one."""


def gated(build: Callable[[], nn.Module], multiple: int = 2) -> Entry:
    return Entry(lambda: [build()], multiple=multiple)


TABLE = {
    "GELU": Entry(lambda: [GELU()]),
    "GELU exact": Entry(lambda: [GELU("none")]),
    "QGELU": Entry(lambda: [QGELU()]),
    "ReLU": Entry(lambda: [ReLU()]),
    "SReLU": Entry(lambda: [SReLU()]),
    "SiLU": Entry(lambda: [SiLU()]),
    "Sigmoid": Entry(lambda: [Sigmoid()]),
    "Tanh": Entry(lambda: [Tanh()]),
    "ReLU6": Entry(lambda: [ReLU6()]),
    "Hardswish": Entry(lambda: [Hardswish()]),
    "Mish": Entry(lambda: [Mish()]),
    "LeakyReLU": Entry(lambda: [LeakyReLU(0.2)]),
    "ClippedGELU": Entry(lambda: [ClippedGELU(1.5)]),
    "Gated": gated(lambda: Gated(LeakyReLU(-0.3), gate_second=True)),
    "GEGLU": gated(GEGLU),
    "GEGLU exact": gated(lambda: GEGLU("none")),
    "GEGLU interleaved": gated(lambda: GEGLU(glu_interleave_size=3), 6),
    "QGEGLU": gated(QGEGLU),
    "ReGLU": gated(ReGLU),
    "SReGLU": gated(SReGLU),
    "SwiGLU": gated(SwiGLU),
    "SwiGLU interleaved": gated(lambda: SwiGLU(2), 4),
    "SwiGLU interleaved by 1": gated(lambda: SwiGLU(1)),
    "SwiGLU rounded": gated(lambda: SwiGLU(round_gate=True)),
    "SwiGLU from the second half": gated(lambda: SwiGLU(gate_second=True)),
    "SwiGLU interleaved from the second": gated(lambda: SwiGLU(2, gate_second=True), 4),
    "GLU": gated(GLU),
    "ClampedSwiGLU": gated(ClampedSwiGLU),
    "ClampedSwiGLU narrow": gated(lambda: ClampedSwiGLU(0.5, 2.0, -0.25)),
    "ClampedSwiGLU after": gated(lambda: ClampedSwiGLU(0.5, 1.0, 0.0, clamp_after=True)),
    "ClampedSwiGLU interleaved": gated(lambda: ClampedSwiGLU(1.0, glu_interleave_size=2), 4),
    "SiTUGLU": gated(SiTUGLU),
    "SiTUGLU narrow": gated(lambda: SiTUGLU(0.5, 0.75)),
    "RMSNorm": Entry(lambda: [RMSNorm(eps=1e-3)]),
    "RMSNorm zero-centred": Entry(lambda: [RMSNorm(zero_centered_gamma=True)]),
    "RMSNorm plain": Entry(lambda: [RMSNorm(elementwise_affine=False)]),
    "LayerNorm": Entry(lambda: [LayerNorm(eps=1e-2)]),
    "LayerNorm zero-centred": Entry(lambda: [LayerNorm(eps=1e-2, zero_centered_gamma=True)]),
    "LayerNorm without bias": Entry(lambda: [LayerNorm(eps=1e-2, bias=False)]),
    "LayerNorm plain": Entry(lambda: [LayerNorm(eps=1e-2, elementwise_affine=False)]),
    "L2Normalization": Entry(lambda: [L2Normalization(1e-3)]),
    "ConstantScale": Entry(lambda: [ConstantScale(-0.7)]),
    "ConstantScale by 1": Entry(lambda: [ConstantScale(1)]),
    "Dropout": Entry(lambda: [Dropout(0.3)]),
    "Dropout all": Entry(lambda: [Dropout(1.0)]),
    "Dropout none": Entry(lambda: [Dropout(0.0)]),
    "Identity": Entry(lambda: [Identity()]),
    "Reshape": Entry(lambda: [Reshape(-1)]),
    "XIELU": Entry(lambda: [XIELU(0.7, 1.3, 0.25)]),
    "Bias": Entry(lambda: [Bias()]),
    "LayerScale": Entry(lambda: [LayerScale(init_value=-0.3)]),
    "LayerScale and Add": Entry(lambda: [Tee("r"), SiLU(), LayerScale(), Add("r")], rounded=True),
    "BasicLinear": Entry(lambda: [BasicLinear(out_features=5)], gemm=True),
    "Linear": Entry(lambda: [Linear(out_features=5)], gemm=True, rounded=True),
    "Linear without bias": Entry(lambda: [Linear(out_features=5, bias=False)], gemm=True),
    "TransposedLinear": Entry(lambda: [TransposedLinear(out_features=5)], gemm=True, rounded=True),
    "Linear to 1": Entry(lambda: [Linear(out_features=1)], gemm=True, rounded=True),
    "Add": Entry(lambda: [Add("other")]),
    "AddExtraInput": Entry(lambda: [AddExtraInput()]),
    "AddExtraInput twice": Entry(lambda: [AddExtraInput(), AddExtraInput()], rounded=True),
    "Tee": Entry(lambda: [Tee("out")]),
    "ScaledAdd": Entry(lambda: [ScaledAdd(scale=-0.75)], rounded=True),
    "Tee and ScaledAdd": Entry(lambda: [Tee("r"), SiLU(), ScaledAdd("r", 0.3)], rounded=True),
    "WeightedAdd": Entry(lambda: [WeightedAdd(init_value=0.3)], rounded=True),
    "Tee and WeightedAdd": Entry(lambda: [Tee("r"), SiLU(), WeightedAdd("r")], rounded=True),
    "Residual, both scaled": Entry(
        lambda: [Residual(SiLU(), scale=0.5, residual_scale=-0.75)], rounded=True
    ),
    "Linear and ScaledAdd": Entry(
        lambda: [Residual(Linear(bias=False), scale=0.5, residual_scale=0.75)],
        gemm=True,
        rounded=True,
    ),
    "Tee and Add": Entry(lambda: [Tee("r"), SiLU(), Add("r")], rounded=True),
    "Tee to the caller": Entry(lambda: [Tee("r", True), SiLU(), Add("r")], rounded=True),
    "MakeExtraOutput": Entry(lambda: [MakeExtraOutput()]),
    "Residual": Entry(lambda: [Residual(SiLU())], rounded=True),
    "Residual of nothing": Entry(lambda: [Residual()]),
    "Residual of Residual": Entry(lambda: [Residual(Residual(GELU()), QGELU())], rounded=True),
}

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((1,), (12,), (1, 12), (7, 36), (2, 3, 12), (2, 1, 3, 24), (0, 12), (2, 0, 12))
ODD = ((5, 11), (4, 431), (3, 1))

every_op = pytest.mark.parametrize("entry", TABLE.values(), ids=TABLE)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])


def compare(
    entry: Entry, shape: Sequence[int], dtype: torch.dtype, device: str, **more: Any
) -> None:
    shape = (*shape[:-1], -(-shape[-1] // entry.multiple) * entry.multiple)
    check(entry.build, shape, dtype, device, gemm=entry.gemm, rounded=entry.rounded, **more)


def test_every_op_is_in_the_table() -> None:
    built = {type(module).__name__ for entry in TABLE.values() for module in entry.build()}
    # Those of recipes are the identity without one: tests/precision/test_recipe.py.
    assert built | EXTRA_OPS | {"Quantize", "QuantizeGrad"} == set(og.ops.__all__)


@pytest.mark.sampled(132)
@every_dtype
@every_op
def test_op(entry: Entry, dtype: torch.dtype, device: str) -> None:
    for shape in (*SHAPES, *ODD):
        compare(entry, shape, dtype, device)


@pytest.mark.parametrize("name", sorted(n for n in ops.__all__ if n not in ("Reshape",)))
def test_ops_that_keep_the_width_say_so(name: str) -> None:
    """What stands before them may have left its size out."""
    for op in getattr(ops, name).sample():
        if op.in_width is None and not any(kind.gemm or kind.collective for kind, _ in op.lower()):
            width: int | None = 16
            for kind, part in op.lower():
                width = kind.out(part, row(width, torch.float32, torch.device("cpu"))).width
            assert op.width_before(width) == 16


@pytest.mark.sampled(102)
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@every_op
def test_layouts_of_inputs_and_gradients(entry: Entry, layout: str, device: str) -> None:
    for shape in ((5, 12), (2, 3, 12)):
        compare(entry, shape, torch.float32, device, layout=layout)
        compare(entry, shape, torch.bfloat16, device, gradient_layout=layout)


@every_op
def test_whatever_needs_no_gradient(entry: Entry, device: str) -> None:
    for frozen in ([], ["weight"], ["bias"], ["weight", "bias"]):
        for input_grad in (True, False):
            compare(entry, (3, 12), torch.float32, device, frozen=frozen, input_grad=input_grad)


@every_op
def test_results_are_the_same_bit_for_bit(entry: Entry, device: str) -> None:
    case = Case(entry.build, (33, 36), torch.bfloat16, device)
    first, second = case.run(), case.run()
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


NORMS = {name: entry for name, entry in TABLE.items() if "Norm" in name}


@pytest.mark.parametrize("entry", NORMS.values(), ids=NORMS)
def test_norm_weights_of_another_dtype(entry: Entry, device: str) -> None:
    for weight_dtype in (torch.float32, torch.bfloat16):
        for dtype in DTYPES:
            compare(entry, (6, 12), dtype, device, weight_dtype=weight_dtype)


@pytest.mark.parametrize("width", [16, 77, 1000])
@pytest.mark.parametrize("entry", NORMS.values(), ids=NORMS)
def test_norm_of_a_large_mean_and_a_small_spread(entry: Entry, width: int, device: str) -> None:
    """fp32 knows x - mean no better than to its own spacing at the mean: 1000 * eps of the spread.

    A variance computed in one pass would be wrong by 1000**2 * eps, 12 % of it.
    """
    noise = 1000 * torch.finfo(torch.float32).eps
    check(entry.build, (4, width), device=device, noise=noise, make=lambda x: x + 1000)


def test_norm_of_wide_rows(device: str) -> None:
    for build in (lambda: [RMSNorm()], lambda: [LayerNorm()]):
        check(build, (2, 70_001), device=device)


@pytest.mark.parametrize("double_backward", [False, True])
def test_a_clamped_gradient_passes_at_the_limit_only(device: str, double_backward: bool) -> None:
    x = torch.tensor([[1.0, 1.5, -1.0, 1.0, -1.0, 1.5]], device=device, requires_grad=True)
    y = og.Sequential(ClampedSwiGLU(limit=1.0), double_backward=double_backward).to(device)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (dx[0] != 0).tolist() == [True, False, True, True, True, False]


def test_dropout_keeps_the_share_it_promises(device: str) -> None:
    torch.manual_seed(0)
    x = torch.ones(500, 200, device=device)
    dropout = Dropout(0.25)
    y, again = dropout(x), dropout(x)
    assert abs(float((y == 0).float().mean()) - 0.25) < 0.01
    assert set(y.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
    assert not torch.equal(y, again)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)


@pytest.mark.parametrize("training", [True, False])
def test_a_fuser_takes_no_op_that_does_nothing_in_the_mode(training: bool) -> None:
    """What drops in training must not in evaluation, although its pattern names the op."""

    class DropAndAdd(og.Fuser):
        backend, pattern = "aten", dict(drop=Dropout, add=Add)
        saves = ("drop_seed",)

        def fwd(self, x: torch.Tensor, add_other: torch.Tensor) -> Any:
            return torch.full_like(x, 7.0), (torch.zeros((), dtype=torch.int64),)

    with og.register(DropAndAdd):
        module = og.Sequential(Dropout(0.5), Add("r")).train(training)
        x = torch.ones(3, 4)
        assert torch.equal(module(x, x), torch.full((3, 4), 7.0 if training else 2.0))
        reasons = {r.reason for r in module.plan(x=x).rejected if r.name == "DropAndAdd"}
    assert reasons == (set() if training else {"Dropout does nothing in this mode"})


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "width of Linear": (
        lambda: og.Sequential(Identity(), Linear(4, 3))(torch.ones(2, 5)),
        "1:Linear: got input width 5, expected 4",
    ),
    "width of Bias": (
        lambda: og.Sequential(Bias(4))(torch.ones(2, 5)),
        "0:Bias: got input width 5, expected 4",
    ),
    "width of RMSNorm": (
        lambda: og.Sequential(RMSNorm(4))(torch.ones(2, 5)),
        "0:RMSNorm: got input width 5, expected 4",
    ),
    "width inside": (
        lambda: og.Sequential(Linear(4, 6), SwiGLU(), LayerNorm(6))(torch.ones(2, 4)),
        "2:LayerNorm: got input width 3, expected 6",
    ),
    "odd width": (
        lambda: og.Sequential(GLU())(torch.ones(2, 5)),
        "0:GLU: got input width 5, expected a multiple of 2",
    ),
    "interleaved width": (
        lambda: og.Sequential(SwiGLU(4))(torch.ones(2, 12)),
        "0:SwiGLU: got input width 12, expected a multiple of 8",
    ),
    "op alone": (lambda: Linear(4, 3)(torch.ones(2, 5)), "Linear: got input width 5, expected 4"),
    "dtype": (
        lambda: og.Sequential(Linear(4, 3))(torch.ones(2, 4, dtype=torch.bfloat16)),
        "0:Linear: got input dtype torch.bfloat16, expected torch.float32",
    ),
    "integers": (
        lambda: og.Sequential(ReLU())(torch.ones(2, 4, dtype=torch.int64)),
        "0:ReLU: got dtype torch.int64, expected a float",
    ),
    "scalar": (
        lambda: og.Sequential(ReLU())(torch.tensor(1.0)),
        r"got a scalar, expected \[\*, width\]",
    ),
    "device": (
        lambda: og.Sequential(Linear(4, 3, device="meta"))(torch.ones(2, 4)),
        "0:Linear: got input on cpu, expected meta",
    ),
    "no extra input": (
        lambda: og.Sequential(Add("r"))(torch.ones(2, 4)),
        r"Sequential: got 0 extra inputs, expected 1 \(other\)",
    ),
    "two extra inputs": (
        lambda: og.Sequential(AddExtraInput())(*[torch.ones(2, 4)] * 3),
        r"Sequential: got 2 extra inputs, expected 1 \(other\)",
    ),
    "a surplus one": (
        lambda: og.Sequential(ReLU())(torch.ones(2, 4), torch.ones(2, 4)),
        "Sequential: got 1 extra inputs, expected none",
    ),
    "width of an extra input": (
        lambda: og.Sequential(ReLU(), Add())(torch.ones(2, 4), torch.ones(2, 1)),
        "1:Add: got .*1.*, expected .*4",
    ),
    "rows of an extra input": (
        lambda: og.Sequential(ReLU(), Add())(torch.ones(2, 4), torch.ones(1, 4)),
        r"1:Add: got other of shape \(1, 4\), expected \(2, 4\)",
    ),
    "leading sizes of an extra input": (
        lambda: og.Sequential(ReLU(), Add())(torch.ones(2, 3, 4), torch.ones(3, 2, 4)),
        r"1:Add: got other of shape \(3, 2, 4\), expected \(2, 3, 4\)",
    ),
    "rank of an extra input": (
        lambda: og.Sequential(ReLU(), Add())(torch.ones(2, 3, 4), torch.ones(6, 4)),
        "1:Add: got .*, expected ",
    ),
    "dtype of an extra input": (
        lambda: og.Sequential(ReLU(), Add())(torch.ones(2, 4), torch.ones(2, 4).long()),
        "1:Add: got other dtype torch.int64, expected ",
    ),
    "probability": (lambda: Dropout(1.5), "Dropout: got p=1.5, expected .* 0 to 1"),
    "GELU": (lambda: GELU("no"), "GELU: got approximate='no', expected 'tanh', 'none' or 'fast'"),
    "GEGLU": (
        lambda: GEGLU("no"),
        "GEGLU: got approximate='no', expected 'tanh', 'none' or 'fast'",
    ),
    "two Tees of a name": (
        lambda: og.Sequential(Tee("r"), Tee("r"), Add("r"))(torch.ones(2, 4)),
        "1:Tee: channel 'r' has two producers",
    ),
    "a Tee after its Add": (
        lambda: og.Sequential(Add("r"), ReLU(), Tee("r"))(torch.ones(2, 4)),
        "2:Tee: channel 'r' is read before it is provided",
    ),
    "no op": (lambda: Residual(nn.ReLU()), "Residual: got ReLU, expected ops of opsgraph"),
}


@pytest.mark.parametrize("call, message", ERRORS.values(), ids=ERRORS)
def test_error(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_errors_are_one_family() -> None:
    with pytest.raises(og.OpsgraphError, match=re.escape("0:Linear")):
        og.Sequential(Linear(4, 3))(torch.ones(2, 5))


def test_no_columns(device: str) -> None:
    """Rows of width 0 are legal wherever PyTorch takes them."""

    for build in (lambda: [SiLU()], lambda: [SwiGLU()], lambda: [ConstantScale(2.0)]):
        check(build, (3, 0), device=device)


@pytest.mark.parametrize("given", [True, False])
def test_a_width_of_0_is_a_size_that_is_known(given: bool) -> None:
    """Also where it was left out, for a neighbour to tell."""
    size = (0,) if given else ()
    ops = [Linear(4, 0), Bias(*size), RMSNorm(*size), LayerNorm(*size), LayerScale(*size)]
    module = og.Sequential(*ops, Residual(Bias(*size)), Linear(0, 3))
    x = torch.randn(5, 4, requires_grad=True)
    y = module(x)
    assert torch.equal(y, module[-1].bias.expand(5, 3))
    y.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())
    with pytest.raises(og.OpsgraphError, match=re.escape("input width 2, expected 0")):
        og.Sequential(Bias(0))(torch.ones(1, 2))
