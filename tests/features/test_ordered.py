"""A second order of a backward's products for few rows: which, when, what it saves, its bits."""

from collections.abc import Callable
from math import ceil
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from replays import assert_same_bits, leaves, replaying, step
from torch import Tensor, nn

import opsgraph as og
from benchmarks.memory import fresh_memory, tensor_peak
from opsgraph.features import alive, ordered
from opsgraph.ops import GELU, Add, BasicLinear, LayerNorm, Linear, RMSNorm, SwiGLU, Tee
from opsgraph.plan import Plan
from opsgraph.plan.lines import Line, value
from opsgraph.plan.program import Argument
from opsgraph.replay import recording
from opsgraph.replay.passes import ByRows

WIDTH, INNER = 64, 224
BACKENDS = ("aten", "reference")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that are limits are scaled to nets of tests."""
    monkeypatch.setattr(ordered, "LEAST", 1)
    monkeypatch.setattr(recording, "LARGE", 1024)


def gated(width: int = WIDTH, inner: int = INNER) -> list[nn.Module]:
    """Linear layers of which the first is twice as large as the second."""
    first, second = Linear(width, 2 * inner, bias=False), Linear(inner, width, bias=False)
    return [RMSNorm(width), first, SwiGLU(), second]


NETS: dict[str, Callable[[], list[nn.Module]]] = {
    "gated": gated,
    "two": lambda: [*gated(), *gated()],
    "residual": lambda: [Tee("r"), *gated(), Add("r")],
    "tapped": lambda: [RMSNorm(WIDTH), Linear(WIDTH, 2 * INNER), Tee(), SwiGLU(), *gated(INNER)],
    "plain": lambda: [LayerNorm(WIDTH), Linear(WIDTH, INNER), GELU(), Linear(INNER, WIDTH)],
}  # fmt: skip


def build(name: str, **options: Any) -> og.Sequential:
    """One of these nets, the same at every call."""
    torch.manual_seed(0)
    return og.Sequential(*NETS[name](), **({"backends": BACKENDS} | options))


def example(rows: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An input."""
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(3)).to(dtype)


def products(plan: Plan, few: bool = False) -> list[str]:
    """The weight gradients in the order in which a backward makes them."""
    lines = (plan.few.function if few else plan.functions.backward).lines
    return [name for line in lines if line.function.endswith("wgrad") for name in line.makes]


def test_with_fewer_rows_than_columns_the_larger_gradient_is_made_first() -> None:
    plan = build("gated").plan()
    assert products(plan) == ["dweight3", "dweight1"]
    assert products(plan, few=True) == ["dweight1", "dweight3"]
    # Of the one order `3 w + 2 f + h` is alive, of the other `2 w + 3 f + h` or `3 w + f + h`.
    assert plan.few.rows == range(1, WIDTH)
    assert f"dweight1, dweight3 where dy has 1 to {WIDTH - 1} rows" in str(plan)


def test_a_second_order_has_to_save_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, activation, row = 4 * WIDTH * INNER, 4 * INNER, 4 * WIDTH
    monkeypatch.setattr(ordered, "LEAST", 10 * activation)
    first, last = 10 * activation / (activation + row), weight / activation - 10
    assert build("gated").plan().few.rows == range(ceil(first), int(last) + 1)
    monkeypatch.setattr(ordered, "LEAST", weight)
    assert build("gated").plan().few is None


def test_where_both_gradients_are_as_large_there_is_one_order() -> None:
    assert {name for name in NETS if build(name).plan().few is None} == {"plain"}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("replays", [False, True])
