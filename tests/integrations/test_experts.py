"""`patch` on mixtures whose experts' weights are stacked, as transformers 5 has them."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from opsgraph.integrations.transformers import Report, experts, patch, unpatch
from opsgraph.ops import SwiGLU

COUNT, WIDTH, INNER = 5, 24, 40
X = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))


class Stacked(nn.Module):
    """MixtralExperts' formula, one expert after another."""

    transposed = False

    def __init__(self, columns: int = 2 * INNER, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(COUNT, columns, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(COUNT, WIDTH, INNER) / INNER**0.5)
        if bias:
            self.up_bias = nn.Parameter(torch.randn(COUNT, columns))
            self.down_bias = nn.Parameter(torch.randn(COUNT, WIDTH))
        self.limit = 7.0

    def act(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return functional.silu(gate) * up

    def product(self, name: str, x: Tensor, number: int) -> Tensor:
        y = functional.linear(x, getattr(self, name)[number])
        bias = getattr(self, f"{name}_bias", None)
        return y if bias is None else y + bias[number]

    def forward(self, hidden_states: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for number in range(COUNT):
            rows, place = torch.where(index == number)
            y = self.product(
                "down", self.act(self.product("up", hidden_states[rows], number)), number
            )
            total.index_add_(0, rows, (y * weights[rows, place, None]).to(total.dtype))
        return total


class Turned(Stacked):
    """GPT-OSS': weights `[E, in, out]`, gate and value in turns, clamped."""

    def __init__(self) -> None:
        super().__init__(bias=True)
        self.up = nn.Parameter(self.up.detach().mT.contiguous())
        self.down = nn.Parameter(self.down.detach().mT.contiguous())

    def act(self, x: Tensor) -> Tensor:
        gate, up = x[..., ::2].clamp(max=self.limit), x[..., 1::2].clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)

    def product(self, name: str, x: Tensor, number: int) -> Tensor:
        return x @ getattr(self, name)[number] + getattr(self, f"{name}_bias")[number]


class Ungated(Stacked):
    """Nemotron-H's."""

    def __init__(self) -> None:
        super().__init__(INNER)

    def act(self, x: Tensor) -> Tensor:
        return functional.relu(x).square()


class Softer(Stacked):
    """What no op computes."""

    def act(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return functional.softsign(gate) * up


class Mixture(nn.Module):
    def __init__(self, make: Callable[[], nn.Module] = Stacked) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.router = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, COUNT)
        self.experts = make()

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).view(-1, WIDTH)
        weights, index = self.router(rows).softmax(-1, dtype=torch.float).topk(2, -1)
        return x + self.experts(rows, index, weights.to(x.dtype)).view(x.shape)


def _patched(model: nn.Module) -> Report:
    return patch(model, {"x": X.to(next(model.parameters()).dtype)})


def _results(model: nn.Module, x: Tensor = X) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = model(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])]


def _same(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        size = float(wanted.abs().max())
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5 * size)


def _found(report: Report) -> list[str]:
    return [row.found for row in report.rows if row.found.startswith("experts")]


FOUND = {
    Stacked: "experts(GroupedLinear, SwiGLU, GroupedLinear)",
    Turned: "experts(TransposedGroupedLinear, ClampedSwiGLU, TransposedGroupedLinear)",
    Ungated: "experts(GroupedLinear, SReLU, GroupedLinear)",
}


@pytest.mark.parametrize("make", FOUND)
def test_experts_are_a_plan_with_the_same_results(
    make: type[Stacked], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Mixture(make)
    expected, keys = _results(model), list(model.state_dict())
    report = _patched(model)
    assert _found(report) == [FOUND[make]]
    row = next(row for row in report.rows if row.found == FOUND[make])
    assert row.saved < row.saved_before
    assert row.fp32 <= 1e-5
    monkeypatch.setattr(make, "act", lambda *_: 1 / 0)  # the plan runs, and the module does not
    for _ in range(3):
        _same(_results(model), expected)
    monkeypatch.undo()
    assert list(model.state_dict()) == keys
    unpatch(model)
    assert "forward" not in model.experts.__dict__
    assert all(map(torch.equal, _results(model), expected))


def test_arguments_by_name_in_another_order_are_told_apart() -> None:
    model = Mixture()
    rows, index = X.view(-1, WIDTH), torch.arange(28).view(14, 2) % COUNT
    weights = torch.rand(14, 2)
    expected = model.experts(rows, index, weights)
    _patched(model)
    for given in ({"index": index, "weights": weights}, {"weights": weights, "index": index}):
        torch.testing.assert_close(model.experts(rows, **given), expected)
    torch.testing.assert_close(
        model.experts(weights=weights, index=index, hidden_states=rows), expected
    )


def test_in_bf16_the_error_is_not_larger_than_the_models() -> None:
    model = Mixture()
    exact = copy.deepcopy(model).double()
    model.bfloat16()
    plain = copy.deepcopy(model)
    report = _patched(model)
    assert _found(report)
    x, index = X.view(-1, WIDTH), torch.arange(28).view(14, 2) % COUNT
    weights = torch.rand(14, 2, generator=torch.Generator().manual_seed(2))
    mine, own = (m.experts(x.bfloat16(), index, weights.bfloat16()) for m in (model, plain))
    given = x.bfloat16().double(), index, weights.bfloat16().double()
    right = exact.bfloat16().double().experts(*given)
    errors = [float((y.double() - right).abs().mean().detach()) for y in (mine, own)]
    assert errors[0] <= 1.1 * errors[1]


def test_other_calls_are_the_modules_own() -> None:
    model = Mixture()
    _patched(model)
    plain = copy.deepcopy(model)
    unpatch(plain)
    x, index = X.view(-1, WIDTH), torch.arange(14).view(14, 1) % COUNT
    ones = torch.ones(14, 1)
    calls: list[tuple[Any, ...]] = [(x.double(), index, ones), (x, index.T, ones)]
    for given in calls:
        with pytest.raises((RuntimeError, IndexError)):
            model.experts(*given)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(X), plain(X))
    compiled: Any = torch.compile(model.experts, backend="eager")
    torch.testing.assert_close(compiled(x, index, ones), plain.experts(x, index, weights=ones))
    seen: list[int] = []
    model.experts.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model.experts(x, index, weights=ones), plain.experts(x, index, ones))
    assert seen == [1]
    model.experts.up = nn.Parameter(plain.experts.up.detach() * 2)
    plain.experts.up = model.experts.up
    torch.testing.assert_close(model(X), plain(X))
    _same(_results(copy.deepcopy(model)), _results(plain))
    _same(_results(pickle.loads(pickle.dumps(copy.deepcopy(plain)))), _results(plain))


