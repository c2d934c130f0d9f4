"""Delayed scaling: its state, beside a simulation in plain Python and NumPy-like steps."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from recipe_cases import HIDDEN, example, mlp, results
from recipe_cases import RECIPES as CASES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import opsgraph as og
from opsgraph.ops import Linear
from opsgraph.recipe import DelayedScaling, Format

E4M3_MAX, E5M2_MAX = 448.0, 57344.0


class Tracked:
    """One tensor's delayed scaling, step by step as the recipe's definition says."""

    def __init__(self, limit: float, recipe: DelayedScaling) -> None:
        self.limit, self.recipe = limit, recipe
        self.scale = torch.tensor(1.0)
        self.history = [0.0] * recipe.amax_history_len

    def see(self, value: Tensor) -> None:
        self.history[0] = max(self.history[0], float(value.abs().max()))

    def update(self) -> None:
        latest = self.recipe.amax_compute_algo == "most_recent"
        amax = self.history[0] if latest else max(self.history)
        self.history = [0.0, *self.history[2:], self.history[0]][: len(self.history)]
        if 0 < amax < float("inf"):
            self.scale = (torch.tensor(self.limit) / amax) / 2**self.recipe.margin

    def rounded(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        data = (value * self.scale).clamp(-self.limit, self.limit).to(dtype)
        return data.double() / self.scale.double()


RECIPES = [
    DelayedScaling(amax_history_len=3),
    DelayedScaling(amax_history_len=4, margin=1, amax_compute_algo="most_recent"),
    DelayedScaling(amax_history_len=1),
    DelayedScaling(amax_history_len=3, fp8_format=Format.E4M3),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=range(len(RECIPES)))
@pytest.mark.parametrize("microbatches", [1, 2])
def test_scales_follow_the_definition(recipe: DelayedScaling, microbatches: int) -> None:
    torch.manual_seed(0)
    layer = Linear(HIDDEN, 32, bias=False)
    gradient = recipe.fp8_format.of("gradient")
    x_state, w_state = Tracked(E4M3_MAX, recipe), Tracked(E4M3_MAX, recipe)
    dy_state = Tracked(torch.finfo(gradient).max, recipe)
    close: dict[str, Any] = dict(rtol=1e-4, atol=1e-4)
    for step in range(6):
        layer.zero_grad()
        expected_dw = torch.zeros(32, HIDDEN, dtype=torch.float64)
        for k in range(microbatches):
            if step + k:
                dy_state.update()
            x = torch.randn(20, HIDDEN) * (1 + (7 * step + k) % 5)
            dy = torch.randn(20, 32) * 0.1 * (1 + step)
            x.requires_grad_()
            with og.autocast(recipe=recipe):
                y = layer(x)
            weight = layer.weight.detach()
            qx = x_state.rounded(x.detach(), torch.float8_e4m3fn)
            qw = w_state.rounded(weight, torch.float8_e4m3fn)
            for state, value in ((x_state, x.detach()), (w_state, weight)):
                state.see(value)
                state.update()
            y.backward(dy)
            qdy = dy_state.rounded(dy, gradient)
            dy_state.see(dy)
            expected_dw += qdy.t() @ qx
            torch.testing.assert_close(y.double(), qx @ qw.t(), **close)
            torch.testing.assert_close(x.grad.double(), qdy @ qw, **close)
        torch.testing.assert_close(layer.weight.grad.double(), expected_dw, **close)
        scaling = layer.get_submodule("scaling")
        assert scaling.scale.tolist() == [float(s.scale) for s in (x_state, w_state, dy_state)]
        for column, state in enumerate((x_state, w_state)):
            assert scaling.amax_history[:, column].tolist() == pytest.approx(state.history)
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight))


def test_nothing_seen_changes_nothing() -> None:
    recipe = DelayedScaling(amax_history_len=2, margin=2)
    used, idle = mlp(), mlp()
    for module in (used, idle):
        results(module, recipe, example())
    with og.autocast(recipe=recipe):  # takes up what the backwards saw
        pass
    before = [b.clone() for b in idle.buffers()]
    for _ in range(3):
        results(used, recipe, 3 * example())
    assert all(map(torch.equal, before, idle.buffers()))


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan")])
def test_an_amax_that_is_no_number_keeps_the_scale(value: float) -> None:
    recipe = DelayedScaling(amax_history_len=1, amax_compute_algo="most_recent")
    layer = Linear(HIDDEN, 32)
    with og.autocast(recipe=recipe):
        layer(torch.full((4, HIDDEN), 2.0))
    state = layer.get_submodule("scaling")
    before = state.scale.clone()
    assert before[0] == E4M3_MAX / 2
    with og.autocast(recipe=recipe):
        layer(torch.full((4, HIDDEN), value))
    assert torch.equal(state.scale, before)


def test_no_update_without_grad() -> None:
    recipe = DelayedScaling(amax_history_len=2)
    layer = Linear(HIDDEN, 32)
    with torch.no_grad(), og.autocast(recipe=recipe):
        layer(example(dtype=torch.float32))
    assert layer.get_submodule("scaling").scale.tolist() == [1.0, 1.0, 1.0]


def test_only_the_outermost_context_updates() -> None:
    recipe, layer, x = DelayedScaling(amax_history_len=2), Linear(HIDDEN, 32), torch.ones(4, HIDDEN)
    with og.autocast(recipe=recipe):
        with og.autocast(recipe=recipe):
            layer(x)
        state = layer.get_submodule("scaling")
        assert state.scale.tolist() == [1.0, 1.0, 1.0]
    assert state.scale[0] == E4M3_MAX


def test_a_function_of_the_history() -> None:
    def mean(history: Tensor) -> Tensor:
        return history.mean(0)

    layer, x = Linear(HIDDEN, 32), torch.ones(4, HIDDEN)
    with og.autocast(recipe=DelayedScaling(amax_history_len=4, amax_compute_algo=mean)):
        layer(x)
    assert layer.get_submodule("scaling").scale[0] == E4M3_MAX / 0.25
    wrong = DelayedScaling(amax_history_len=4, amax_compute_algo=lambda history: history)
    raises = pytest.raises(og.OpsgraphError, match=r"returned \(4, 2\), expected a tensor \(2,\)")
    with raises, og.autocast(recipe=wrong):
        layer(x)


def test_the_state_is_in_the_state_dict() -> None:
    recipe, module = DelayedScaling(amax_history_len=3), mlp()
    assert not [key for key in module.state_dict() if "scaling" in key]
    for step in range(3):
        results(module, recipe, example() * (step + 1))
    saved = copy.deepcopy(module.state_dict())
    assert saved["1.scaling.amax_history"].shape == (3, 3)
    assert not any(isinstance(value, bytes) for value in saved.values())
    other = mlp()
    other.load_state_dict(saved)
    for _ in range(2):
        with og.autocast(recipe=recipe):  # both update their gradients' scales when this opens
            found, expected = (results(m, recipe, 2 * example()) for m in (other, module))
        assert all(map(torch.equal, found, expected))


def test_layernorm_mlp_keeps_its_state_beside_its_weights() -> None:
    recipe = DelayedScaling(amax_history_len=2)
    module = og.LayerNormMLP(HIDDEN, 128, device="cpu")
    results(module, recipe, example(dtype=torch.float32))
    keys = [key for key in module.state_dict() if "scaling" in key]
    assert keys[0] == "fc1_scaling.scale"
    assert len(keys) == 8
    other = og.LayerNormMLP(HIDDEN, 128, device="cpu")
    other.load_state_dict(module.state_dict())
    x = example(dtype=torch.float32)
    with og.autocast(recipe=recipe):
        assert torch.equal(module(x), other(x))


def test_the_state_stays_fp32_and_moves() -> None:
    recipe, module = DelayedScaling(amax_history_len=2), mlp(torch.float32)
    results(module, recipe, example(dtype=torch.float32))
    kept = [b.clone() for b in module.buffers()]
    module.to(torch.bfloat16)
    assert all(map(torch.equal, kept, module.buffers()))
    assert {b.dtype for b in module.buffers()} == {torch.float32}


def test_another_history_length_keeps_the_latest_amaxes() -> None:
    layer = Linear(HIDDEN, 32)
    for step in range(4):
        with og.autocast(recipe=DelayedScaling(amax_history_len=4)):
            layer(torch.full((2, HIDDEN), 1.0 + step))
    state = layer.get_submodule("scaling")
    assert state.amax_history[:, 0].tolist() == [0, 2, 3, 4]
    # The last is the recipe's own: the state may be there when it is used next.
    for length, expected in ((2, [0, 4]), (5, [0, 0, 0, 0, 4]), (4, [0, 0, 0, 4])):
        state.resize(length)
        assert state.amax_history[:, 0].tolist() == expected


def test_two_forwards_before_two_backwards() -> None:
    """Each backward has the scales of its own forward, though the buffers changed in between."""
    recipe, module = DelayedScaling(amax_history_len=2, margin=3), mlp()
    first, second = (example().requires_grad_() for _ in range(2))
    with og.autocast(recipe=recipe):
        one = module(first)
    with og.autocast(recipe=recipe):
        two = module(second)
    dy = torch.randn_like(one)
    two.backward(dy)
    one.backward(dy)
    alone = mlp()
    third = example().requires_grad_()
    with og.autocast(recipe=recipe):
        alone(third).backward(dy)
    assert torch.equal(first.grad, third.grad)
    assert not torch.equal(first.grad, second.grad)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_and_eager_agree_for_some_steps(backend: str) -> None:
    torch.compiler.reset()
    eager, compiled = mlp(), mlp()
    run = torch.compile(compiled, fullgraph=True, backend=backend)
    # Of one recipe, the two would update each other's gradients.
    ours = DelayedScaling(amax_history_len=3)
    theirs = replace(ours, reduce_amax=False)
    modules: list[tuple[nn.Module, Any, DelayedScaling]]
    modules = [(eager, eager, ours), (compiled, run, theirs)]
    for step in range(3):
        found = []
        for module, call, recipe in modules:
            torch.manual_seed(step)
            x, z = ((step + k) * example() for k in (1, 3))
            z.requires_grad_()
            with og.autocast(recipe=recipe):
                first, second = call(x), call(z)
            dy = torch.randn_like(first)
            leaves = [z, *module.parameters()]
            grads = torch.autograd.grad([second, first], leaves, [dy, 2 * dy])
            found.append([first, second, *grads, *(b.clone() for b in module.buffers())])
        assert all(map(torch.equal, *found))
    torch.compiler.reset()


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["delayed", "mx", "nvfp4"])
def test_activation_checkpointing(name: str, inside: bool) -> None:
    """torch.utils.checkpoint: the same gradients, and the same state, as without."""
    checkpointed, plain = mlp(), mlp()
    ours = replace(CASES[name])
    delayed = isinstance(ours, DelayedScaling)
    theirs = replace(ours, reduce_amax=False) if delayed else ours

    def run(module: nn.Module, recipe: Any, through: Any) -> list[Tensor]:
        def body(x: Tensor) -> Tensor:
            with og.autocast(recipe=recipe) if inside else nullcontext():
                return module(x)

        x = example().requires_grad_()
        with nullcontext() if inside else og.autocast(recipe=recipe):
            y = through(body, x)
        torch.manual_seed(2)
        gradients = torch.autograd.grad(y, [x, *module.parameters()], torch.randn_like(y))
        return [y, *gradients, *(b.clone() for b in module.buffers())]

    def again(body: Any, x: Tensor) -> Tensor:
        contexts = og.checkpoint_contexts
        return checkpoint(body, x, use_reentrant=False, context_fn=contexts)

    for _ in range(3):
        found = run(checkpointed, ours, again)
        assert all(map(torch.equal, found, run(plain, theirs, lambda body, x: body(x))))


def test_a_recomputation_without_contexts_leaves_the_state_alone() -> None:
    recipe, module = DelayedScaling(amax_history_len=3), mlp()

    def body(x: Tensor) -> Tensor:
        with og.autocast(recipe=recipe):
            return module(x)

    y = checkpoint(body, example().requires_grad_(), use_reentrant=False)
    state = module.get_submodule("1.scaling")
    before = state.amax_history.clone(), state.amax_forward.clone()
    y.sum().backward()
    assert torch.equal(state.amax_history[:, :2], before[0][:, :2])
    assert torch.equal(state.amax_forward, before[1])
