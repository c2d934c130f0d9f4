"""LayerNormMLP against an fp64 formula of its own: outputs and every gradient."""

import math
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from compare import assert_close, lay_out
from torch import Tensor

import opsgraph as og
from opsgraph.ops import Linear, SwiGLU

HIDDEN, FFN = 8, 12
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def tanh_gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


PLAIN = {
    "gelu": tanh_gelu,
    "qgelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": torch.relu,
    "srelu": lambda x: torch.relu(x) ** 2,
    "silu": lambda x: x * torch.sigmoid(x),
}
GATES = {
    "geglu": PLAIN["gelu"],
    "qgeglu": PLAIN["qgelu"],
    "reglu": PLAIN["relu"],
    "sreglu": PLAIN["srelu"],
    "swiglu": PLAIN["silu"],
    "glu": torch.sigmoid,
}
ACTIVATIONS = (*PLAIN, *GATES, "clamped_swiglu")


def activated(x: Tensor, name: str, params: dict[str, Any]) -> Tensor:
    if name == "gelu" and params.get("approximate") == "none":
        return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
    if name in PLAIN:
        return PLAIN[name](x)
    a, b = x.chunk(2, dim=-1)
    if name in GATES:
        return GATES[name](a) * b
    limit, alpha = params.get("limit", 7.0), params.get("alpha", 1.702)
    # Not torch.clamp: its gradient at the limit, which bf16 values hit, differs between versions.
    a = torch.where(a > limit, limit, a)
    b = torch.where(b.abs() > limit, limit * b.sign(), b) + params.get("glu_linear_offset", 1.0)
    return a * torch.sigmoid(alpha * a) * b


class Setting(NamedTuple):
    normalization: str = "LayerNorm"
    activation: str = "gelu"
    bias: bool = True
    zero_centered_gamma: bool = False
    dtype: torch.dtype = torch.float32

    def module(self, **more: Any) -> og.LayerNormMLP:
        """With every parameter away from its initial value."""
        torch.manual_seed(0)
        options = self._asdict()
        place = {"params_dtype": options.pop("dtype"), "device": "cpu"}
        made = og.LayerNormMLP(HIDDEN, FFN, **options, **place, **more)
        for name, parameter in made.named_parameters():
            spread = 0.5 if name.startswith("fc") and name.endswith("weight") else 0.3
            with torch.no_grad():
                parameter.add_(torch.randn_like(parameter) * spread)
        return made


