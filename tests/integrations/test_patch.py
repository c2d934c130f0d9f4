"""`patch` on small models written here, each with one way of wiring norms, MLPs and residuals."""

import copy
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

import opsgraph as og
from opsgraph.integrations.transformers import Report, build, deferred, patch, states, unpatch

H, F = 16, 24


class RoundingNorm(nn.Module):
    """Llama's: rounds to x's dtype before the weight."""

    def __init__(self, width: int = H) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(x.dtype)


class Weightless(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).type_as(x)


class Sized(nn.Module):
    """OLMo's: no parameters, and rows of one size alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.normalized_shape = (width,)

    def forward(self, x: Tensor) -> Tensor:
        return functional.layer_norm(x.float(), self.normalized_shape, eps=1e-5).to(x.dtype)


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(H, F, bias=False)
        self.up_proj = nn.Linear(H, F, bias=False)
        self.down_proj = nn.Linear(F, H, bias=False)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Merged(nn.Module):
    def __init__(self, swapped: bool = False) -> None:
        super().__init__()
        self.gate_up = nn.Linear(H, 2 * F)
        self.down = nn.Linear(F, H)
        self.swapped = swapped

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        if self.swapped:
            gate, up = up, gate
        return self.down(up * functional.gelu(gate, approximate="tanh"))


class Transposed(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out) * 0.3)
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Plain(nn.Module):
    def __init__(self, act: nn.Module | None = None, layer: Any = nn.Linear) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = layer(H, F), act or nn.GELU(), layer(F, H)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.act(self.fc1(x))))


class Before(nn.Module):
    """A layer with its norm first; `attention` is a linear layer here."""

    def __init__(self, mlp: nn.Module | None = None, norm: Any = RoundingNorm) -> None:
        super().__init__()
        self.norm1, self.attention = norm(H), nn.Linear(H, H)
        self.norm2, self.mlp = norm(H), mlp or Gated()

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.sin(self.attention(self.norm1(x)))
        return x + self.mlp(self.norm2(x))


class After(Before):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + torch.sin(self.attention(x)))
        return self.norm2(x + self.mlp(x))


class Sandwich(Before):
    def __init__(self) -> None:
        super().__init__()
        self.norm3 = RoundingNorm()

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.norm3(self.mlp(self.norm2(x)))
        return residual + x


class Shared(Before):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        return self.mlp(h) + torch.sin(self.attention(h)) + x


class Scaled(Before):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.mlp(self.norm2(x))


class BothScaled(Before):
    def forward(self, x: Tensor) -> Tensor:
        return 0.75 * x + 0.5 * self.mlp(self.norm2(x))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.ones(H))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.lambda1


class LayerScaled(Before):
    def __init__(self) -> None:
        super().__init__()
        self.scale = Scale()

    def forward(self, x: Tensor) -> Tensor:
        return self.scale(self.mlp(self.norm2(x))) + x


class OwnScale(Before):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(H))

    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * self.mlp(self.norm2(x)) + x


class WeightedResidual(OwnScale):
    def forward(self, x: Tensor) -> Tensor:
        return self.gamma * x + self.mlp(self.norm2(x))


class InPlace(Before):
    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm2(x))
        y += torch.sin(self.attention(x))
        return y + x


class Model(nn.Module):
    def __init__(self, make: Callable[[], nn.Module] = Before, count: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(make() for _ in range(count))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


X = torch.randn(2, 5, H, generator=torch.Generator().manual_seed(3))


def _patched(model: nn.Module) -> Report:
    return patch(model, {"x": X.to(next(model.parameters()).dtype)})


def _results(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = model(x)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    return [y.detach(), *torch.autograd.grad(y, [x, *model.parameters()], dy, allow_unused=True)]


def _same(found: list[Any], expected: list[Any], tolerance: float = 1e-5) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert (got is None) == (wanted is None)
        if wanted is not None:
            size = float(wanted.abs().max())
            torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * max(size, 1e-3))


def _found(report: Report) -> set[str]:
    return {row.found for row in report.rows}


_GATED = "RMSNorm, Linear(gate, up), SwiGLU, Linear"
_WIRINGS = {
    "gated": (Before, f"residual({_GATED})"),
    "merged": (lambda: Before(Merged()), "residual(RMSNorm, Linear, GEGLU, Linear)"),
    "swapped": (
        lambda: Before(Merged(swapped=True)), "residual(RMSNorm, Linear, GEGLU, Linear)"
    ),
    "plain": (
        lambda: Before(Plain(), nn.LayerNorm), "residual(LayerNorm, Linear, GELU, Linear)"
    ),
    "quick": (
        lambda: Before(Plain(nn.ReLU()), nn.LayerNorm), "residual(LayerNorm, Linear, ReLU, Linear)"
    ),
    "transposed": (
        lambda: Before(Plain(layer=Transposed)),
        "residual(RMSNorm, TransposedLinear, GELU, TransposedLinear)",
    ),
    "after": (
        lambda: After(Plain(), nn.LayerNorm), "residual(Linear, GELU, Linear), LayerNorm"
    ),
    "sandwich": (Sandwich, f"residual({_GATED}, RMSNorm)"),
    "shared": (Shared, "Linear(gate, up), SwiGLU, Linear, add, add"),
    "scaled": (Scaled, f"residual({_GATED}, ConstantScale)"),
    "both scaled": (BothScaled, f"{_GATED}, ConstantScale, add"),
    "weighted": (WeightedResidual, f"{_GATED}, add"),
    "without weight": (
        lambda: Before(Plain(), Weightless), "residual(RMSNorm, Linear, GELU, Linear)"
    ),
    "vector": (LayerScaled, f"residual({_GATED}, LayerScale)"),
    "own vector": (OwnScale, f"residual({_GATED}, LayerScale)"),
    "in place": (InPlace, f"residual({_GATED}, add)"),
}  # fmt: skip


@pytest.mark.sampled(5)
@pytest.mark.parametrize("wiring", _WIRINGS)
def test_each_wiring_is_one_plan_with_the_same_results(wiring: str) -> None:
    make, found = _WIRINGS[wiring]
    model = Model(make).eval()
    expected, keys = _results(model), list(model.state_dict())
    report = _patched(model)
    assert found in _found(report), str(report)
    row = next(row for row in report.rows if row.found == found)
    assert (row.module.removesuffix(".mlp"), row.count) == ("layers.*", 2)
    assert row.saved < row.saved_before
    assert max(row.fp32 / 1e-5, row.half / 1.1) <= 1
    for _ in range(3):  # the third is replayed
        _same(_results(model), expected)
    assert list(model.state_dict()) == keys
    unpatch(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    for got, wanted in zip(_results(model), expected, strict=True):
        assert got is wanted is None or torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("norm", "found"),
    [
        (Sized, "LayerNorm"),
        (partial(nn.LayerNorm, elementwise_affine=False), "LayerNorm"),
        (partial(nn.RMSNorm, eps=1e-6, elementwise_affine=False), "RMSNorm"),
    ],
)
def test_a_norm_without_parameters_that_takes_rows_of_one_size(norm: Any, found: str) -> None:
    model = Model(lambda: Before(Plain(), norm)).eval()
    expected = _results(model)
    assert f"residual({found}, Linear, GELU, Linear)" in _found(_patched(model))
    _same(_results(model), expected)


def test_a_scaled_branch_has_the_steps_of_a_residual_with_that_scale() -> None:
    model = Model(lambda: Scaled(Plain(), nn.LayerNorm), count=1)
    _patched(model)
    unit = model.layers[0].norm2.forward.__self__
    reached = [state for state in states.all_states([unit]) if state.step.kind == "residual"]
    (patched,) = (state.plan for state in reached)
    ops = og.ops
    layers = ops.LayerNorm(H), ops.Linear(H, F), ops.GELU("none"), ops.Linear(F, H)
    module = og.Sequential(ops.Residual(*layers, scale=0.5))
    plans = [each.plan(x=X) for each in (patched, module)]
    steps = [[s.name for s in (*plan.forward, *plan.backward)] for plan in plans]
    assert steps[0] == steps[1]


def test_a_plan_runs_and_the_modules_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model()
    _patched(model)

    def fail(*_: Any) -> None:
        raise AssertionError("a module ran")

    monkeypatch.setattr(RoundingNorm, "forward", fail)
    monkeypatch.setattr(nn.SiLU, "forward", fail)
    model(X)
    with pytest.raises(AssertionError, match="a module ran"):
        model(X.double())


def test_in_bf16_the_error_is_not_larger_than_the_models() -> None:
    model = Model(count=1)
    x = torch.randn(400, H, generator=torch.Generator().manual_seed(5))
    exact = _results(copy.deepcopy(model).double(), x.double())
    model.bfloat16()
    own = _results(model, x.bfloat16())
    report = _patched(model)
    assert f"residual({_GATED})" in _found(report)
    ratios = []
    for ours, theirs, right in zip(_results(model, x.bfloat16()), own, exact, strict=True):
        error, before = (float((each - right).abs().mean()) for each in (ours, theirs))
        ratios.append(error / before)
    assert sum(ratios) / len(ratios) <= 1.1


def test_a_cast_after_patching_runs_plans_or_the_modules() -> None:
    model = Model()
    expected = [r.bfloat16() for r in _results(copy.deepcopy(model))]
    _patched(model)
    _same(_results(model.bfloat16(), X.bfloat16()), expected, 0.05)
    half = Model().half()  # fp16 was not proven
    own = _results(half, X.half())
    for got, wanted in zip(_results(model.half().float().half(), X.half()), own, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0.1, atol=0.1)


def test_memory_is_given_back() -> None:
    model = Model(count=1)
    gate = model.layers[0].mlp.gate_proj.weight
    _patched(model)
    assert model.layers[0].mlp.gate_proj.weight is gate
    assert gate.untyped_storage().nbytes() > gate.nbytes
    unpatch(model)
    assert gate.untyped_storage().nbytes() == gate.nbytes


def test_what_is_patched_twice_or_not_at_all_raises() -> None:
    model = Model(count=1)
    with pytest.raises(og.OpsgraphError, match="not patched"):
        unpatch(model)
    _patched(model)
    with pytest.raises(og.OpsgraphError, match="patched already"):
        _patched(model)
    with pytest.raises(og.OpsgraphError, match="meta device"):
        _patched(Model(count=1).to("meta"))


def test_a_model_without_an_example_is_left_as_it_was() -> None:
    class Two(Model):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(left + right)

    model = Two(count=1).train()
    with pytest.raises(og.OpsgraphError, match="give one"):
        patch(model)
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(module.training for module in model.modules())
    assert patch(model, {"left": X, "right": X}).rows


class Clamped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x).clamp(max=12.0)


class Wrapper(nn.Module):
    """An adapter, which answers `weight` with that of its base."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Quantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(F, H, dtype=torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight.to(x.dtype))


