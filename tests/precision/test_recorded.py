"""Amaxes are noted in one op, with the values that one op for each would have."""

import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from recipe_cases import HIDDEN, example, mlp
from torch.utils._python_dispatch import TorchDispatchMode

import opsgraph as og
from opsgraph.guards.watching import watching
from opsgraph.ops import Linear
from opsgraph.precision.delayed import BACKWARD, FORWARD, Scaling
from opsgraph.precision.recorded import raise_to, record
from opsgraph.recipe import DelayedScaling

VIEWS = "aten.select.int", "aten.detach.default"
VALUES = [-1.0, 0.0, 2.5, math.inf, math.nan]


class Ops(TorchDispatchMode):
    """Counts ops, and is taken for a recorder of replays, which changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __enter__(self) -> Any:
        watching.modes += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        watching.modes -= 1
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[str(func)] += 1
        return func(*args, **(kwargs or {}))


def test_the_larger_one_or_a_nan(device: str) -> None:
    pairs = list(itertools.product(VALUES, VALUES))
    held, new = (torch.tensor(values, device=device) for values in zip(*pairs, strict=True))
    expected = torch.maximum(held, new)
    raise_to(held.unbind(), new.unbind())
    torch.testing.assert_close(held, expected, rtol=0, atol=0, equal_nan=True)


def test_one_op_for_all_states_of_a_kind() -> None:
    states = [Scaling(2) for _ in range(3)]
    amaxes = [torch.tensor(float(k)) for k in range(3)]
    for _ in range(2):
        with Ops() as ops:
            record(states, "activation", amaxes, True)
    assert sum(n for name, n in ops.count.items() if name not in VIEWS) <= 1
    record(states, "weight", [None, *amaxes[1:]], True)
    assert [state.amax_forward.tolist() for state in states] == [[0, -1], [1, 1], [2, 2]]
    record(states, "weight", [torch.tensor(7.0)] * 3, False)
    assert states[0].amax_forward.tolist() == [0, -1]


def test_buffers_that_came_later_are_written_to() -> None:
    state, amax = Scaling(2), torch.tensor(3.0)
    record([state], "activation", [amax], True)
    state.amax_forward.data = torch.full((2,), -1.0)
    record([state], "weight", [amax], True)
    assert state.amax_forward.tolist() == [-1.0, 3.0]
    state.amax_forward = torch.full((2,), -1.0)
    record([state], "activation", [amax], True)
    assert state.amax_forward.tolist() == [3.0, -1.0]


def test_a_state_that_saw_two() -> None:
    for name, first, second in itertools.product((FORWARD, BACKWARD), VALUES, VALUES):
        state = Scaling(2)
        amaxes = torch.tensor([first, second])
        seen = state.get_buffer(name)[0]
        raise_to([seen] * 2, amaxes.unbind())
        torch.testing.assert_close(seen, amaxes.amax().clamp_min(-1.0), equal_nan=True)


def test_a_layer_that_stands_twice_in_a_module() -> None:
    recipe, layer = DelayedScaling(amax_history_len=2), Linear(HIDDEN, HIDDEN)
    module = og.Sequential(layer, layer)
    with og.autocast(recipe=recipe):
        y = module(example(dtype=torch.float32).requires_grad_())
        state = layer.get_submodule("scaling")
        assert (state.get_buffer(FORWARD) > 0).all()
    y.backward(torch.randn_like(y))
    assert (state.get_buffer(BACKWARD) > 0).all()


@pytest.mark.parametrize("states", [1, 5])
def test_ops_of_a_step_do_not_grow_with_the_states(states: int) -> None:
    """But for those that are beyond PyTorch's dispatch: each state's Python remains."""
    recipe = DelayedScaling(amax_history_len=60 + states)
    modules = [mlp(torch.float32) for _ in range(states)]
    for module in modules:
        recipe.prepare(module)
    for _ in range(3):
        with Ops() as ops, og.autocast(recipe=recipe):
            pass
    assert sum(ops.count.values()) < 60
