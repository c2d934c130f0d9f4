"""States that are updated by the kernel go on as those that formulas update, whatever moves."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.guards.launching import Launch
from opsgraph.kernels.triton import delayed as kernel
from opsgraph.ops import Linear, SiLU
from opsgraph.precision import updates
from opsgraph.precision.delayed import Scaling

WIDTH = 16


def made(device: str) -> nn.Module:
    torch.manual_seed(0)
    return og.Sequential(
        Linear(WIDTH, WIDTH), SiLU(), Linear(WIDTH, WIDTH), backends=("reference",), device=device
    )


def step(module: Any, recipe: og.recipe.DelayedScaling, size: float) -> None:
    torch.manual_seed(int(size))
    x = (size * torch.randn(4, WIDTH)).to(module[0].weight.detach()).requires_grad_()
    with og.autocast(recipe=recipe):
        y = module(x)
    y.backward(torch.randn(4, WIDTH).to(y))


def states(module: nn.Module) -> list[Scaling]:
    return [child for child in module.modules() if isinstance(child, Scaling)]


def found(module: nn.Module) -> list[Tensor]:
    values = [value.cpu() for state in states(module) for value in state.buffers()]
    for state in states(module):
        state.pin()
        values.append(state.fixed.cpu())
        if state.previous is not None:
            values.append(state.previous[:2].cpu())
    return values


def _data(module: nn.Module) -> nn.Module:
    for state in states(module):
        for buffer in state.buffers():
            buffer.data = buffer.data.clone()
    return module


def _assigned(module: nn.Module) -> nn.Module:
    values = {name: value.clone() for name, value in module.state_dict().items()}
    history = "0.scaling.amax_history"
    values[history] = values[history].t().contiguous().t()
    module.load_state_dict(values, assign=True)
    return module


def _written(module: nn.Module) -> nn.Module:
    for k, state in enumerate(states(module)):
        (state.scale if k else state.scale.data).fill_(3.0)
    return module


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "nothing": lambda module: module,
    "assign": _assigned,
    "to": lambda module: module.to(torch.bfloat16),
    "data": _data,
    "written": _written,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "another layer": lambda module: module.append(copy.deepcopy(module[0])),
}


def run(recipe: og.recipe.DelayedScaling, move: Callable[[Any], Any], device: str) -> list[Tensor]:
    module = made(device)
    other = og.recipe.DelayedScaling(amax_history_len=recipe.amax_history_len + 3)
    for size in (1.0, 4.0, 2.0):
        step(module, recipe, size)
    torch.manual_seed(1)
    moved = move(module)
    for size in (3.0, 7.0):
        step(moved, recipe, size)
    between = found(moved)
    step(moved, other, 2.0)
    step(moved, recipe, 5.0)
    return between + found(moved)


def counting() -> tuple[list[Any], Callable[..., Launch]]:
    """What updates states, and a list of the launches: with what they were made, on what table."""
    launches = list[Any]()

    def counted(*arguments: Any) -> Launch:
        launch = kernel.updating(*arguments)

        def launched(table: Tensor, *tensors: Tensor) -> None:
            launches.append((*arguments, table))
            launch(table, *tensors)

        return launched

    return launches, counted


@pytest.mark.sampled(2)
@pytest.mark.parametrize("move", MOVES)
def test_the_same_bits(move: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    launches, counted = counting()
    monkeypatch.setattr(updates, "_kernel", lambda device: None)
    length = 20 + list(MOVES).index(move)
    recipe = og.recipe.DelayedScaling(amax_history_len=length)
    expected = run(recipe, MOVES[move], device)
    # Another recipe: of the same one the states of both would be updated together.
    recipe = og.recipe.DelayedScaling(amax_history_len=length, reduce_amax=False)
    monkeypatch.setattr(updates, "_kernel", lambda device: counted)
    values = run(recipe, MOVES[move], device)
    assert len(values) == len(expected)
    assert all(map(torch.equal, values, expected))
    assert launches


def test_one_launch_as_a_context_opens_and_one_as_it_ends(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launches, counted = counting()
    monkeypatch.setattr(updates, "_kernel", lambda device: counted)
    module, recipe = made(device), og.recipe.DelayedScaling(amax_history_len=40)
    step(module, recipe, 1.0)
    launches.clear()
    step(module, recipe, 2.0)
    assert [names for *_, names, _, _ in launches] == [("amax_backward",), ("amax_forward",)]
    first, second = (table for *_, table in launches)
    assert first is second  # the table, which nothing made necessary to make again


def test_graphs_take_tables_that_were_there(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And keep them. Where there is none, the formulas are captured."""
    launches, counted = counting()
    monkeypatch.setattr(updates, "_kernel", lambda device: counted)
    monkeypatch.setattr(updates, "_captured", {})
    recipe = og.recipe.DelayedScaling(amax_history_len=41)
    module, twin = made(device), made(device)
    for size in (1.0, 2.0):
        step(module, recipe, size)
    *_, table = states(module)[0]._known.values()  # of both, not of the one that was alone at first
    for capturing in (False, True):
        monkeypatch.setattr(updates, "capturing", lambda device, value=capturing: value)
        launches.clear()
        step(module, recipe, 3.0)
        assert len(launches) == 2
        assert all(used is table.addresses for *_, used in launches)
        assert list(updates._captured.values()) == [table] * capturing
    del module
    launches.clear()
    other = og.recipe.DelayedScaling(amax_history_len=42)
    for size in (1.0, 2.0):
        step(twin, other, size)
    assert not launches
    assert all(bool((state.scale != 1).all()) for state in states(twin))


def test_functions_of_the_history_stay_with_the_formulas(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(updates, "_kernel", lambda device: pytest.fail("it was called"))
    module = made(device)
    recipe = og.recipe.DelayedScaling(amax_history_len=5, amax_compute_algo=lambda h: h.amax(0))
    for size in (1.0, 2.0):
        step(module, recipe, size)
    assert all(bool((state.scale != 1).all()) for state in states(module)[:1])
