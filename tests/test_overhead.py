"""`benchmarks/overhead.py` and what it is made of, on the CPU and with short runs."""

import contextlib
import gc
import json
import os
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from benchmarks import calls, first_call, overhead, overhead_device, peers, tables
from benchmarks.calls import INFERENCE, TRAINING, Clock, Sample
from benchmarks.peers import Block, Candidate, Peer
from benchmarks.timing import spread, take_turns
from opsgraph.base import config

SMALL = Block(4, 8, 12, torch.float32, torch.device("cpu"))
COLUMNS = {
    "nn.Sequential": Candidate(peers.eager),
    "opsgraph (Python)": Candidate(peers.ours, replay=False),
    "opsgraph": Candidate(peers.ours),
}


def test_what_a_caller_has_frozen_stays_frozen() -> None:
    for freeze in (gc.freeze, gc.unfreeze):
        freeze()
        frozen = gc.get_freeze_count()
        take_turns({"a": int}, 1)
        assert (gc.get_freeze_count() > frozen // 2) is (freeze is gc.freeze)
    gc.freeze()


def test_samples_take_turns_and_each_is_first_in_turn() -> None:
    seen = ""

    def sampler(name: str) -> int:
        nonlocal seen
        seen += name
        return len(seen)

    found = take_turns({name: partial(sampler, name) for name in "abc"}, 3)
    assert [seen[k] for k in (0, 3, 6)] == ["a", "b", "c"]
    assert all(sorted(seen[k : k + 3]) == ["a", "b", "c"] for k in (0, 3, 6))
    assert found == {name: [k + 1 for k, each in enumerate(seen) if each == name] for name in "abc"}


def test_no_sample_always_follows_the_same_other() -> None:
    seen: list[str] = []
    take_turns({name: partial(seen.append, name) for name in "abcd"}, 8)
    followed = set(pairwise(seen))
    assert len(followed) > 8


@pytest.mark.parametrize("planner", ["greedy", "optimal"])
def test_planning_is_measured_afresh(planner: str) -> None:
    make = overhead.plan_afresh(overhead.mlp(planner))
    first, second = make(), make()
    assert first is not second
    assert first.forward_source == second.forward_source


def test_first_calls_are_those_of_modules_that_are_new_and_are_replayed() -> None:
    made, epoch = first_call.ours, config.epoch
    modules: list[Any] = []

    def kept(*arguments: Any, **options: Any) -> Peer:
        peer = made(*arguments, **options)
        modules.append((peer.module, os.environ[peers.REPLAY]))
        return peer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(first_call, "ours", kept)
        found = first_call.measured(SMALL, 3)
    assert config.epoch == epoch
    assert [on for _, on in modules] == ["0", "1", *["1", "1"] * 3]
    plans = [module.plan(True, torch.zeros(4, 8)) for module, _ in modules]
    assert len({id(plan) for plan in plans}) == len({plan.labels for plan in plans}) == 5
    assert all(one is other for one, other in zip(plans[2::2], plans[3::2], strict=True))
    assert len({plan.forward_source for plan in plans}) == 1  # and so no kernel is another
    assert ["OPSGRAPH_REPLAY=0" in str(plan) for plan in plans] == [True, *[False] * 7]
    assert all("native call" in str(plan) for plan in plans[1:])
    seconds = found["seconds"]
    assert seconds["planning"]["median"] > 0
    told = first_call.table([found])
    assert f"{seconds['together']['median'] * 1e3:.2f}" in told
    assert f"{seconds['again']['median'] * 1e3:.2f}" in told
    assert f"{seconds['text']['median'] * 1e3:.2f}" in told
    slow = found | {"seconds": {"together": {"median": 1.0}}, "recipe": "delayed"}
    fast = found | {"seconds": {"together": {"median": 1e-3}}}
    assert first_call.misses([slow, fast]) == ["first calls DelayedScaling"]


def test_first_calls_have_a_command_line(tmp_path: Path) -> None:
    out, threads = tmp_path / "found.json", torch.get_num_threads()
    try:
        assert first_call.main(["--recipes", "none", "--repeats", "1", "--out", str(out)]) == 0
    finally:
        torch.set_num_threads(threads)
    (found,) = json.loads(out.read_text())["first_calls"]
    names = {"planning", "recording", "together", "text", "again", "python"}
    assert set(found["seconds"]) == names
    with pytest.raises(SystemExit, match="got fast, expected some of none, "):
        first_call.main(["--recipes", "fast"])


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert spread([4.0, 1.0, 2.0, 3.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert spread([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_host_time_waits_for_nothing_and_wall_time_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock by which a call takes 1 s to enqueue, and waiting takes 10 s."""
    now = 0.0

    def passes(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(calls.time, "perf_counter", lambda: now)
    wait = partial(passes, 10)
    clock = Clock(1, host=5, wall=20, synchronize=wait, together=partial(passes, 100))
    assert clock.sample(partial(passes, 1), lambda: None) == Sample(1.0, (20 + 10) / 20)
    one = replace(clock, wall=0)
    assert one.sample(partial(passes, 1), lambda: None) == Sample(1.0, 1.0)
    assert "enqueued" in clock.method()
    assert "enqueued" not in one.method()


def test_weights_are_loaded_by_shape() -> None:
    module = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(2, 3, bias=False))
    one, two = torch.ones(3, 2), torch.zeros(3, 2)
    peers.load(module, (one, two))
    assert torch.equal(module[0].weight, one)
    assert torch.equal(module[1].weight, two)
    with pytest.raises(ValueError, match=r"no weight for 1\.weight"):
        peers.load(module, (one,))
    with pytest.raises(ValueError, match="1 weights more"):
        peers.load(module, (one, two, one))


@pytest.mark.parametrize("before", [None, "1"])
def test_replay_is_set_for_a_while_and_makes_no_module_plan_anew(
    monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    monkeypatch.delenv(peers.REPLAY, raising=False)
    if before is not None:
        monkeypatch.setenv(peers.REPLAY, before)
    epoch = config.epoch
    with contextlib.suppress(KeyError), peers.replay(False):
        assert os.environ[peers.REPLAY] == "0"
        raise KeyError
    assert os.environ.get(peers.REPLAY) == before
    assert config.epoch == epoch


@pytest.mark.parametrize("recipe", list(peers.RECIPES))
def test_opsgraph_agrees_with_torch_under_every_recipe(recipe: str) -> None:
    block = Block(32, 32, 64, torch.bfloat16, torch.device("cpu"), recipe)
    found = calls.prepare(COLUMNS, block)
    assert not any(found.refused.values())
    for kind in calls.KINDS:
        assert list(found.calls[kind]) == list(COLUMNS)
        assert list(found.plans[kind]) == ["opsgraph (Python)", "opsgraph"]
    assert "backward" in found.plans[TRAINING]["opsgraph"]
    assert "backward" not in found.plans[INFERENCE]["opsgraph"]


def doubled(block: Block, weights: peers.Weights) -> Peer:
    """Another function than the block's."""
    norm, fc1, fc2 = weights
    return peers.eager(block, (norm, fc1, 2 * fc2))


def absent(block: Block, weights: peers.Weights) -> Peer:
    """A library that is not installed."""
    import no_such_library  # noqa: F401

    raise AssertionError


def test_what_cannot_be_made_or_is_wrong_is_left_out_with_its_reason() -> None:
    columns = COLUMNS | {"absent": Candidate(absent), "doubled": Candidate(doubled)}
    found = calls.prepare(columns, SMALL)
    for kind in calls.KINDS:
        assert list(found.calls[kind]) == list(COLUMNS)
        assert found.refused[kind]["absent"].startswith("ModuleNotFoundError: No module named")
        assert "ValueError: the result is wrong" in found.refused[kind]["doubled"]


@pytest.mark.parametrize("factor", [1, 2])
def test_what_a_graph_computes_is_compared_too(
    monkeypatch: pytest.MonkeyPatch, factor: int
) -> None:
    monkeypatch.setattr(calls, "Captured", lambda call: lambda: factor * call())
    columns = COLUMNS | {"graph": Candidate(peers.ours, graph=True)}
    found = calls.prepare(columns, SMALL)
    for kind in calls.KINDS:
        assert ("graph" in found.calls[kind]) == (factor == 1)
        assert ("the result is wrong" in found.refused[kind].get("graph", "")) == (factor == 2)


def test_a_candidate_that_another_rank_cannot_run_is_left_out() -> None:
    answers = iter([True] + [False] * 8)  # the first candidate's building failed elsewhere
    found = calls.prepare(COLUMNS, SMALL, agree=lambda failed: next(answers))
    assert found.refused[TRAINING] == {"nn.Sequential": "it failed on another rank"}
    assert list(found.calls[INFERENCE]) == list(COLUMNS)[1:]


def test_modules_that_plan_anew_while_they_are_measured_are_an_error() -> None:
    found = calls.prepare({"opsgraph": Candidate(peers.ours)}, SMALL)
    found.activate["opsgraph"] = config.touch
    with pytest.raises(RuntimeError, match="planned anew"):
        calls.samples_of(found, TRAINING, Clock(1, 1, 0))


class EngineState:
    """Stands for TransformerEngine's global state."""


def engine(monkeypatch: pytest.MonkeyPatch) -> type:
    """In TransformerEngine's place opsgraph, whose interface is the same."""
    names = ("transformer_engine", "transformer_engine.common", "transformer_engine.pytorch")
    quantization: Any = ModuleType("transformer_engine.pytorch.quantization")
    made: dict[str, Any] = {name: ModuleType(name) for name in names}
    made[quantization.__name__] = quantization
    made[names[0]].pytorch = made[names[2]]
    made[names[1]].recipe = og.recipe
    made[names[2]].LayerNormMLP = og.LayerNormMLP
    made[names[2]].autocast = og.autocast
    made[names[2]].ops = SimpleNamespace(Sequential=og.Sequential, **vars(og.ops))
    manager = type("FP8GlobalStateManager", (), {"quantization_state": EngineState()})
    quantization.FP8GlobalStateManager = manager
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    return manager


@pytest.mark.parametrize("recipe", ["none", "current"])
def test_transformer_engines_modules_are_built_as_its_users_build_them(
    monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    manager = engine(monkeypatch)
    names = ("nn.Sequential", "TE LayerNormMLP", "te.ops")
    columns = {name: peers.CANDIDATES[name] for name in names}
    found = calls.prepare(columns, replace(SMALL, rows=16, hidden=16, ffn=32, recipe=recipe))
    assert list(found.calls[TRAINING]) == list(names), found.refused
    states = set()
    for name in names[1:]:
        found.activate[name]()
        states.add(manager.quantization_state)
    assert len(states) == (2 if recipe == "current" else 1)


def test_recipes_that_a_device_lacks_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    recipes, lacking = overhead_device.able(torch.device("cuda"))
    assert recipes == ["none", "current", "delayed", "blocks"]
    assert lacking["mx"] == "compute capability is 9.0, expected 10.0 or later"
    assert overhead_device.able(torch.device("cpu")) == (list(peers.RECIPES), {})
    known = peers.candidates_for(peers.CANDIDATES, "current")
    assert set(peers.CANDIDATES) - set(known) == {"torch.compile", "Liger"}


def test_of_ranks_the_slower_one_counts() -> None:
    ranks = [
        {"a": [Sample(1.0, 5.0), Sample(2.0, 2.0)]},
        {"a": [Sample(3.0, 4.0), Sample(1.0, 3.0)]},
    ]
    assert overhead_device.slower(ranks) == {"a": [Sample(3.0, 5.0), Sample(2.0, 3.0)]}


def case(**changes: Any) -> dict[str, Any]:
    """A record with made-up times."""
    samples = {
        "nn.Sequential": [Sample(4e-6, 8e-6)],
        "opsgraph": [Sample(2e-6, 6e-6)],
        "opsgraph (CUDA graph)": [Sample(1e-6, 5e-6)],
    }
    made = calls.case_of(replace(SMALL, recipe="delayed"), TRAINING, samples, {"Liger": "[x]"}, {})
    return made | changes


def test_tables_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    assert tables.title(case()) == "training, float32, DelayedScaling, 4 rows, H=8, F=12"
    assert tables.ratios(case()) == (
        "opsgraph: host 0.50 of nn.Sequential; "
        "wall 0.75 of nn.Sequential, 1.20 of opsgraph (CUDA graph)"
    )
    on_cpu = case(threads=1)
    assert tables.ratios(on_cpu) == "opsgraph: host 0.50 of nn.Sequential"
    tables.show(on_cpu)
    tables.show(case(seconds={}))
    printed = capsys.readouterr().out
    assert "1 thread(s)" in printed
    assert "0.50" in printed
    assert "Liger: [x]" in printed


def test_sizes_and_names_are_read() -> None:
    assert overhead.sizes_of("64x256x512,1x2x3") == [(64, 256, 512), (1, 2, 3)]
    assert overhead.names_of(" a, c", "abc") == ["a", "c"]
    with pytest.raises(SystemExit, match="got 'd', expected some of a, b"):
        overhead.names_of("d", "ab")


def test_a_short_run_on_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(overhead, "FEW_ROWS", replace(overhead.FEW_ROWS, hidden=32, ffn=64))
    monkeypatch.setattr(overhead, "planning_seconds", lambda repeats: {"MLP, greedy": 9.0})
    out, threads = tmp_path / "folder" / "found.json", torch.get_num_threads()
    arguments = ["--repeats", "2", "--inner", "1", "--threads", "1", "--out", str(out)]
    assert overhead.main(arguments) == 0
    assert overhead.main([*arguments, "--check"]) == 1
    assert torch.get_num_threads() == threads
    found = json.loads(out.read_text())
    assert [each["recipe"] for each in found["first_calls"]] == ["none"]
    assert [(each["kind"], each["rows"]) for each in found["cases"]] == [
        ("inference", 4),
        ("forward with gradients", 4),
        ("training", 4),
        ("inference", 16),
        ("training", 16),
    ]
    for each in found["cases"]:
        assert list(each["seconds"]) == list(COLUMNS)
        assert not each["refused"]
    assert set(overhead.host_cases()) == {"forward, no_grad", "forward, grad", "forward + backward"}


def test_the_cases_of_a_device_run_anywhere() -> None:
    names = ("nn.Sequential", "opsgraph", "opsgraph (CUDA graph)")
    place = torch.device("cpu")
    found = list(overhead_device.cases([(16, 16, 32)], ["none"], names, Clock(2, 1, 1), place))
    assert [each["kind"] for each in found] == list(calls.KINDS)
    for each in found:
        assert list(each["seconds"])[:2] == ["nn.Sequential", "opsgraph"]
        if not torch.cuda.is_available():
            assert list(each["refused"]) == ["opsgraph (CUDA graph)"]


@pytest.mark.slow
def test_the_cases_of_two_ranks_run_with_gloo(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    arguments = ["--ranks", "2", "--repeats", "2", "--inner", "1", "--sizes", "32x16x32"]
    others = "TE LayerNormMLP,te.ops,opsgraph (symmetric),opsgraph (recompute=False)"
    recipes = ["--recipes", "none,delayed", "--out", str(out)]
    assert overhead.main([*arguments, "--without", others, *recipes]) == 0
    found = json.loads(out.read_text())["cases"]
    assert [each["recipe"] for each in found] == ["none", "none", "delayed", "delayed"]
    for each in found:
        assert each["ranks"] == 2
        assert list(each["seconds"]) == list(COLUMNS)


@pytest.mark.gpu
def test_a_short_run_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    arguments = ["--device", "cuda", "--repeats", "2", "--inner", "1", "--steps", "1"]
    less = ["--sizes", "64x64x128", "--recipes", "none,delayed", "--without", "torch.compile"]
    assert overhead.main([*arguments, *less, "--out", str(out)]) == 0
    firsts = json.loads(out.read_text())["first_calls"]
    assert [each["recipe"] for each in firsts] == ["none", "delayed"]
    for each in json.loads(out.read_text())["cases"]:
        assert {*COLUMNS, "opsgraph (CUDA graph)"} <= set(each["seconds"]), each["refused"]


def test_gradients_pass_through_a_plain_gather(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a group of one rank: both exchanges are copies."""
    monkeypatch.setattr(peers.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(peers, "all_gather", Tensor.copy_)
    monkeypatch.setattr(peers, "reduce_scatter", Tensor.copy_)
    module = nn.Sequential(peers.GatherRows(), peers.ScatterRows())
    x = torch.randn(3, 2, requires_grad=True)
    y = module(x)
    y.backward(2 * torch.ones_like(y))
    assert torch.equal(y, x)
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
