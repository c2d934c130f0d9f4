"""Activations by transformers' names, as modules of torch.nn, and inside others."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import GELU, QGELU, XIELU, ClippedGELU, Gated, ReLU6, SwiGLU
from opsgraph.ops.activation_names import ACTIVATIONS, keywords

NAMED: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_python": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_fast": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_accurate": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_python_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_10": lambda x: F.gelu(x).clamp(-10, 10),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "swish": F.silu,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "linear": lambda x: x,
}


@pytest.mark.parametrize("name", NAMED)
def test_activations_by_transformers_names(name: str) -> None:
    x = torch.linspace(-14, 14, 57)[None]
    torch.testing.assert_close(ACTIVATIONS[name]()(x), NAMED[name](x))
    og.LayerNormMLP(8, 8, activation=name, device="cpu")


def test_arguments_of_a_name() -> None:
    assert keywords("gelu_python") == keywords("gelu")
    assert {"approximate", "round_steps"} <= {*keywords("gelu")}
    assert {"round_gate", "gate_second", "glu_interleave_size"} <= {*keywords("swiglu")}
    params = {"round_gate": True, "gate_second": True}
    mlp = og.LayerNormMLP(8, 8, activation="swiglu", activation_params=params, device="cpu")
    assert "swiglu rounded second" in mlp.plan().forward_source


MODULES: dict[str, nn.Module] = {
    "ReLU6": nn.ReLU6(),
    "LeakyReLU": nn.LeakyReLU(0.3),
    "Hardswish": nn.Hardswish(),
    "Mish": nn.Mish(),
    "Sigmoid": nn.Sigmoid(),
    "Tanh": nn.Tanh(),
}


@pytest.mark.parametrize("name", MODULES)
def test_from_torch_and_back(name: str) -> None:
    module = og.Sequential.from_torch(nn.Sequential(MODULES[name]), strict=True)
    x = torch.linspace(-8, 8, 33)[None]
    assert type(module[0]).__name__ == name
    torch.testing.assert_close(module(x), MODULES[name](x))
    assert repr(module.to_torch()[0]) == repr(MODULES[name])


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: Gated(SwiGLU()), "Gated: got activation SwiGLU, expected an activation that"),  # type: ignore[arg-type]
        (lambda: SwiGLU(round_gate="yes"), "SwiGLU: got round_gate='yes'"),  # type: ignore[arg-type]
        (lambda: SwiGLU(gate_second=2), "SwiGLU: got gate_second=2"),  # type: ignore[arg-type]
        (lambda: QGELU(round_steps=None), "QGELU: got round_steps=None"),  # type: ignore[arg-type]
        (lambda: GELU("new"), "GELU: got approximate='new', expected 'tanh', 'none' or 'fast'"),
        (lambda: ClippedGELU(-1.0), "ClippedGELU: got limit=-1.0"),
    ],
)
def test_errors(build: Callable[[], Any], message: str) -> None:
    with pytest.raises(og.OpsgraphError, match=message):
        build()


def test_a_gate_of_any_activation() -> None:
    x = torch.randn(5, 12)
    a, b = x.chunk(2, -1)
    torch.testing.assert_close(Gated(ReLU6())(x), F.relu6(a) * b)
    composed = Gated(GELU("none", round_steps=True), round_gate=True)
    half = (x * 3).bfloat16()
    a, b = half.chunk(2, -1)
    expected = a * 0.5 * (1.0 + torch.erf(a / 2**0.5)) * b
    torch.testing.assert_close(composed(half), expected)


class XIELUActivation(nn.Module):
    """As transformers has it."""

    __module__ = "transformers.activations"

    def __init__(self) -> None:
        super().__init__()
        self.alpha_p = nn.Parameter(torch.tensor([0.3]))
        self.alpha_n = nn.Parameter(torch.tensor([-0.2]))
        self.register_buffer("beta", torch.tensor(0.25))
        self.register_buffer("eps", torch.tensor(-1e-6))


def test_xielu_of_transformers_shares_its_scalars() -> None:
    module = XIELUActivation()
    op = og.ops.XIELU.of(module)
    assert op.alpha_p is module.alpha_p
    assert (op.beta, op.eps) == (0.25, float(module.eps))
    x = torch.randn(4, 6, requires_grad=True)
    op(x).sum().backward()
    assert module.alpha_n.grad is not None
    assert og.Sequential.from_torch(nn.Sequential(module), strict=True)[0].beta == 0.25


def test_xielu_begins_as_it_is_told() -> None:
    op = og.ops.XIELU(0.7, 1.25, 0.25)
    p = F.softplus(op.alpha_p)
    torch.testing.assert_close(p, torch.tensor([0.7]))
    torch.testing.assert_close(op.beta + F.softplus(op.alpha_n), torch.tensor([1.25]))
    with pytest.raises(
        og.OpsgraphError, match=r"alpha_n_init=0\.2, expected a finite number above 0\.25"
    ):
        og.ops.XIELU(0.7, 0.2, 0.25)


@pytest.mark.parametrize("begin", [0.01, 3.0, 1000.0])
def test_xielu_begins_with_what_it_is_given(begin: float) -> None:
    op = og.ops.XIELU(begin, begin + 0.5, dtype=torch.float64)
    for parameter in (op.alpha_p, op.alpha_n):
        torch.testing.assert_close(torch.nn.functional.softplus(parameter).item(), begin)
    with pytest.raises(og.OpsgraphError, match="alpha_p_init=inf, expected a finite number"):
        og.ops.XIELU(float("inf"))


@pytest.mark.parametrize("begin", [0.8, 1e-6, 30.0, 900.0])
def test_xielu_begins_as_told(begin: float) -> None:
    op = XIELU(begin, begin + 0.5)
    torch.testing.assert_close(F.softplus(op.alpha_p), torch.tensor([begin]), rtol=1e-3, atol=0)
    torch.testing.assert_close(F.softplus(op.alpha_n), torch.tensor([begin]), rtol=1e-3, atol=0)
    with torch.device("meta"):
        assert XIELU(begin, begin + 0.5).alpha_p.is_meta
