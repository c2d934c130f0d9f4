"""Calls of a known kind make no key; whatever changes what is right makes another kind."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import opsgraph as og
from opsgraph.features.several import SeveralLayers
from opsgraph.ops import GELU, Add, Dropout, GroupedLinear, Linear, RMSNorm
from opsgraph.recipe import DelayedScaling, Float8CurrentScaling
from opsgraph.run import stage as stages


@pytest.fixture
def keys(monkeypatch):
    """Counts the keys that are made."""
    made = []

    def key_of(*arguments):
        made.append(arguments)
        return real(*arguments)

    real = stages.key_of
    monkeypatch.setattr(stages, "key_of", key_of)
    return made


def module(*more):
    torch.manual_seed(0)
    return og.Sequential(RMSNorm(32), Linear(32, 64, bias=False), GELU(), *more)


def of_layers(op, layers):
    """The op, with the parameters of several layers."""
    return op.borrow(SeveralLayers(layers), weight="weight")


def module_like(model):
    fresh = module()
    fresh.load_state_dict(model.state_dict())
    return fresh


def warm(model, x, calls=2):
    for _ in range(calls):
        y = model(x)
    return y


def test_known_calls_make_no_key(keys):
    model, x = module(), torch.randn(4, 32, requires_grad=True)
    warm(model, x)
    keys.clear()
    for rows in (1, 4, 9):
        model(torch.randn(rows, 32, requires_grad=True)).sum().backward()
    assert not keys
    with torch.no_grad():
        warm(model, x)
    keys.clear()
    with torch.no_grad():
        model(x)
    assert not keys


def test_parameters_that_are_made_at_each_call_are_known_too(keys):
    """As one of several layers' parameters, of which some may be replaced."""
    layers = [nn.Linear(32, 8, bias=False) for _ in range(2)]
    model, x = og.Sequential(of_layers(Linear(32, 16, bias=False), layers)), torch.randn(4, 32)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            warm(model, x)
            keys.clear()
            before = model(x)
            assert not keys
            layers[1].weight = nn.Parameter(layers[1].weight.detach() * 2)
            after = model(x)
            torch.testing.assert_close(after[:, 8:], before[:, 8:] * 2)
            torch.testing.assert_close(after[:, :8], before[:, :8])


def test_weights_of_groups_are_known(keys):
    model = og.Sequential(GroupedLinear(2, 32, 16, bias=False))
    x, sizes = torch.randn(5, 32, requires_grad=True), torch.tensor([2, 3])
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            for _ in range(2):
                model(x, sizes)
            keys.clear()
            y = model(x, sizes)
            assert not keys
            assert y.requires_grad is grad
            expected = torch.cat([x[:2] @ model[0].weight0.T, x[2:] @ model[0].weight1.T])
            torch.testing.assert_close(y, expected)
    model[0].bias = nn.Parameter(torch.ones(2, 16))
    torch.testing.assert_close(model(x, sizes), expected + 1)


@pytest.mark.parametrize("change", [
    "dtype", "frozen", "no input gradient", "no grad", "inference", "three dimensions",
])  # fmt: skip
def test_another_kind_makes_a_key_and_is_known_from_then_on(keys, change):
    model, x = module(), torch.randn(4, 32, requires_grad=True)
    warm(model, x)
    keys.clear()
    context = torch.enable_grad
    if change == "dtype":
        model, x = model.to(torch.bfloat16), x.detach().bfloat16().requires_grad_()
    elif change == "frozen":
        model[1].weight.requires_grad_(False)
    elif change == "no input gradient":
        x = x.detach()
    elif change == "no grad":
        context = torch.no_grad
    elif change == "inference":
        context = torch.inference_mode
    else:
        x = x.detach()[None].requires_grad_()
    with context():
        y = model(x)
        assert len(keys) >= 1
        keys.clear()
        again = model(x)
    assert not keys
    torch.testing.assert_close(again, y, rtol=0, atol=0)
    assert y.requires_grad == (context is torch.enable_grad)
    if y.requires_grad:
        y.sum().backward()
        assert (model[1].weight.grad is None) == (change == "frozen")
        assert (x.grad is None) == (change == "no input gradient")


