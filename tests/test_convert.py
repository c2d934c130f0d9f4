"""torch.nn to opsgraph and back: same results, same parameters."""

import pytest
import torch
from torch import nn

import opsgraph as og
from opsgraph.ops import GELU, Add, LayerNorm, Linear, RMSNorm, SwiGLU, Tee
from opsgraph.ops.convert import PlainOp


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.LayerNorm(12),
        nn.Linear(12, 20),
        nn.GELU("tanh"),
        nn.Sequential(nn.Linear(20, 8, bias=False), nn.SiLU(), nn.RMSNorm(8)),
        nn.Hardtanh(),
        nn.Dropout(0.0),
        nn.Identity(),
        nn.ReLU(),
    )


def test_from_torch_computes_the_same_with_the_same_parameters() -> None:
    model = _model()
    module = og.Sequential.from_torch(model)
    assert list(module.state_dict()) == list(model.state_dict())
    for one, other in zip(module.parameters(), model.parameters(), strict=True):
        assert one is other
    x = torch.randn(3, 4, 12)
    torch.testing.assert_close(module(x), model(x))
    assert isinstance(module[4], nn.Hardtanh)
    assert isinstance(module[3], og.Sequential)
    y = module(x)
    y.sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for one, other in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-5)


def test_round_trip_has_the_same_classes() -> None:
    back = og.Sequential.from_torch(_model()).to_torch()
    assert [type(m) for m in back.modules()] == [type(m) for m in _model().modules()]
    x = torch.randn(5, 12)
    torch.testing.assert_close(back(x), _model()(x))


def test_to_torch_runs_other_ops_plainly() -> None:
    module = og.Sequential(
        RMSNorm(8, zero_centered_gamma=True),
        Linear(8, 12),
        SwiGLU(),
        GELU("none"),
        dtype=torch.double,
    )
    plain = module.to_torch()
    assert [type(m) for m in plain] == [PlainOp, nn.Linear, PlainOp, nn.GELU]
    x = torch.randn(2, 3, 8, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(plain(x), module(x))
    assert torch.autograd.gradcheck(plain, (x,))


def test_training_mode_is_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    module = og.Sequential.from_torch(model)
    assert not module.training
    assert not module[1].training
    x = torch.randn(2, 4)
    torch.testing.assert_close(module(x), model(x))


def test_what_cannot_be_converted_is_named() -> None:
    with pytest.raises(og.PlanError, match=r"from_torch: got Linear, expected nn.Sequential"):
        og.Sequential.from_torch(nn.Linear(2, 2))
    with pytest.raises(og.PlanError, match=r"0:Tee: it has extra inputs or outputs"):
        og.Sequential(Tee("r"), GELU(), Add("r")).to_torch()


def test_norm_over_several_dimensions_there_and_back() -> None:
    plain = nn.Sequential(nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4)))
    module = og.Sequential.from_torch(plain)
    assert [type(m) for m in module] == [LayerNorm, RMSNorm]
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(module(x), plain(x))
    back = module.to_torch()
    assert [m.normalized_shape for m in back] == [(3, 4), (3, 4)]
    torch.testing.assert_close(back(x), plain(x))
