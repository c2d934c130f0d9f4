"""Declarations of fusers that cannot work are refused at `register`, with the names there are."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.base.backend import backends
from opsgraph.features.declared_fusers import verify
from opsgraph.fuser import registered
from opsgraph.ops import BasicLinear, RMSNorm


def declared(**attributes: Any) -> type[og.Fuser]:
    def fwd(self: Any, x: Tensor) -> Any:
        return x, ()

    usual = {"backend": "aten", "pattern": dict(norm=RMSNorm, fc=BasicLinear), "fwd": fwd}
    return type("Wrong", (og.Fuser,), usual | attributes)


def needs_rstd(self: Any, dy: Tensor, norm_std: Tensor) -> Any: ...
def needs_fc(self: Any, x: Tensor, linear_weight: Tensor) -> Any: ...
def needs_dy(self: Any, x: Tensor, dy: Tensor) -> Any: ...
def rejects_y(self: Any, norm: Any, y: og.Spec) -> str | None: ...


@pytest.mark.parametrize(
    "attributes, message",
    [
        (
            dict(backend="tritn"),
            "backend 'tritn', expected one of .*triton, cublaslt, cpu, aten, reference",
        ),
        (dict(backend=None), "backend None, expected one of"),
        (dict(pattern=dict(norm=nn.Linear)), "expected op classes under names"),
        (dict(pattern=dict(norm=RMSNorm | nn.Linear)), "expected op classes under names"),
        (dict(pattern=dict(norm=RMSNorm(8))), "expected op classes under names"),
        (dict(pattern={}), "expected op classes under names"),
        (dict(fwd=None), "neither fwd nor bwd"),
        (dict(bwd=needs_rstd), r"bwd needs \['norm_std'\], which nobody has.*norm_rstd, norm_w"),
        (dict(fwd=needs_fc), r"fwd needs \['linear_weight'\].*fc_weight.*norm_eps"),
        (dict(fwd=needs_dy), r"fwd needs \['dy'\]"),
        (dict(again=needs_dy), r"again needs \['dy'\]"),
        (dict(fwd=None, bwd=needs_fc, again=needs_fc), "got again and no fwd, which it repeats"),
        (dict(reject=rejects_y), r"reject needs \['y'\].*fc, norm, x"),
        (dict(saves=("fc_z",)), r"cannot save \['fc_z'\]; the names there are:.*norm_rstd"),
        (dict(saves=("fc_weight",)), r"cannot save \['fc_weight'\]"),
        (dict(saves=("norm_eps",)), r"cannot save \['norm_eps'\]"),
        (dict(saves=("x",)), r"cannot save \['x'\]"),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_register_says_what_is_wrong(attributes: dict[str, Any], message: str) -> None:
    before = registered()
    with pytest.raises(og.RegisterError, match=f"^Wrong: .*{message}"):
        og.register(declared(**attributes))
    assert registered() == before


def consumes_act(self: Any, dy: Tensor, fc_weight: Tensor) -> Any: ...


@pytest.mark.parametrize(
    "attributes, message",
    [
        (dict(pattern=None), "got pattern None, expected op classes under names"),
        (dict(pattern=RMSNorm), "got pattern <class .*, expected op classes under names"),
        (dict(pattern=dict(x=RMSNorm)), r"got \['x'\] in pattern, expected names other than"),
        (dict(pattern={"my op": RMSNorm}), r"got \['my op'\] in pattern"),
        (dict(wgrad=consumes_act), "got wgrad, expected bwd, or wgrad and dgrad"),
        (dict(bwd=consumes_act, dgrad=consumes_act), "got dgrad and bwd, expected bwd"),
        (dict(wgrad=consumes_act, dgrad=consumes_act), r"got wgrad and the gradients \['fc_w"),
        (dict(gives=("norm_x",), bwd=consumes_act), r"gives \['norm_x'\], expected the input of"),
        (dict(gives=("fc_x",)), r"gives \['fc_x'\], expected the input of a linear layer, last, f"),
        (dict(priority="high"), "got priority 'high', expected a number or None"),
        (dict(priority=float("nan")), "got priority nan, expected a number"),
        (dict(dtypes=torch.float32), "got dtypes = torch.float32, expected a tuple of torch's dty"),
        (dict(dtypes=("bf16",)), r"got dtypes = \('bf16',\), expected a tuple of torch's dtypes"),
        (dict(saves="fc_x"), "got saves = 'fc_x', expected a tuple of names"),
        (dict(bwd=consumes_act, consumes=("fc_x",)), r"consumes \['fc_x'\], which bwd does not"),
        (dict(wants=("fc_weight",)), "got wants = .*, expected the kernel's words under the names"),
        (dict(wants=dict(norm_rstd="rstd")), r"wants \['norm_rstd'\], which it neither saves nor"),
        (dict(__init__=lambda self, more: None), "cannot be made: .*more"),
    ],
)
def test_register_says_what_is_wrong_with_options(attributes: dict[str, Any], message: str) -> None:
    before = registered()
    with pytest.raises(og.RegisterError, match=f"^Wrong: .*{message}"):
        og.register(declared(**attributes))
    assert registered() == before


def test_the_built_in_fusers_are_declared_as_they_should() -> None:
    """They are registered before anything verifies them."""
    for fuser in registered():
        verify(fuser)


def test_a_fuser_without_pattern_is_refused() -> None:
    class Without(og.Fuser):
        backend = "aten"

        def fwd(self, x: Tensor) -> Any:
            return x, ()

    with pytest.raises(og.RegisterError, match="Without: got pattern None, expected op classes"):
        og.register(Without)


@pytest.mark.parametrize("what", [3, RMSNorm, "Fuser", None])
def test_what_is_no_fuser_is_refused(what: Any) -> None:
    with pytest.raises(og.RegisterError, match="expected a Fuser or a class of one"):
        og.register(what)


class MyNorm(og.Fuser):
    backend, pattern, saves = "aten", dict(norm=RMSNorm), ("norm_rstd",)

    def fwd(self, x: Tensor, norm_weight: Tensor, norm_eps: float) -> Any:
        rstd = (x.square().mean(-1, keepdim=True) + norm_eps).rsqrt()
        return x * rstd * norm_weight, (rstd.squeeze(-1),)


@pytest.mark.parametrize("planner", ["greedy", "optimal"])
@pytest.mark.parametrize("priority, used", [(None, True), (2, True), (0.5, True), (0, False)])
def test_a_registered_fuser_goes_before_those_of_any_backend(
    planner: str, priority: float | None, used: bool
) -> None:
    if why_not := backends()["cpu"].why_not():
        pytest.skip(why_not)
    mlp = og.Sequential(RMSNorm(16), BasicLinear(16, 16), planner=planner)

    def forward() -> list[str]:
        return [step.name for step in mlp.plan().forward]

    with og.register(type("Mine", (MyNorm,), {"priority": priority})):
        assert ("Mine" in forward()) == used
        limited = og.Sequential(RMSNorm(16), backends=("cpu", "reference"), planner=planner)
        assert "Mine" not in [step.name for step in limited.plan().forward]
    assert "Mine" not in forward()