@pytest.mark.parametrize("backends", [BACKENDS, ("reference",)], ids=["aten", "reference"])
@pytest.mark.parametrize("share", [1, 2, 3, 4, 6, 8])
def test_a_step_takes_less_memory_by_both_orders_than_by_one(
    monkeypatch: pytest.MonkeyPatch, share: int, backends: tuple[str, ...], replays: bool
) -> None:
    """share: eighths of as many rows as there are columns."""
    x = example(share * WIDTH // 8)

    def peak() -> int:
        with replaying(replays), fresh_memory():
            module = build("gated", backends=backends)
            for _ in range(3):
                step(module, x)
            return tensor_peak(lambda: step(module, x))

    both = peak()
    monkeypatch.setattr(ordered, "LEAST", 2**40)
    one = peak()
    assert both < one if share < 4 else both <= one
    if share == 2:
        assert both < 0.95 * one


@pytest.mark.parametrize("replays", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_bits_are_those_of_the_one_order(
    monkeypatch: pytest.MonkeyPatch, name: str, replays: bool
) -> None:
    def results() -> list[Any]:
        with replaying(replays):
            module = build(name)
            found = [step(module, example(rows)) for rows in (4, 100, 4, 40, 4, 100) * 2]
        return leaves(found)

    both = results()
    monkeypatch.setattr(ordered, "LEAST", 2**40)
    assert_same_bits(both, results())


def test_a_call_runs_the_order_for_its_rows() -> None:
    module = build("gated")
    step(module, example(4))
    run = module.plan(True, example(4)).passes.backward
    assert isinstance(run, ByRows)
    for x in (example(1), example(WIDTH - 1), example(WIDTH), example(200)):
        step(module, x)
        assert run.latest is (run.few if len(x) < WIDTH else run.many)
    step(module, example(8).view(2, 4, WIDTH))
    assert run.latest is run.few


@pytest.mark.parametrize("option", ["delay_wgrad_compute", "accumulate_into_main_grad"])
def test_gradients_that_go_elsewhere_stay_where_they_are(option: str) -> None:
    layers = gated()
    layers[3] = Linear(INNER, WIDTH, bias=False, **{option: True})
    plan = og.Sequential(*layers, backends=("reference",)).plan()
    assert plan.few is None
    layers[1] = Linear(WIDTH, 2 * INNER, bias=False, **{option: True})
    assert og.Sequential(*layers, backends=("reference",)).plan().few is None


def test_a_users_product_stays_where_it_is() -> None:
    class Own(BasicLinear):
        """Has a product of its own."""

        def wgrad(self, dy: Tensor, x: Tensor, weight_stored: Tensor) -> Tensor:
            return dy.t() @ x

    layers = gated()
    layers[3] = Own(INNER, WIDTH)
    plan = og.Sequential(*layers, backends=("reference",)).plan()
    assert products(plan) == ["dweight3", "dweight1"]
    assert plan.few is None


@pytest.mark.parametrize("overwritten", [False, True])
def test_a_product_does_not_come_behind_what_may_overwrite_its_operand(overwritten: bool) -> None:
    a, first, second, b = range(4)
    steps = [
        alive.Step(Line("make"), {}, {"a": a}, (a,), (a,)),
        alive.Step(Line("wgrad"), {"a": a}, {"u": first}, (a, first), (first,), product=True),
        alive.Step(Line("more"), {"a": a}, {"b": b}, (a, b), (b,), frozenset([a] * overwritten)),
        alive.Step(Line("wgrad"), {"b": b}, {"v": second}, (b, second), (second,), product=True),
        alive.Step(Line("return"), {"u": first, "v": second}, {}, (first, second)),
    ]
    sizes = [alive.Size(row=1), alive.Size(10), alive.Size(20), alive.Size(row=2)]
    values: Any = SimpleNamespace(steps=steps, sizes=sizes, called={}, names={})
    order = ordered.Order(values, 5)
    assert order.moved == (set() if overwritten else {first})


@pytest.mark.parametrize("taken", [None, "moved", "named"])
def test_a_product_reads_a_gradient_by_a_name_of_its_own(taken: str | None) -> None:
    """Unless it may overwrite the gradient, or something is called so."""
    dx, weight, flows, second = range(4)
    read = Argument("gradient", "dx", moved=taken == "moved")
    steps = [
        alive.Step(Line("wgrad", (read,), "u"), {"dx": dx}, {"u": weight}, (dx, weight), (weight,),
                   product=True),
        alive.Step(Line("dgrad", (read,), "dx"), {"dx": dx}, {"dx": flows}, (dx, flows), (flows,)),
        alive.Step(Line("wgrad", (value("dx"),), "v"), {"dx": flows}, {"v": second},
                   (flows, second), (second,), product=True),
        alive.Step(Line("return", (value("u"), value("v"))), {"u": weight, "v": second}, {},
                   (weight, second)),
    ]  # fmt: skip
    sizes = [alive.Size(row=1), alive.Size(10), alive.Size(row=4), alive.Size(25)]
    names = {"dx": flows, "u": weight, "v": second} | ({"d1": dx} if taken == "named" else {})
    values: Any = SimpleNamespace(
        steps=steps, sizes=sizes, names=names, given={"dx": dx}, called={dx: "d1", flows: "d0"}
    )
    order = ordered.Order(values, 2)
    lines, more = order.lines()
    texts = [*map(str, lines)]
    if taken is None:
        assert more == {"d1"}
        wanted = "d1 = dx", "dx = dgrad(d1)", "v = wgrad(dx)", "u = wgrad(d1)", "return u, v"
        assert texts == [*wanted]
    else:
        assert more == set()
        assert texts == [str(step.line) for step in steps]


def test_under_a_recipe_there_is_one_order() -> None:
    with og.autocast(recipe=og.recipe.Float8CurrentScaling()):
        assert build("gated").plan().few is None


def test_every_step_is_checked_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPSGRAPH_CHECK", "1")
    assert build("gated").plan().few is None