def test_what_only_looks_like_an_activation_or_a_layer_stays() -> None:
    model = Model(lambda: Before(Plain(Clamped()))).eval()
    model.layers[1].mlp.act = nn.SiLU()
    wrapped = Wrapper(model.layers[1].mlp.fc2)
    model.layers[1].mlp.fc2 = wrapped
    expected = _results(model)
    report = _patched(model)
    assert not any("SiLU, Linear" in row.found for row in report.rows)
    assert any("adapters" in row.reason and row.module.endswith("fc2") for row in report.left)
    _same(_results(model), expected)


def test_quantized_weights_and_hooks_are_refused_with_the_reason() -> None:
    model = Model()
    model.layers[0].mlp.up_proj = Quantized()
    model.layers[1].norm2.register_forward_hook(lambda module, args, y: y * 2)
    expected = model(X)
    report = _patched(model)
    reasons = {row.module: row.reason for row in report.left}
    assert "quantized" in reasons["layers.0.mlp.up_proj"]
    assert "hooks" in reasons["layers.1.norm2"]
    torch.testing.assert_close(model(X), expected)


def test_what_changes_after_patching_counts() -> None:
    model = Model()
    plain = copy.deepcopy(model)
    _patched(model)
    seen: list[Any] = []
    for each in (model, plain):
        each.layers[0].mlp.gate_proj.register_forward_hook(
            lambda module, args, y: seen.append(type(y)) or y * 2
        )
        torch.manual_seed(1)
        each.layers[1].mlp.up_proj = Wrapper(each.layers[1].mlp.up_proj)
        each.layers[1].mlp.down_proj.weight = nn.Parameter(torch.randn(H, F))
    _same(_results(model), _results(plain))
    assert seen == [Tensor] * 2


