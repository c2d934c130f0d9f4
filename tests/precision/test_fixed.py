"""Reads of delayed scales: without a copy where that is right, and with one elsewhere."""

import copy

import pytest
import torch
from torch import Tensor

import opsgraph as og
from opsgraph.guards.torch_private import PassThrough
from opsgraph.kernels.reference.quantize import new_scales
from opsgraph.ops import Linear
from opsgraph.precision import fixed, reading
from opsgraph.precision.delayed import Scaling
from opsgraph.recipe import DelayedScaling

WIDTH = 32


def trained(recipe: DelayedScaling, device: str = "cpu") -> Linear:
    torch.manual_seed(0)
    layer = Linear(WIDTH, WIDTH, device=device)
    for _ in range(2):
        step(layer, recipe)
    return layer


def step(layer: Linear, recipe: DelayedScaling, size: float = 1.0) -> None:
    x = (size * torch.randn(16, WIDTH, device=layer.weight.device)).requires_grad_()
    with og.autocast(recipe=recipe):
        y = layer(x)
    y.backward(torch.ones_like(y))


def scaling(layer: Linear) -> Scaling:
    state = layer.get_submodule("scaling")
    assert isinstance(state, Scaling)
    return state


def scales(state: Scaling) -> list[Tensor]:
    return [state.activation, state.weight, state.gradient]


def test_reads_hand_out_what_no_update_writes_to(device: str) -> None:
    recipe = DelayedScaling(amax_history_len=71)
    layer = trained(recipe, device)
    state = scaling(layer)
    first, values = scales(state), state.scale.tolist()
    assert all(one is other for one, other in zip(first, scales(state), strict=True))
    assert [scale.tolist() for scale in first] == values
    assert all(scale.dim() == 0 and scale.data_ptr() % 16 == 0 for scale in first)
    step(layer, recipe, 9.0)
    assert [scale.tolist() for scale in first] == values
    assert [scale.tolist() for scale in scales(state)] == state.scale.tolist() != values


def test_writes_of_others_are_read_at_once() -> None:
    recipe = DelayedScaling(amax_history_len=72)
    state = scaling(trained(recipe))
    with og.autocast(recipe=recipe):
        state.scale.fill_(5.0)
        assert [scale.tolist() for scale in scales(state)] == [5.0] * 3
        state.scale = torch.full((3,), 6.0)
        assert [scale.tolist() for scale in scales(state)] == [6.0] * 3
    state.scale.data.fill_(7.0)  # of which no version tells
    with og.autocast(recipe=recipe):
        assert [scale.tolist() for scale in scales(state)] == [7.0] * 3


def test_modes_see_that_scales_are_read() -> None:
    state = scaling(trained(DelayedScaling(amax_history_len=73)))
    first = scales(state)
    with PassThrough():
        again = scales(state)
    assert all(map(torch.equal, first, again))
    assert not any(one is other for one, other in zip(first, again, strict=True))


def test_copies_of_a_module_have_scales_of_their_own() -> None:
    recipe = DelayedScaling(amax_history_len=74)
    layer = trained(recipe)
    twin = copy.deepcopy(layer)
    before = [scale.tolist() for scale in scales(scaling(twin))]
    assert before == scaling(layer).scale.tolist()
    scaling(layer).scale.fill_(3.0)
    assert [scale.tolist() for scale in scales(scaling(twin))] == before


def spaced(states: int) -> fixed.Fixed:
    values = new_scales(states, torch.device("cpu"))
    return fixed.Fixed(values.copy_(torch.arange(3.0 * states).view(states, 3)))


@pytest.mark.parametrize("mode", [False, True])
@pytest.mark.parametrize("places", [(0, 1, 2), (0,), (1, 2), (2, 1), (1, 1)])
def test_scales_of_some_states(places: tuple[int, ...], mode: bool) -> None:
    held = spaced(3)
    with torch.inference_mode(mode):
        found = held.part(places)
    assert found.tolist() == held.values[list(places)].tolist()
    assert found.stride() == held.values.stride(), "columns are operands: 16 bytes apart"
    assert not found.is_inference(), "training may save them"
    assert held.part(places) is found
    first = held.values[places[0]].data_ptr()
    assert (found.data_ptr() == first) is (places not in ((2, 1), (1, 1))), "others are copies"


def test_scales_of_states_that_were_not_updated_together() -> None:
    states = [Scaling(5) for _ in range(3)]
    for k, state in enumerate(states):
        state.scale.fill_(float(k + 1))
        state.fix()
    (found,) = reading.fixed_of(states) or ()
    assert found.tolist() == [[1.0] * 3, [2.0] * 3, [3.0] * 3]
    assert found.stride() == (12, 4)
    assert reading.fixed_of([]) == ()


def test_training_may_save_what_inference_mode_has_read() -> None:
    recipe = DelayedScaling(amax_history_len=77)
    layer = trained(recipe)
    x = torch.randn(16, WIDTH, requires_grad=True)
    with og.autocast(recipe=recipe):
        with torch.inference_mode():
            first = reading.fixed_of([scaling(layer)])
        again = reading.fixed_of([scaling(layer)])
        assert first is not None
        assert again is not None
        assert again[0] is first[0]
        y = layer(x)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("stream", "asked"), [(0, 0), (7, 1)])
def test_whether_the_default_stream_is_captured_is_not_asked(
    monkeypatch: pytest.MonkeyPatch, stream: int, asked: int
) -> None:
    found: list[bool] = []
    monkeypatch.setattr(fixed, "stream_of", lambda number: stream)
    monkeypatch.setattr(fixed, "capturing_here", lambda: found.append(True))
    held = fixed.Fixed(torch.zeros(1, 3))
    held.number, held.stream = 0, stream
    assert held.is_for_now()
    assert len(found) == asked
    held.stream = 8
    assert not held.is_for_now()


@pytest.mark.gpu
def test_another_stream_gets_copies() -> None:
    recipe = DelayedScaling(amax_history_len=75)
    state = scaling(trained(recipe, "cuda"))
    first = scales(state)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        again = scales(state)
    torch.cuda.synchronize()
    assert all(map(torch.equal, first, again))
    assert not any(one is other for one, other in zip(first, again, strict=True))


@pytest.mark.gpu
def test_a_graph_reads_what_the_scales_are_when_it_runs() -> None:
    """Captured inside a context that opened before: updates in between are none of the graph's."""
    recipe = DelayedScaling(amax_history_len=76)
    layer = trained(recipe, "cuda")
    x = torch.randn(16, WIDTH, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), og.autocast(recipe=recipe):
        layer(x)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            y = layer(x)
    for size in (9.0, 99.0):
        step(layer, recipe, size)
        graph.replay()
        with torch.no_grad(), og.autocast(recipe=recipe):
            assert torch.equal(y, layer(x))
