"""Norms over several dimensions, and eps=None: as torch.nn's are."""

import copy

import pytest
import torch
from compiled import cold  # noqa: F401
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import GELU, AdaptiveLayerNorm, LayerNorm, Linear, Residual, RMSNorm, SiLU

KINDS = {"LayerNorm": (LayerNorm, nn.LayerNorm), "RMSNorm": (RMSNorm, nn.RMSNorm)}
kinds = pytest.mark.parametrize("ours, theirs", KINDS.values(), ids=KINDS)


def _gradients(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *module.parameters()], dy)]


class _Plain(nn.Module):
    def __init__(self, norm: nn.Module, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = norm, inner

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.norm(x))
        return x + nn.functional.gelu(self.inner(x), approximate="tanh")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@kinds
def test_norm_over_several_dimensions(
    ours: type, theirs: type, dtype: torch.dtype, device: str
) -> None:
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for shape in ((4, 6), (2, 4, 6), (1, 6), (4, 1), (3, 0), (0, 6), (0, 0)):
        torch.manual_seed(0)
        place = dict(eps=1e-2, device=device, dtype=dtype)
        module = og.Sequential(ours(shape, **place), SiLU(), Residual(ours(shape, **place), GELU()))
        for p in module.parameters():
            nn.init.normal_(p)
        oracle = _Plain(theirs(shape, **place), theirs(shape, **place))
        oracle.norm.load_state_dict(module[0].state_dict())
        oracle.inner.load_state_dict(module[2].ops[0].state_dict())
        oracle = oracle.double()
        for lead in ((), (3,), (2, 3), (0,)):
            x = torch.randn(*lead, *shape, dtype=dtype, device=device)
            dy = torch.randn_like(x)
            found = _gradients(module, x, dy)
            expected = _gradients(oracle, x.double(), dy.double())
            for one, other in zip(found, expected, strict=True):
                assert one.dtype == dtype
                torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=8 * tolerance)
            with torch.no_grad():
                torch.testing.assert_close(module(x), found[0], rtol=1e-5, atol=1e-5)


@kinds
def test_norm_over_several_dimensions_stands_anywhere(ours: type, theirs: type) -> None:
    """Before and after what changes the width, alone, zero-centred, and with a second derivative"""
    torch.manual_seed(0)
    x = torch.randn(3, 4, 6, dtype=torch.double, requires_grad=True)
    module = og.Sequential(Linear(6, 5), ours((4, 5)), Linear(5, 2), dtype=torch.double)
    plain = nn.Sequential(nn.Linear(6, 5), theirs((4, 5), eps=1e-5), nn.Linear(5, 2)).double()
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), plain(x))
    centred = ours((4, 6), zero_centered_gamma=True, dtype=torch.double)
    assert centred.weight.shape == (4, 6)
    bare = theirs((4, 6), elementwise_affine=False, eps=1e-5, dtype=torch.double)
    torch.testing.assert_close(centred(x), bare(x))
    torch.testing.assert_close(copy.deepcopy(centred)(x), bare(x))
    twice = og.Sequential(ours((4, 6), dtype=torch.double), double_backward=True)
    assert torch.autograd.gradgradcheck(twice, (x,))


def test_norm_over_several_dimensions_compiles() -> None:
    module = og.Sequential(LayerNorm((4, 6)), Linear(6, 3))
    x = torch.randn(5, 4, 6, requires_grad=True)
    y = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, module(x))
    (found,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(module(x).square().sum(), x)
    torch.testing.assert_close(found, expected)


def test_trailing_dimensions_are_checked_in_each_call() -> None:
    module = og.Sequential(SiLU(), LayerNorm((4, 6)))
    for shape in ((5, 6), (2, 8, 6), (6,), (2, 6, 4)):
        with pytest.raises(og.OpError, match=r"1:LayerNorm: got input"):
            module(torch.ones(shape))
    assert module(torch.ones(4, 6)).shape == (4, 6)
    with pytest.raises(og.OpError, match=r"AdaptiveLayerNorm: got normalized_shape=\(4, 6\)"):
        AdaptiveLayerNorm((4, 6))  # type: ignore[arg-type]


def test_sizes_that_were_left_out_come_from_a_checkpoint_of_several() -> None:
    source, norm = nn.LayerNorm((4, 6)), LayerNorm()
    nn.init.normal_(source.weight)
    norm.load_state_dict(source.state_dict())
    assert norm.normalized_shape == (4, 6)
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(norm(x), source(x))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)
def test_eps_of_none_is_the_epsilon_that_pytorch_takes(dtype: torch.dtype, affine: bool) -> None:
    size = 1e-7 if dtype == torch.float64 else 3e-4
    x = torch.full((2, 8), size, dtype=dtype)
    for shape in (8, (2, 8)):
        plain = nn.RMSNorm(shape, None, affine, dtype=dtype)
        module = RMSNorm(shape, None, affine, dtype=dtype)
        torch.testing.assert_close(module(x), plain(x))
        converted = og.Sequential.from_torch(nn.Sequential(plain))
        torch.testing.assert_close(converted(x), plain(x))
        assert converted.to_torch()[0].eps is None
        torch.testing.assert_close(converted.to_torch()(x), plain(x))