def formula(
    setting: Setting, x: Tensor, p: dict[str, Tensor], params: dict[str, Any], eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The output without FC2's bias, and the norm's output."""
    gamma = p["layer_norm_weight"] + (1 if setting.zero_centered_gamma else 0)
    if setting.normalization == "LayerNorm":
        mean = x.mean(-1, keepdim=True)
        var = ((x - mean) ** 2).mean(-1, keepdim=True)
        normed = (x - mean) * torch.rsqrt(var + eps) * gamma + p["layer_norm_bias"]
    else:
        normed = x * torch.rsqrt((x**2).mean(-1, keepdim=True) + eps) * gamma
    inner = normed @ p["fc1_weight"].T
    if setting.bias:
        inner = inner + p["fc1_bias"]
    return activated(inner, setting.activation, params) @ p["fc2_weight"].T, normed


def assert_meets_formula(
    setting: Setting,
    shape: tuple[int, ...] = (3, 2, HIDDEN),
    layout: str = "plain",
    return_bias: bool = False,
    return_layernorm_output: bool = False,
    **more: Any,
) -> None:
    """Every output and every gradient, through all that is returned."""
    mlp = setting.module(
        return_bias=return_bias, return_layernorm_output=return_layernorm_output, **more
    )
    x = lay_out(torch.randn(shape, dtype=torch.float64).to(setting.dtype), layout)
    x.requires_grad_()
    wide = {n: v.detach().double().requires_grad_() for n, v in mlp.named_parameters()}
    wide_x = x.detach().double().requires_grad_()
    params = more.get("activation_params") or {}
    y, normed = formula(setting, wide_x, wide, params, more.get("eps", 1e-5))
    expected = {"out": y}
    if return_bias:
        expected["fc2_bias"] = wide.get("fc2_bias")
    elif setting.bias:
        expected["out"] = y + wide["fc2_bias"]
    if return_layernorm_output:
        expected["ln_out"] = normed
    result = mlp(x)
    found = dict(zip(expected, result if len(expected) > 1 else (result,), strict=True))
    if return_bias and not setting.bias:
        assert found.pop("fc2_bias") is None
        del expected["fc2_bias"]
    dys = [torch.randn_like(value) for value in found.values()]
    leaves, wide_leaves = {"x": x, **dict(mlp.named_parameters())}, {"x": wide_x, **wide}
    grads = torch.autograd.grad(list(found.values()), list(leaves.values()), dys)
    wides = [dy.double() for dy in dys]
    wanted = torch.autograd.grad(list(expected.values()), list(wide_leaves.values()), wides)
    for name, value in found.items():
        assert value.dtype == setting.dtype
        assert_close(value.detach(), expected[name].detach(), name, gemm=True, rounded=True)
    for name, gradient, right in zip(leaves, grads, wanted, strict=True):
        assert gradient.dtype == setting.dtype
        assert_close(gradient, right, f"d {name}", gemm=True, rounded=True)
    with torch.no_grad():
        again = mlp(x)
    again = again[0] if isinstance(again, tuple) else again
    assert_close(again, expected["out"].detach(), "inference", gemm=True, rounded=True)


NORMS = ("LayerNorm", "RMSNorm")
FULL = [Setting(*v) for v in product(NORMS, ACTIVATIONS, (True, False), (False, True), DTYPES)]
COVERING = [s for s in FULL if s.dtype == torch.float32 and s.activation in ("gelu", "swiglu")]
COVERING += [
    Setting(NORMS[(k + d) % 2], activation, (k + d) % 3 > 0, (k // 2 + d) % 2 == 0, dtype)
    for k, activation in enumerate(ACTIVATIONS)
    for d, dtype in enumerate(DTYPES)
]
LABEL = dict(ids=lambda s: "-".join(str(v).removeprefix("torch.") for v in s))


@pytest.mark.parametrize("setting", COVERING, **LABEL)
def test_formula(setting: Setting) -> None:
    assert_meets_formula(setting)


@pytest.mark.slow
@pytest.mark.parametrize("setting", FULL, **LABEL)
def test_formula_for_everything(setting: Setting) -> None:
    assert_meets_formula(setting)


@pytest.mark.parametrize("layout", ["plain", "transposed", "strided", "offset", "expanded rows"])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (0, 8), (3, 2, 8), (2, 3, 2, 8)], ids=str)
def test_shapes_and_layouts(shape: tuple[int, ...], layout: str) -> None:
    assert_meets_formula(Setting("RMSNorm", "swiglu"), shape, layout)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("return_layernorm_output", [True, False])
@pytest.mark.parametrize("return_bias", [True, False])
@pytest.mark.parametrize("normalization", NORMS)
def test_what_is_returned(
    normalization: str, return_bias: bool, return_layernorm_output: bool, bias: bool
) -> None:
    more = dict(return_bias=return_bias, return_layernorm_output=return_layernorm_output)
    assert_meets_formula(Setting(normalization, "geglu", bias), **more)
    assert_meets_formula(Setting(normalization, "geglu", bias, dtype=torch.bfloat16), **more)


@pytest.mark.parametrize(
    "activation, params",
    [
        ("gelu", {"approximate": "none"}),
        ("clamped_swiglu", {"limit": 0.7, "alpha": 1.0, "glu_linear_offset": 0.5}),
        ("clamped_swiglu", {"limit": 1.0}),
    ],
)
def test_activation_params(activation: str, params: dict[str, Any]) -> None:
    assert_meets_formula(Setting(activation=activation), activation_params=params)


def test_eps() -> None:
    assert_meets_formula(Setting("LayerNorm"), eps=0.5)
    assert_meets_formula(Setting("RMSNorm"), eps=0.5)


def test_hints_change_nothing() -> None:
    plain, hinted = Setting().module(), Setting().module(name="mlp", seq_length=3)
    more = Setting().module(micro_batch_size=2, sequence_parallel=True)
    x = torch.randn(3, 2, HIDDEN)
    for other in (hinted, more):
        assert torch.equal(plain(x), other(x, is_first_microbatch=True))
    assert torch.equal(plain(inp=x), plain(x, None))


def test_autocast() -> None:
    mlp = Setting().module(return_bias=True, return_layernorm_output=True)
    x = torch.randn(4, HIDDEN, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = mlp(x)
    assert [value.dtype for value in outputs] == [torch.bfloat16] * 3
    leaves = [x, *mlp.parameters()]
    grads = torch.autograd.grad(sum(v.float().sum() for v in outputs), leaves)
    assert {g.dtype for g in grads} == {torch.float32}
    for value, exact in zip(outputs, mlp(x), strict=True):
        torch.testing.assert_close(value.float(), exact, rtol=3e-2, atol=3e-2)


def test_mlp_without_a_norm_meets_its_formula() -> None:
    mlp = og.Sequential(Linear(HIDDEN, 2 * FFN), SwiGLU(), Linear(FFN, HIDDEN), device="cpu")
    x, dy = torch.randn(3, 2, HIDDEN, requires_grad=True), torch.randn(3, 2, HIDDEN)
    leaves = [x, *mlp.parameters()]
    found = torch.autograd.grad(mlp(x), leaves, dy)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wide_x, w1, b1, w2, b2 = wide
    a, b = (wide_x @ w1.T + b1).chunk(2, -1)
    expected = torch.autograd.grad((a * torch.sigmoid(a) * b) @ w2.T + b2, wide, dy.double())
    for got, right in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-3, atol=1e-5)
