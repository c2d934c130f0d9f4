"""Plans by measured times: what can be measured, and that `optimal` takes what was."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import opsgraph as og
from opsgraph.features import measured
from opsgraph.kernels.choices import Choice, Choices
from opsgraph.ops import GELU, Linear, MakeExtraOutput, RMSNorm

CPU = torch.device("cpu")


def mlp(**options) -> og.Sequential:
    torch.manual_seed(0)
    act = GELU(approximate="none")
    return og.Sequential(RMSNorm(16), Linear(16, 24), act, Linear(24, 16), **options)


def look(module: og.Sequential, x: torch.Tensor) -> tuple[str, list[str]]:
    """The key of a call's plan, and the plans that can be measured."""
    (stage,) = module._stages
    found = []

    def planner(space):
        found.append((measured.key(space), measured.candidates(space)))
        return measured.greedy(space)

    stage.make(stage.key(x, [], stage.weights()), planner)
    return found[0]


def steps(plan) -> list[tuple[str, str]]:
    return [(step.name, step.where) for step in (*plan.forward, *plan.backward)]


@pytest.fixture
def x(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    monkeypatch.setenv("OPSGRAPH_BACKENDS", "aten,reference")
    return torch.randn(4, 16, requires_grad=True)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Choices]:
    """Choices between plans that lie in a temporary directory; the last candidate wins."""

    def last(candidates):
        return Choice([*candidates][-1], next(iter(candidates)), 0.5)

    made = Choices("plan", lambda: ("here",), last, lambda: [tmp_path / "plans.json"])
    monkeypatch.setattr(measured, "plans", lambda device: made)
    return made


def test_candidates_differ_and_the_usual_one_is_first(x, kept: Choices) -> None:
    key, names = look(mlp(), x)
    assert key.startswith("RMSNorm, BasicLinear, Bias, GELU, BasicLinear, Bias training f32[*,16]")
    assert names[0] == "optimal"
    assert len(names) == len(set(names)) > 1
    assert all(name.partition(" without ")[0] in measured.PLANNERS for name in names)


def test_the_key_tells_apart_what_plans_are_made_from(x, kept: Choices) -> None:
    def named(module: og.Sequential, x: torch.Tensor) -> str:
        return look(module, x)[0]

    usual = named(mlp(), x)
    assert named(mlp(), torch.randn(9, 16, requires_grad=True)) == usual, "rows do not matter"
    assert named(mlp(planner="optimal"), x) == usual
    others = [
        named(mlp(), x.detach()),
        named(mlp(recompute=False), x),
        named(mlp(fusers=("LinearBias",)), x),
        named(mlp(dtype=torch.bfloat16), x.detach().bfloat16().requires_grad_()),
        named(og.Sequential(RMSNorm(16, eps=1e-3), *list(mlp())[1:]), x),
        named(og.Sequential(*mlp(), MakeExtraOutput()), x),
    ]
    assert len({usual, *others}) == 7


def test_optimal_takes_what_was_measured_and_says_so(x, kept: Choices) -> None:
    usual = mlp(planner="optimal").plan(x=x)
    key, names = look(mlp(), x)
    assert kept.choose(key, lambda: dict.fromkeys(names, list)) == names[-1]
    module = mlp(planner="optimal")
    (stage,) = module._stages
    stage.plans.clear()
    made = module.plan(x=x)
    assert steps(made) != steps(usual)
    assert "measured" in made.costs
    assert "measured to be the fastest" in str(made)
    fuser = names[-1].partition(" without ")[2]
    assert fuser in [step.name for step in (*usual.forward, *usual.backward)]
    assert any(
        r.name == fuser and r.reason == "plans without it were measured to be faster"
        for r in made.rejected
    )
    greedy = stage.make(stage.key(x, [], stage.weights()), "greedy")
    assert "measured" not in greedy.costs
    torch.testing.assert_close(module(x), mlp()(x))


@pytest.mark.parametrize("name", ["", "fastest", "optimal without Gone", "greedy without RMSNorm"])
def test_a_name_that_makes_no_plan_here_is_as_none(x, kept: Choices, name: str) -> None:
    key, _ = look(mlp(), x)
    usual = mlp(planner="optimal").plan(x=x)
    kept.choose(key, lambda: {name: list})
    (stage,) = mlp()._stages
    made = stage.make(stage.key(x, [], stage.weights()), "optimal")
    assert steps(made) == steps(usual)
    assert "measured" not in made.costs


def test_without_a_device_to_measure_on_nothing_is_looked_up() -> None:
    assert measured.plans(torch.device("meta")) is None
    assert measured.plans(CPU) is measured.plans(CPU)
