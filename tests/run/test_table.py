"""What is no longer used is freed, and a child of a fork waits for no lock of its parent."""

import gc
import linecache
import os
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

import opsgraph as og
from opsgraph.base import config
from opsgraph.features import compiled
from opsgraph.fuser import registered
from opsgraph.kernels.cpu import build
from opsgraph.op import Op, row
from opsgraph.ops import Linear, SiLU
from opsgraph.plan import result
from opsgraph.recipe import DelayedScaling, Float8CurrentScaling
from opsgraph.run.table import Plans

pytestmark = pytest.mark.usefixtures("without_cpu_backend")


def lines() -> int:
    gc.collect()
    return sum(name.startswith("<opsgraph plan") for name in linecache.cache)


def test_source_and_plans_go_with_their_modules() -> None:
    def train() -> weakref.ref[Any]:
        module = og.Sequential(Linear(4, 4), SiLU())
        module(torch.randn(2, 4)).sum().backward()
        assert lines() == before  # no text is made that nobody asks for
        (plan,) = module._stages[0].plans.values()
        function = weakref.ref(plan.functions.forward.call)
        assert lines() > before
        return function

    before = lines()
    functions = [train() for _ in range(3)]
    assert lines() == before
    assert all(function() is None for function in functions)


@pytest.mark.parametrize("planner", ["greedy", "optimal"])
@pytest.mark.parametrize("recipe", [None, Float8CurrentScaling(), DelayedScaling()])
def test_what_planning_made_waits_for_no_collector(
    planner: str, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def noted(*arguments: Any) -> Any:
        made.append(weakref.ref(space := original(*arguments)))
        return space

    made, original = list[Any](), result.Space
    monkeypatch.setattr(result, "Space", noted)
    module = og.Sequential(Linear(16, 32), SiLU(), Linear(32, 16), planner=planner)
    gc.disable()
    try:
        with og.autocast(enabled=recipe is not None, recipe=recipe):
            module(torch.randn(16, 16)).sum().backward()
        assert len(made) == 1
        assert made[0]() is None
    finally:
        gc.enable()


class Doubled(og.Fuser):
    backend, pattern = "aten", dict(act=SiLU)

    def reject(self, act: Any, x: og.Spec) -> str | None:
        return None

    def fwd(self, x: Tensor) -> Any:
        return 2 * x, ()

    def bwd(self, dy: Tensor) -> Any:
        return 2 * dy, ()


def test_a_fuser_that_was_unregistered_is_freed() -> None:
    module = og.Sequential(SiLU())

    def use() -> weakref.ref[Any]:
        class Local(Doubled):
            pass

        with og.register(Local) as handle:
            module(torch.randn(2, 4, requires_grad=True)).sum().backward()
            fuser = handle.fuser
            assert "Local" in str(module.plan(x=torch.randn(2, 4)))
        return weakref.ref(fuser)

    fusers = [use() for _ in range(3)]
    module(torch.randn(2, 4))  # takes note that they are gone
    gc.collect()
    assert all(fuser() is None for fuser in fusers)


def test_each_registration_has_a_number_of_its_own() -> None:
    fuser, numbers = Doubled(), set()
    for _ in range(3):
        with og.register(fuser):
            numbers.add(registered()[-1].serial)
    assert len(numbers) == 3


def test_plans_of_many_widths_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opsgraph.run.table.MOST", 3)
    module = og.Sequential(SiLU())
    for width in (*range(1, 9), 1, 8):
        x = torch.randn(2, width)
        torch.testing.assert_close(module(x), torch.nn.functional.silu(x))
    plans = module._stages[0].plans
    assert isinstance(plans, Plans)
    assert len(plans) == 3


def test_plans_of_compiled_graphs_are_kept_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()  # modules of other tests, which would be among those that are kept
    monkeypatch.setattr(compiled, "KEPT", 2)
    handles = []
    for width in (3, 4, 5, 6):
        module = og.Sequential(Linear(width, 2))
        module(torch.randn(2, width))
        (stage,) = module._stages
        (key,) = stage.plans
        handles.append(stage._expose(key))
    assert handles[-1] in compiled._handles
    del module, stage
    gc.collect()
    left = [handle for handle in handles if handle in compiled._handles]
    assert left == handles[2:]
    with pytest.raises(RuntimeError, match="a compiled graph was called whose module is gone"):
        compiled._plan(handles[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("lock", ["config", "build"])
def test_a_child_of_a_fork_waits_for_no_lock_of_its_parent(lock: str) -> None:
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with config.lock if lock == "config" else build._locks["norms"]:
            held.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        if lock == "config":
            og.Sequential(Linear(4, 4), SiLU())(torch.randn(2, 4))
        else:
            build._locks["norms"].acquire()
        os._exit(0)
    try:
        deadline = time.monotonic() + 10
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(child, 9)
            os.waitpid(child, 0)
        assert ended == (child, 0)
    finally:
        done.set()
        thread.join()


def test_a_refusal_is_shown_beside_a_fuser_of_the_same_name() -> None:
    class Refused(Doubled):
        def reject(self, act: Any, x: og.Spec) -> str | None:
            return "not today"

    Refused.__name__, Refused.backend = "Doubled", "reference"
    with og.register(Doubled), og.register(Refused):
        plan = og.Sequential(SiLU()).plan(training=False, x=torch.randn(2, 4))
    assert [step.name for step in plan.forward] == ["Doubled"]
    (refusal,) = [r for r in plan.rejected if r.name == "Doubled" and r.direction == "forward"]
    assert (refusal.backend, refusal.reason) == ("reference", "not today")
    assert "not today" in str(plan)


class Set(Op):
    """An op with two settings of any kind."""

    def __init__(self, first: Any, second: Any) -> None:
        super().__init__()
        self.first, self.second = first, second

    def fwd(self, x: Tensor) -> Any:
        return x * 2, ()


def test_settings_that_look_alike_one_after_the_other_are_told_apart() -> None:
    """A setting's part of a key has two items or three, by its kind."""
    pairs = [
        (1, 2), (1.0, 2), (1, 2.0), (True, 2), (int, 1), (1, int), ((1,), 2), (1, (2,)), (1, 2j),
        (1j, 2), (None, int), (row(4, torch.float32, torch.device("cpu")), 2),
    ]  # fmt: skip
    modules = [og.Sequential(Set(*pair)) for pair in pairs]
    assert len({id(module._stages[0].table) for module in modules}) == len(pairs)
    twins = [og.Sequential(Set(*pair)) for pair in pairs]
    both = zip(modules, twins, strict=True)
    assert all(one._stages[0].table is other._stages[0].table for one, other in both)
