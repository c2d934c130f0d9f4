"""The usual update of delayed scales is that of before; what changed in between is looked at."""

import gc
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import opsgraph as og
from opsgraph.guards.torch_private import PassThrough
from opsgraph.kernels.cpu import build as library
from opsgraph.precision import autocast, updates
from opsgraph.precision.changes import ready
from opsgraph.precision.delayed import Scaling

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")

WIDTH = 32


@pytest.fixture(autouse=True, scope="module")
def no_garbage_of_others() -> Iterator[None]:
    """Collect what other tests have left before these, and nothing while they run.

    A state of theirs that goes has updates let go of all that they keep, of any recipe.
    """
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def made() -> og.Sequential:
    torch.manual_seed(0)
    return og.Sequential(*[og.ops.Linear(WIDTH, WIDTH) for _ in range(2)])


class Life:
    """A module's steps under a recipe of its own, and what becomes of its scales."""

    def __init__(self, margin: int) -> None:
        self.recipe = og.recipe.DelayedScaling(amax_history_len=5, margin=margin)
        self.module: Any = made()
        self.seen: list[Tensor] = []
        self.steps = 0

    @property
    def states(self) -> list[Scaling]:
        return [m for m in self.module.modules() if isinstance(m, Scaling)]

    def step(self, run: Callable[..., Any] | None = None) -> None:
        self.steps += 1
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(self.steps)) * self.steps
        x.requires_grad_()
        with og.autocast(recipe=self.recipe):
            y = (run or self.module)(x)
        y.backward(torch.ones_like(y) / self.steps)
        buffers = [buffer for state in self.states for buffer in state.buffers()]
        self.seen += [each.detach().clone() for each in (y, x.grad, *buffers) if each is not None]


def replaced(life: Life) -> None:
    life.states[0].scale = life.states[0].scale * 0.5


def a_history_that_was_moved(life: Life) -> None:
    life.states[1].amax_history.data = life.states[1].amax_history.clone()


def histories_cut_in_place(life: Life) -> None:
    for state in life.states:
        state.amax_history.resize_(3, 3)


def amaxes_that_were_moved(life: Life) -> None:
    life.states[1].amax_forward.data = life.states[1].amax_forward.clone()


def written(life: Life) -> None:
    life.states[0].scale.mul_(0.5)


def loaded(life: Life) -> None:
    life.module.load_state_dict({k: v * 2 for k, v in life.module.state_dict().items()})


def converted(life: Life) -> None:
    life.module.double().float()


def a_longer_history(life: Life) -> None:
    life.recipe = og.recipe.DelayedScaling(amax_history_len=9)


def another_margin_for_a_step(life: Life) -> None:
    own, life.recipe = life.recipe, og.recipe.DelayedScaling(amax_history_len=5, margin=3)
    life.step()
    life.recipe = own


def late(life: Life) -> None:
    def inside(x: Tensor) -> Any:
        with og.autocast(recipe=life.recipe):
            return life.module(x)

    life.step(lambda x: checkpoint(inside, x, use_reentrant=True))


def one_more_layer(life: Life) -> None:
    life.module.append(og.ops.Linear(WIDTH, WIDTH, bias=False))
    with torch.no_grad():
        life.module[-1].weight.copy_(torch.eye(WIDTH))


def a_layer_of_another_recipe(life: Life) -> None:
    """Of one with the same terms, so that its scales are not converted."""
    other = Life(margin=life.recipe.margin)
    other.recipe = replace(life.recipe, amax_compute_algo="most_recent")
    other.step()
    life.module.append(other.module[0])


def one_layer_less(life: Life) -> None:
    del life.module[1]
    gc.collect()


def a_copy(life: Life) -> None:
    life.module = deepcopy(life.module)
    gc.collect()