def test_eps_of_none_follows_the_input_of_each_call() -> None:
    module = RMSNorm(8, None, elementwise_affine=False)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.full((1, 8), 1e-4, dtype=dtype)
        torch.testing.assert_close(module(x), nn.functional.rms_norm(x, (8,)))


def test_a_norm_without_a_torch_class_checks_its_dimensions_too() -> None:
    module = og.Sequential(LayerNorm((4, 6), zero_centered_gamma=True))
    plain, x = module.to_torch(), torch.randn(2, 4, 6)
    torch.testing.assert_close(plain(x), module(x))
    with pytest.raises(og.OpError, match=r"LayerNorm: got input of shape \(8, 6\), expected"):
        plain(torch.randn(8, 6))


class _Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@kinds
def test_a_norm_over_several_dimensions_may_be_parametrized(ours: type, theirs: type) -> None:
    x, dy = torch.randn(2, 3, 8) + 1, torch.randn(2, 3, 8)
    module, expected = ours((3, 8), 1e-5), theirs((3, 8), 1e-5)
    module(x)
    for made in (module, expected):
        nn.utils.parametrize.register_parametrization(made, "weight", _Doubled())
    for norm in (module, og.Sequential(module)):
        for found, right in zip(_gradients(norm, x, dy), _gradients(expected, x, dy), strict=True):
            torch.testing.assert_close(found, right)


def _llama(x: Tensor, weight: Tensor) -> Tensor:
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype)


def _t5(x: Tensor, weight: Tensor) -> Tensor:
    h = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * (h.to(weight.dtype) if weight.dtype.itemsize == 2 else h)


def _deberta(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = x.float()
    centred = h - h.mean(-1, keepdim=True)
    h = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * h.to(x.dtype) + bias


def _nemotron(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return nn.functional.layer_norm(x, x.shape[-1:], weight + 1, bias, 1e-6)


ROUNDING = {
    "Llama": (RMSNorm, {"normalized_dtype": "input"}, _llama),
    "T5": (RMSNorm, {"normalized_dtype": "weight"}, _t5),
    "DeBERTa": (LayerNorm, {"normalized_dtype": "input"}, _deberta),
    "Nemotron": (LayerNorm, {"zero_centered_gamma": True, "round_gamma": True}, _nemotron),
}


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("model", ROUNDING)
def test_norms_round_as_models_do(
    model: str, dtype: torch.dtype, weight_dtype: torch.dtype, device: str
) -> None:
    """The bits of single operations but for a statistic's last one; gradients as autograd's."""
    kind, options, oracle = ROUNDING[model]
    if model == "Nemotron" and dtype != weight_dtype:
        pytest.skip("F.layer_norm takes parameters of x's dtype")
    torch.manual_seed(0)
    norm = kind(96, 1e-6, device=device, dtype=weight_dtype, **options)
    for p in norm.parameters():
        nn.init.normal_(p, 0.8, 0.3)
    module = og.Sequential(norm)
    x = torch.randn(64, 96, dtype=dtype, device=device)
    y = oracle(x, *norm.parameters())
    dy = torch.randn_like(y)
    found = _gradients(module, x, dy)
    leaf = x.detach().requires_grad_()
    y = oracle(leaf, *norm.parameters())
    expected = [y.detach(), *torch.autograd.grad(y, [leaf, *norm.parameters()], dy)]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error < (2e-2 if torch.bfloat16 in (dtype, weight_dtype) else 5e-4)
    if y.dtype != torch.float32:
        assert (found[0] != expected[0]).float().mean() < 1e-3
    with torch.no_grad():
        assert torch.equal(module(x), found[0])
    if device == "cpu" and model in ("Llama", "T5"):
        assert torch.equal(og.Sequential(norm, backends=("reference",))(x), expected[0])


def test_norms_say_how_they_round() -> None:
    with pytest.raises(og.OpError, match="normalized_dtype"):
        RMSNorm(8, normalized_dtype="half")
    assert "normalized_dtype='input'" in repr(RMSNorm(8, normalized_dtype="input"))
    module = og.Sequential(RMSNorm(8, normalized_dtype="input"), Linear(8, 8, bias=False))
    x = torch.randn(4, 8, dtype=torch.bfloat16)
    assert module(x).dtype == torch.float32  # of an fp32 weight, as PyTorch promotes
    assert module.to_torch()(x).dtype == torch.float32