class Louder(RoundingNorm):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "epsilon": lambda layer: setattr(layer.norm2, "variance_epsilon", 1.0),
    "class": lambda layer: setattr(layer.norm2, "__class__", Louder),
    "bias": lambda layer: setattr(layer.mlp.up_proj, "bias", nn.Parameter(torch.ones(F))),
    "forward": lambda layer: setattr(layer.mlp, "forward", torch.sin),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_set_after_patching_counts_in_copies_too(what: str) -> None:
    model = Model()
    plain = copy.deepcopy(model)
    _patched(model)
    for each in (copy.deepcopy(model), model):
        _same(_results(each), _results(plain))
        changed = copy.deepcopy(plain)
        for one in (each, changed):
            CHANGES[what](one.layers[1])
        _same(_results(each), _results(changed))
        assert not torch.allclose(changed(X), plain(X), rtol=1e-3)


def test_code_that_uses_values_in_another_way_gets_them() -> None:
    class Switched(Before):
        more = False

        def forward(self, x: Tensor) -> Tensor:
            h = self.norm2(x)
            y = self.mlp(h)
            if not self.more:
                return x + y
            assert h.shape == x.shape
            assert y.dtype == x.dtype
            assert isinstance(y, Tensor)
            return torch.cat([x, y, h], 1)[:, 5:] * h.mean() + (y - 2 * x).repeat(1, 2, 1)

    model = Model(Switched, 1)
    plain = copy.deepcopy(model)
    _patched(model)
    for each in (model, plain):
        each.layers[0].more = True
    _same(_results(model), _results(plain))