EVENTS = (
    replaced, a_history_that_was_moved, histories_cut_in_place, amaxes_that_were_moved, written,
    loaded, converted, a_longer_history, another_margin_for_a_step, late, one_more_layer,
    a_layer_of_another_recipe, one_layer_less, a_copy,
)  # fmt: skip


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each update was that of before."""
    found: list[bool] = []

    def as_before(*given: Any) -> bool:
        found.append(updates.as_before(*given))
        return found[-1]

    monkeypatch.setattr(autocast, "as_before", as_before)
    return found


def lived(event: Callable[[Life], None], margin: int) -> list[Tensor]:
    life = Life(margin)
    for _ in range(8):
        life.step()
    event(life)
    for _ in range(4):
        life.step()
    return life.seen


@pytest.mark.parametrize("event", EVENTS)
def test_what_changed_is_looked_at(
    event: Callable[[Life], None], counted: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = lived(event, margin=1)
    assert counted.count(True) > 4
    monkeypatch.setattr(autocast, "as_before", lambda *given: False)
    for each, other in zip(found, lived(event, margin=1), strict=True):
        assert torch.equal(each, other)


def test_in_inference_mode_and_under_modes_nothing_is_as_before(counted: list[bool]) -> None:
    life = Life(margin=2)
    for _ in range(8):
        life.step()
    counted.clear()
    with torch.inference_mode(), og.autocast(recipe=life.recipe):
        pass
    with PassThrough(), og.autocast(recipe=life.recipe):
        pass
    assert not any(counted)
    life.step()
    assert all(counted[-2:])


def test_nothing_is_kept_of_states_that_are_gone() -> None:
    life = Life(margin=4)
    for _ in range(8):
        life.step()
    key = life.recipe.key
    assert any(number == key for number, _ in ready)
    life.module = None
    gc.collect()
    assert not any(number == key for number, _ in ready)


def test_what_is_kept_has_room_for_its_own_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between an update and its keeping another thread's may give the states fewer scales."""
    life, update = Life(margin=13), updates._update_on

    def then_another(device: Any, states: Any, recipe: Any, names: Any, amaxes: Any) -> Any:
        done = update(device, states, recipe, names, amaxes)
        few = updates.Fixed(done[2][: len(states)].clone())
        for k, state in enumerate(states):
            state.__dict__["_fixed"] = few, k, *state.__dict__["_fixed"][2:]
        return done

    monkeypatch.setattr(updates, "_update_on", then_another)
    for _ in range(4):
        life.step()
    count = len(life.states)
    for name, rows in ((updates.FORWARD, 2 * count), (updates.BACKWARD, count)):
        assert ready[life.recipe.key, name].new().size(0) == rows


def test_nothing_is_kept_of_memory_that_was_left_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another thread may set `.data` of a buffer after an update has read where it is."""
    life, update = Life(margin=13), updates._update_on
    old: list[tuple[Tensor, Tensor]] = []

    def then_moved(*given: Any) -> Any:
        done = update(*given)
        scale = life.states[0].scale
        if len(old) < 2:
            old.append((scale.data, scale.data.clone()))
            scale.data = scale.data.clone()
        return done

    life.step()
    ready.clear()
    monkeypatch.setattr(updates, "_update_on", then_moved)
    for _ in range(4):
        life.step()
    assert len(old) == 2
    for memory, before in old:
        assert torch.equal(memory, before), "it was written to"


@pytest.mark.parametrize("copied", [False, True])
def test_a_layer_that_comes_to_an_open_context_catches_up_with_what_it_has_seen(
    copied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new one has seen nothing, and no update is made for it."""
    first, caught = Life(margin=0), list[Scaling]()

    def caught_up(state: Scaling, recipe: Any) -> None:
        caught.append(state)
        updates.catch_up(state, recipe)

    first.step()
    module = deepcopy(first.module) if copied else made()
    monkeypatch.setattr(autocast, "catch_up", caught_up)
    x = torch.randn(4, WIDTH)
    with og.autocast(recipe=first.recipe):
        y = module(x)
    states = [m for m in module.modules() if isinstance(m, Scaling)]
    assert {*caught} == ({*states} if copied else set())
    assert not any(state.fresh for state in states)
    with og.autocast(recipe=first.recipe):
        first.module(x)
        module(x)
    amaxes = [state.amax_backward for state in states]
    assert all((amax == -1).all() for amax in amaxes), "nothing is left to be taken up"
    assert y.isfinite().all()