class Dropped(Stacked):
    """With attributes, a module and dropout that its formula reads."""

    def __init__(self, drop: float = 0.0, approximate: str = "none") -> None:
        super().__init__()
        self.scale, self.function, self.gate = 1.0, functional.dropout, nn.GELU(approximate)
        self.drop = nn.Dropout(drop)

    def act(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return self.function(self.drop(self.gate(gate) * up), 0.0) * self.scale


class Doubled(Dropped):
    def act(self, x: Tensor) -> Tensor:
        return 2 * super().act(x)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "number": lambda m: setattr(m, "scale", 3.0),
    "function": lambda m: setattr(m, "function", lambda x, p: x.cos()),
    "module": lambda m: setattr(m, "gate", nn.ReLU()),
    "attribute of a module": lambda m: setattr(m.gate, "approximate", "tanh"),
    "class": lambda m: setattr(m, "__class__", Doubled),
    "bias": lambda m: setattr(m, "down_bias", nn.Parameter(torch.ones(COUNT, WIDTH))),
    "dropout": lambda m: m.drop.train() and setattr(m.drop, "p", 1.0),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_is_set_after_patching_counts_in_copies_too(what: str) -> None:
    model = Mixture(Dropped)
    plain = copy.deepcopy(model)
    assert _found(_patched(model))
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        _same(_results(each), _results(copy.deepcopy(plain)))
        changed = copy.deepcopy(plain)
        for one in (each, changed):
            CHANGES[what](one.experts)
        y, expected = each(X), changed(X)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, plain(X), rtol=1e-4, atol=1e-4)


def test_copies_run_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixture()
    _patched(model)
    expected, copies = _results(model), [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    monkeypatch.setattr(Stacked, "act", lambda *_: 1 / 0)
    for each in copies:
        _same(_results(each), expected)


def test_dropout_inside_is_drawn_while_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Mixture(lambda: Dropped(1.0)).eval()
    plain = copy.deepcopy(model)
    state = torch.get_rng_state()
    assert _found(_patched(model))
    assert torch.equal(torch.get_rng_state(), state)
    _same(_results(model), _results(plain))
    torch.testing.assert_close(model.train()(X), plain.train()(X))
    model.eval()
    monkeypatch.setattr(Dropped, "act", lambda *_: 1 / 0)
    model(X)  # by the plan


def test_experts_with_other_modules_inside_are_other_experts() -> None:
    model = nn.Sequential(Mixture(Dropped), Mixture(lambda: Dropped(approximate="tanh")))
    report = patch(model, {"input": X})
    assert _found(report) == ["experts(GroupedLinear, GEGLU, GroupedLinear)"] * 2
    kinds = [m.experts.__dict__["forward"].__self__.run[1].approximate for m in model]  # type: ignore[union-attr]
    assert kinds == ["none", "tanh"]


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_rows_and_numbers_of_no_expert(tokens: int) -> None:
    """A number that is none of an expert's stands for rows that others have, or for padding."""
    model = Mixture()
    plain = copy.deepcopy(model)
    _patched(model)
    x, weights = X.view(-1, WIDTH)[:tokens], torch.ones(tokens, 2)
    for number in (0, COUNT, COUNT + 3, -1):
        index = torch.full((tokens, 2), number)
        y, expected = (m.experts(x, index, weights) for m in (model, plain))
        assert y.shape == expected.shape
        torch.testing.assert_close(y, expected)


def test_what_stays_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def reason(model: nn.Module) -> str:
        report = _patched(model)
        assert not _found(report)
        return next(row.reason for row in report.left if row.module == "experts")

    assert reason(Mixture(Softer)) == "it computes what no candidate does, on probe values"
    hooked = Mixture()
    hooked.experts.register_forward_hook(lambda *_: None)
    assert reason(hooked) == "it has hooks or a forward of its own"
    adapted = Mixture()
    adapted.experts.adapter = nn.Linear(2, 2)
    assert reason(adapted) == "an expert has modules with parameters inside"
    monkeypatch.setattr(experts, "WORSE", 0.5)
    assert "of the module's error" in reason(Mixture())


def test_a_wrong_gradient_fails_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(SwiGLU):
        def bwd(self, dy: Tensor, x: Tensor, kernel: str) -> Any:
            dx, rest = super().bwd(dy, x, kernel)
            return 1.001 * dx, rest

    monkeypatch.setattr(experts, "SwiGLU", Wrong)
    report = _patched(Mixture())
    assert not _found(report)
    reasons = [row.reason for row in report.left]
    assert any("float32: a difference of" in reason for reason in reasons), reasons