class Changing(nn.Module):
    """Writes over values that it has made others of, in one of several ways; at first in none."""

    way = ""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(H, eps=1e-6)
        self.mlp = Gated()

    def forward(self, x: Tensor) -> Tensor:
        h, mlp, what, _, how = self.norm(x), self.mlp, *self.way.partition(" ")

        def change(name: str, value: Tensor) -> Tensor:
            if name != what:
                return value
            if how == "sum":
                value += x.repeat(1, 2)[:, : value.shape[1]]
                return value
            return value.mul_(3.0)

        gate = mlp.gate_proj(h)
        h = change("norm", h)
        active = functional.silu(gate)
        gate, up = change("gate", gate), mlp.up_proj(h)
        up = change("up", up)
        if what == "gate":
            return active * up + gate
        y = mlp.down_proj(active * up)
        h = change("input", h)
        return h + y if self.way else x + y


@pytest.mark.sampled(4)
@pytest.mark.parametrize("how", ["sum", "product"])
@pytest.mark.parametrize("what", ["norm", "gate", "up", "input"])
def test_values_written_over_after_others_were_made_of_them(what: str, how: str) -> None:
    model = Changing()
    plain = copy.deepcopy(model)
    x = torch.randn(4, H)
    patch(model, {"x": x})
    model.way = plain.way = f"{what} {how}"
    for grad in (torch.enable_grad, torch.inference_mode):
        with grad():
            torch.testing.assert_close(model(x) + 0, plain(x))