def test_parameters_are_read_at_each_call(keys):
    model, x = module(), torch.randn(4, 32)
    first = warm(model, x)
    keys.clear()
    model[1].weight = nn.Parameter(model[1].weight.detach() * 2)
    again = model(x)
    assert not keys
    torch.testing.assert_close(again, module_like(model)(x), rtol=0, atol=0)
    model[1].weight.data = torch.zeros_like(model[1].weight)
    assert model(x).abs().sum() == 0
    assert first.abs().sum() > 0
    other = {"1.weight": torch.ones(64, 32)}
    with_ones = torch.func.functional_call(model, other, (x,))
    assert with_ones.abs().sum() > 0
    assert model(x).abs().sum() == 0


def test_a_parameter_that_appears_or_goes(keys):
    model, x = module(), torch.randn(4, 32)
    plain = warm(model, x)
    model[1]._parameters["bias"] = nn.Parameter(torch.ones(64))
    with_bias = model(x)
    assert not torch.equal(with_bias, plain)
    warm(model, x)
    model[1]._parameters["bias"] = None
    torch.testing.assert_close(model(x), plain, rtol=0, atol=0)


def test_modes_of_ops():
    model, x = module(Dropout(0.5)), torch.randn(64, 32)
    warm(model, x)
    assert (model(x) == 0).float().mean() > 0.3
    model.eval()
    assert (warm(model, x) == 0).float().mean() < 0.1
    model.train()
    assert (model(x) == 0).float().mean() > 0.3


def test_autocast_and_its_dtypes():
    model, x = module(), torch.randn(4, 32, requires_grad=True)
    warm(model, x)
    for dtype in (torch.bfloat16, torch.float16, torch.bfloat16):
        with torch.autocast("cpu", dtype):
            assert warm(model, x).dtype == dtype
        assert model(x).dtype == torch.float32


def test_recipes_have_kinds_of_their_own(keys):
    model, x = module(), torch.randn(16, 32, requires_grad=True)
    plain = warm(model, x)
    for recipe in (Float8CurrentScaling(), DelayedScaling()):
        with og.autocast(recipe=recipe):
            y = warm(model, x)
            keys.clear()
            model(x)
            assert not keys
        assert not torch.equal(y, plain)
        torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
    with og.autocast(recipe=Float8CurrentScaling()), torch.no_grad():
        assert not torch.equal(model(x), plain)


@pytest.mark.parametrize("kind", ["grad", "vmap", "jvp", "trace", "dual"])
def test_transforms_are_followed(kind):
    model, x = module(), torch.randn(4, 32)
    y = warm(model, x)
    ones = torch.ones_like(x)
    if kind == "grad":
        leaf = x.clone().requires_grad_()
        model(leaf).sum().backward()
        found, want = torch.func.grad(lambda t: model(t).sum())(x), leaf.grad
    elif kind == "vmap":
        found, want = torch.func.vmap(model)(x[:, None])[:, 0], y
    elif kind == "trace":
        found, want = torch.jit.trace(model, (x,))(x + 1), model(x + 1)
    elif kind == "jvp":
        found, want = torch.func.jvp(model, (x,), (ones,))[1], (model(x + 1e-3) - y) / 1e-3
    else:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, ones)
            found = torch.autograd.forward_ad.unpack_dual(model(dual)).tangent
        want = (model(x + 1e-3) - y) / 1e-3
    assert found is not None
    loose = {"rtol": 2e-2, "atol": 2e-2} if kind in ("jvp", "dual") else {}
    torch.testing.assert_close(found, want, **loose)


def test_the_same_tensor_twice_goes_by_its_key(keys):
    model, x = og.Sequential(Linear(32, 32, bias=False), Add()), torch.randn(4, 32)
    y = model(x, x)
    model(x, x)
    keys.clear()
    torch.testing.assert_close(model(x, x), y, rtol=0, atol=0)
    assert len(keys) == 1
    torch.testing.assert_close(model(x, x.clone()), y, rtol=0, atol=0)


def test_hooks_are_called():
    model, x = module(), torch.randn(4, 32)
    warm(model, x)
    seen = []
    handle = model[2].register_forward_hook(lambda *_: seen.append(1))
    model(x)
    handle.remove()
    model(x)
    assert seen == [1]


def test_without_the_check_all_goes_by_keys(keys, monkeypatch):
    monkeypatch.setattr("opsgraph.features.known.same_kinds", lambda *_: None)
    model, x = module(), torch.randn(4, 32)
    y = warm(model, x, 3)
    assert len(keys) == 3
    assert y.shape == (4, 64)


def test_make_fx_sees_the_ops_of_calls_that_are_replayed():
    model, x = module(), torch.randn(4, 32)
    warm(model, x, 4)
    traced = make_fx(model)(x)
    torch.testing.assert_close(traced(x + 1), model(x + 1))