def test_arguments_that_are_not_followed_are_pytorchs() -> None:
    class Named(Changing):
        def forward(self, x: Tensor) -> Tensor:
            h = self.norm(x)
            gate, value = self.mlp.gate_proj(h).split(split_size=F // 2, dim=-1)
            return torch.cat([torch.mul(functional.silu(gate), value, out=None), h], 1)

    model = Named()
    plain = copy.deepcopy(model)
    x = torch.randn(4, H)
    patch(model, {"x": x})
    torch.testing.assert_close(model(x), plain(x))


def test_late_values_of_changed_tensors_raise() -> None:
    class Switched(Before):
        more = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.mlp(self.norm2(x))
            if self.more:
                x.add_(1.0)
            return y + x

    model = Model(Switched, 1)
    _patched(model)
    model.layers[0].more = True
    with pytest.raises(RuntimeError, match="changed in place"), torch.no_grad():
        model(X.clone())

    class Quiet(Before):
        more = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.mlp(self.norm2(x))
            if self.more:
                with torch.no_grad():
                    x = x * y.mean()
            return y + x

    model = Model(Quiet, 1)
    _patched(model)
    model.layers[0].more = True
    with pytest.raises(RuntimeError, match="no gradients are recorded"):
        model(X)


class Between(Before):
    """Calls back between the modules of a chain."""

    def then(self) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(x)
        gate, up = self.mlp.gate_proj(h), self.mlp.up_proj(h)
        self.then()
        return x + self.mlp.down_proj(self.mlp.act_fn(gate) * up)


def _write(module: Any) -> None:
    with torch.no_grad():
        module.weight.mul_(2.0)


def _replace(module: Any) -> None:
    module.weight = nn.Parameter(module.weight.detach() * 2)


@pytest.mark.parametrize("change", [_write, _replace])
def test_parameters_that_change_inside_a_chain(change: Callable[[Any], None]) -> None:
    model = Model(Between, 1)
    plain = copy.deepcopy(model)
    _patched(model)
    for name in ("norm2", "mlp.up_proj"):  # read before
        model.layers[0].then = lambda name=name: change(model.layers[0].get_submodule(name))
        with pytest.raises(RuntimeError, match="or replaced"):
            model(X)
        change(plain.layers[0].get_submodule(name))
    for each in (model, plain):  # read later
        each.layers[0].then = lambda each=each: change(each.layers[0].mlp.down_proj)
    torch.testing.assert_close(model(X), plain(X))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", ["norm2", "mlp", "mlp.up_proj", "mlp.down_proj"])
def test_a_part_cast_after_patching_has_the_modules_run(name: str) -> None:
    model = Model(count=1)
    plain = copy.deepcopy(model)
    _patched(model)
    for each in (model, plain):
        each.layers[0].get_submodule(name).bfloat16()

    def outcome(each: nn.Module) -> Any:
        try:
            return each(X)
        except RuntimeError as error:
            return str(error)

    found, expected = outcome(model), outcome(plain)
    if isinstance(expected, str):
        assert found == expected
    else:
        torch.testing.assert_close(found, expected)


def test_what_is_in_place_or_without_gradients_while_learning_stays() -> None:
    class Odd(Before):
        def forward(self, x: Tensor) -> Tensor:
            h = x.detach() * 1.0
            y = self.mlp(self.norm2(h))
            h.add_(1.0)
            return y + h + x

    model = Model(Odd, 1)
    expected = _results(model)
    report = _patched(model)
    assert not any("RMSNorm" in found for found in _found(report))
    assert any("in place" in row.reason for row in report.left)
    _same(_results(model), expected)


def test_dropout_in_training_draws_what_it_drew() -> None:
    model = Model(lambda: Before(Plain(), nn.LayerNorm)).train()

    def run() -> list[Tensor]:
        torch.manual_seed(7)
        return _results(model)

    expected = run()
    report = _patched(model)
    assert "LayerNorm, Linear, GELU, Linear" in _found(report)
    assert all(module.training for module in model.modules())
    _same(run(), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_layers(reentrant: bool) -> None:
    class Checkpointed(Model):
        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = checkpoint(layer, x, use_reentrant=reentrant) if self.training else layer(x)
            return x

    model = Checkpointed().train()

    def run() -> list[Tensor]:
        model.zero_grad()
        model(X.clone().requires_grad_()).sum().backward()
        return [p.grad for p in model.parameters()]

    expected = run()
    _patched(model)
    _same(run(), expected)


def test_copies_and_pickles_are_patched_and_their_own() -> None:
    model = Model()
    _patched(model)
    expected = _results(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    loaded = torch.load(io.BytesIO(stored.getvalue()), weights_only=False)
    for other in (copy.deepcopy(model), loaded):
        _same(_results(other), expected)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.mul_(1.5)
        changed = Model()
        changed.load_state_dict(other.state_dict())
        _same(_results(other), _results(changed))
        unpatch(other)
        _same(_results(other), _results(changed))
    _same(_results(model), expected)


def test_autocast_and_inference_mode() -> None:
    model = Model()
    plain = copy.deepcopy(model)
    _patched(model)
    x = torch.randn(200, H, generator=torch.Generator().manual_seed(9))
    exact = copy.deepcopy(plain).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        ours, own = model(x), plain(x)
    assert ours.dtype == own.dtype
    assert not torch.equal(ours, own)  # a plan's bits are its own
    assert float((ours - exact).abs().mean()) <= 1.1 * float((own - exact).abs().mean())
    with torch.inference_mode():
        torch.testing.assert_close(model(X), plain(X))


def test_torch_compile_takes_the_models_own_code() -> None:
    model = Model(count=1)
    expected = _results(model)
    _patched(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    _same(_results(compiled), expected)


def test_a_wrong_op_fails_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {**build._GATED, og.ops.SiLU: og.ops.ReGLU}
    monkeypatch.setattr(build, "_GATED", wrong)
    model = Model(count=1)
    expected = _results(model)
    report = _patched(model)
    assert any("float32" in row.reason for row in report.left)
    assert not any("GLU" in found for found in _found(report))
    _same(_results(model), expected)


def test_a_value_past_pytorchs_api_is_refused() -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            return dy * 2

    class Switched(Before):
        more = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.mlp(self.norm2(x))
            return x + (Doubled.apply(y) if self.more else y)

    model = Model(Switched, 1)
    _patched(model)
    model.layers[0].more = True
    with pytest.raises(RuntimeError, match="no gradients are recorded"):
        model(X)
    assert deferred.Deferred is not Tensor


def test_the_table_names_modules_plans_and_bytes() -> None:
    shown = str(_patched(Model()))
    for part in ("layers.*", f"residual({_GATED})", "steps", "differ by"):
        assert part in shown


def test_a_hook_on_a_whole_mlp_and_a_parametrization_count() -> None:
    model = Model()
    plain = copy.deepcopy(model)
    _patched(model)
    for each in (model, plain):
        each.layers[0].mlp.register_forward_hook(lambda module, args, y: (y + 1).detach() + y)
        down = each.layers[1].mlp.down_proj
        parametrize.register_parametrization(down, "weight", nn.Tanh())
    _same(_results(model), _results(plain))


SHARED = nn.GELU()


def test_a_module_of_all_models_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn.modules.activation, "shared", SHARED, raising=False)
    for _ in range(2):
        report = _patched(Model(lambda: Before(Plain(SHARED))))
        assert "residual(RMSNorm, Linear, GELU, Linear)" in _found(report)
        assert "forward" not in SHARED.__dict__


def test_a_model_that_draws_random_numbers_is_compared_with_the_same() -> None:
    class Noisy(Model):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x + torch.rand_like(x))

    model = Noisy()
    state = torch.get_rng_state()
    assert _patched(model).difference < 1e-5
    assert torch.equal(torch.get_rng_state(), state)


def test_each_step_counts_once_however_many_paths_lead_to_it() -> None:
    top = states.State(states.Step("scale", 2.0), (None,))
    for _ in range(60):  # 2 ** 60 paths
        branch = states.State(states.Step("function", "relu"), (top,))
        top = states.State(states.Step("residual"), (branch, top))
    order = top.before()
    assert len(order) == len(set(order)) == 121
    assert all(order.index(s) < order.index(i) for s in order for i in s.inputs if i)
    x = torch.full((2, H), 2.0**-70)
    torch.testing.assert_close(top.run(x, [], deferred.original)[top], x * 2.0**61)
