"""`python -m opsgraph tune`: a small module is measured here, and the next process uses it."""

import builtins
import json
import os
import subprocess
import sys
import time
import weakref
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import opsgraph as og
from opsgraph.__main__ import main
from opsgraph.features import measured
from opsgraph.kernels import choices, configs
from opsgraph.kernels.choices import Choice, Choices
from opsgraph.kernels.cpu import build, gemm
from opsgraph.ops import (
    GELU,
    AddExtraInput,
    Dropout,
    GroupedLinear,
    Linear,
    MakeExtraOutput,
    RMSNorm,
    SwiGLU,
)
from opsgraph.run.stage import Stage
from opsgraph.tune import command
from opsgraph.tune.command import RECIPES
from opsgraph.tune.measure import tune

ROOT = Path(__file__).parents[2]
SOURCE = """
import torch
import opsgraph as og
from opsgraph.ops import GELU, Linear, RMSNorm

def make():
    torch.manual_seed(0)
    return og.Sequential(RMSNorm(256), Linear(256, 1024), GELU(), Linear(1024, 256))

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = torch.nn.Embedding(4, 32)
        self.body = torch.nn.ModuleList([og.LayerNormMLP(32, 64, device="cpu"), make()])

plain, number = torch.nn.Linear(2, 2), 3
"""

needs_kernels = pytest.mark.skipif(build.why_not() is not None, reason="no kernels here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a module to tune, and a cache directory of its own."""
    (tmp_path / "tuned_module.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(choices, "_all", weakref.WeakSet())  # those of other tests
    monkeypatch.setattr(gemm, "choices", Choices("gemm", gemm.machine, gemm.fastest))
    monkeypatch.setattr(gemm, "_chosen", {})
    made = Choices("plan", lambda: ("here",), gemm.fastest)
    monkeypatch.setattr(measured, "plans", lambda device: made)
    return tmp_path


def python(here: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    cache = str(here / "cache")
    paths = os.pathsep.join([str(ROOT), str(here)])
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=here, timeout=300,
        env={**os.environ, "XDG_CACHE_HOME": cache, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def files(here: Path) -> dict[str, Path]:
    """The files of choices by kind."""
    found = (here / "cache" / "opsgraph").glob("choices-*.json")
    return {path.name.split("-")[1]: path for path in found}


@needs_kernels
@pytest.mark.slow
def test_what_one_process_measured_the_next_one_uses(here: Path) -> None:
    done = python(here, "-m", "opsgraph", "tune", "tuned_module:make", "--rows", "512")
    assert done.returncode == 0, done.stderr
    first, *lines = done.stdout.splitlines()
    assert first.startswith("measured ")
    assert any(line.startswith("  gemm  forward bias 512 1024 256 float32") for line in lines)
    assert any("  plan  RMSNorm, BasicLinear, Bias, GELU" in line for line in lines)
    assert {f"kept in {path}" for path in files(here).values()} == {*lines[-2:]}
    before = {kind: path.read_text() for kind, path in files(here).items()}
    script = (
        "import torch, tuned_module, time\n"
        "from opsgraph.kernels.choices import stores, Choices\n"
        "def fails(self, candidates): raise SystemExit('measured again')\n"
        "for kept in stores(): kept.measure = fails\n"
        "module = tuned_module.make()\n"
        "module(torch.randn(512, 256, requires_grad=True)).sum().backward()\n"
        "module.planner = 'optimal'\n"
        "assert 'measured' in module.plan().costs\n"
    )
    done = python(here, "-c", script)
    assert done.returncode == 0, done.stderr
    done = python(here, "-m", "opsgraph", "tune", "tuned_module:make", "--rows", "512")
    assert done.stdout.splitlines() == ["measured 0, of which 0 are faster than the usual"]
    assert {kind: path.read_text() for kind, path in files(here).items()} == before
    done = python(here, "-m", "opsgraph", "doctor")
    for kind, path in files(here).items():
        (line,) = (x for x in done.stdout.splitlines() if str(path) in x)
        count = len(json.loads(path.read_text())["choices"])
        assert line.split()[:2] == [kind, str(count)]
    done = python(here, "-m", "opsgraph", "tune", "--forget")
    assert done.stdout.count("removed") == 2
    assert not files(here)


def test_plans_are_measured_and_the_best_is_told(here: Path, capsys, monkeypatch) -> None:
    seen = []

    def second(runs):
        for run in runs.values():
            run()
        seen.append([*runs])
        return Choice([*runs][-1], next(iter(runs)), 0.75)

    measured.plans(None).measure = second
    monkeypatch.setenv("OPSGRAPH_BACKENDS", "aten,reference")
    assert main(["tune", "tuned_module:make", "--rows", "8", "--rows", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f"of which {len(seen)} are faster than the usual")
    told = [line for line in lines if line.startswith("  plan")]
    assert len(told) == len(seen) > 0
    for line, names in zip(sorted(told), seen[::-1], strict=True):
        assert line.endswith(f": {names[0]} -> {names[-1]}, 0.75 of the time")
    assert main(["tune", "tuned_module:make", "--rows", "8"]) == 0
    assert capsys.readouterr().out.startswith("measured 0")
    assert main(["tune", "tuned_module:make", "--rows", "8", "--forget"]) == 0
    assert capsys.readouterr().out.startswith(lines[0])


def test_every_plan_that_is_measured_runs(here: Path, monkeypatch) -> None:
    ran, linear = [], Linear(16, 16)

    def each(runs):
        for run in runs.values():
            run()
            ran.append(steps[-1])
            backward = any(direction == "backward" for _, direction, _ in steps[-1])
            assert (linear.weight.grad is not None) == backward
        return next(iter(runs))

    original, steps = Stage.run_plan, []

    def run_plan(stage, plan, *rest):
        steps.append([(s.name, s.direction, s.ops) for s in (*plan.forward, *plan.backward)])
        return original(stage, plan, *rest)

    measured.plans(None).measure = each
    monkeypatch.setenv("OPSGRAPH_BACKENDS", "aten,reference")
    monkeypatch.setattr(Stage, "run_plan", run_plan)
    tune(og.Sequential(RMSNorm(16), linear, GELU(), Linear(16, 4)), [8])
    assert len(ran) > 2
    assert all(ran.count(plan) == 1 for plan in ran)


@pytest.mark.parametrize("recipe", [None, "current"])
def test_extra_inputs_with_and_without_a_recipe(here: Path, recipe: str | None) -> None:
    measured.plans(None).measure = min
    module = og.Sequential(MakeExtraOutput(), RMSNorm(32), Linear(32, 32), AddExtraInput())
    context = RECIPES[recipe] if recipe else None
    tune(module, [16], context=partial(og.autocast, recipe=context()) if context else ExitStack)
    assert measured.plans(None).all()


@pytest.mark.parametrize(
    "options", [["--recipe", "current"], ["--recipe", "delayed"], ["--autocast", "bfloat16"]]
)
def test_inside_a_module_and_in_recipes(here: Path, capsys, options: list[str]) -> None:
    measured.plans(None).measure = min
    assert main(["tune", "tuned_module:Net", "--rows", "16", *options]) == 0
    keys = measured.plans(None).all()
    assert any(key.startswith("LayerNorm, ") for key in keys)
    assert any(key.startswith("RMSNorm, ") for key in keys)
    assert ("Quantize" in "".join(keys)) == (options[0] == "--recipe")


def test_each_line_is_repeated_with_every_configuration_that_it_asks_for(
    here: Path, monkeypatch, tmp_path: Path
) -> None:
    """On the CPU no kernel has any: one is asked for where the norm runs."""
    from opsgraph.ops.norms import RMSNorm as Kind

    original, seen = Kind.fwd, []

    def forward(*arguments):
        config = configs.configured("norm", (16,), lambda w: [{"ROWS": 1}, {"ROWS": 2}])
        seen.append(config["ROWS"])
        return original(*arguments)

    monkeypatch.setenv("OPSGRAPH_BACKENDS", "reference")
    monkeypatch.setattr(Kind, "fwd", staticmethod(forward))
    made = Choices("launch", tuple, lambda runs: [*runs][-1], lambda: [tmp_path / "x.json"])
    monkeypatch.setattr(configs, "choices", lambda: made)
    monkeypatch.setattr(configs, "_chosen", {})
    tune(og.Sequential(RMSNorm(16), Linear(16, 4)), [8])
    assert made.all()["norm 16"][:2] == ("ROWS 2", "ROWS 1")
    assert seen[-1] == 2
    assert {*seen} == {1, 2}


def test_extra_inputs_are_made(here: Path) -> None:
    measured.plans(None).measure = min
    grouped = og.Sequential(GroupedLinear(3, 8, 16), SwiGLU(), GroupedLinear(3, 8, 8))
    tune(grouped, [7])
    assert len(measured.plans(None).all()) in (0, 1, 2)
    tune(nn.Sequential(nn.Linear(3, 8), Linear(8, 8), nn.Sequential(Dropout(0.5))), [4], 8)


def test_what_cannot_be_tuned_says_what_can(here: Path, capsys) -> None:
    def error(*arguments: str) -> str:
        with pytest.raises(SystemExit):
            main(["tune", *arguments])
        return capsys.readouterr().err.splitlines()[-1]

    rows = "--rows", "4"
    assert "expected MODULE:OBJECT, or --forget" in error()
    assert "expected --rows N, once or more" in error("tuned_module:make")
    assert "expected --rows N" in error("tuned_module:make", "--rows", "0")
    assert "expected MODULE:OBJECT, as package" in error("tuned_module", *rows)
    assert "No module named 'not_there'" in error("not_there:make", *rows)
    assert "has no attribute 'not_there'" in error("tuned_module:not_there", *rows)
    assert "got a int, expected a module" in error("tuned_module:number", *rows)
    assert "Sequential, LayerNormMLP, Op" in error("tuned_module:plain", *rows)
    with pytest.raises(og.OpError, match="expected --width"):
        tune(og.Sequential(GELU()), [4])


def test_spoilt_and_read_only_files_are_no_obstacle(here: Path, capsys, monkeypatch) -> None:
    kept = measured.plans(None)
    kept.measure = min
    path = next(iter(kept.files()))
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.warns(UserWarning, match="is ignored"):
        assert main(["tune", "tuned_module:make", "--rows", "4"]) == 0
    assert json.loads(path.read_text())["choices"]
    kept.forget()
    monkeypatch.setattr(kept, "files", lambda: [here / "tuned_module.py" / "below.json"])
    capsys.readouterr()
    with pytest.warns(UserWarning, match="choices are not kept"):
        assert main(["tune", "tuned_module:make", "--rows", "4"]) == 0
    assert not capsys.readouterr().out.startswith("measured 0")


def test_forget_removes_files_and_says_what_stays(here: Path, capsys, monkeypatch) -> None:
    kept = measured.plans(None)
    kept.choose("key", lambda: {"a": list})
    (path,) = files(here).values()
    with monkeypatch.context() as patch:

        def refuse(self: Path) -> None:
            raise PermissionError(13, "Permission denied")

        patch.setattr(Path, "unlink", refuse)
        assert main(["tune", "--forget"]) == 0
    assert f"not removed: {path}: Permission denied" in capsys.readouterr().out
    assert main(["tune", "--forget"]) == 0
    assert f"removed 1 of plan: {path}" in capsys.readouterr().out
    assert not path.exists()


def test_progress_without_rich(capsys, monkeypatch) -> None:
    original = builtins.__import__

    def without(name: str, *rest):
        if name.startswith("rich"):
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with command.progress() as told:
        told("products")
    assert capsys.readouterr().err == "tune: products\n"


def test_nothing_is_left_of_what_tuning_looks_at(here: Path) -> None:
    before = Stage.__call__
    measured.plans(None).measure = min
    began = time.time()
    tune(og.Sequential(RMSNorm(16), Linear(16, 4)), [8])
    assert Stage.__call__ is before
    assert Choices.renewed < began
    assert torch.is_grad_enabled()


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", [None, "current", "delayed", "blocks"])
def test_on_a_gpu_kernels_and_plans_are_measured(here: Path, monkeypatch, recipe) -> None:
    monkeypatch.undo()
    source = "from tuned_module import make as made\ndef make(): return made().cuda().bfloat16()\n"
    (here / "on_gpu.py").write_text(source)
    options = ["--recipe", recipe] if recipe else []
    command = ["-m", "opsgraph", "tune", "on_gpu:make", "--rows", "4096", *options]
    done = python(here, *command)
    assert done.returncode == 0, done.stderr
    assert "  launch  norm_" in done.stdout
    assert "  plan  RMSNorm" in done.stdout
    assert python(here, *command).stdout.startswith("measured 0")
    script = (
        "import torch, on_gpu, opsgraph as og\n"
        "module = on_gpu.make()\n"
        "x = torch.randn(512, 256, device='cuda', dtype=torch.bfloat16, requires_grad=True)\n"
        "module(x).float().sum().backward()\n"
        "module.planner = 'optimal'\n"
        f"assert {bool(recipe)} or 'measured' in module.plan().costs\n"
        "assert x.grad.isfinite().all()\n"
    )
    done = python(here, "-c", script)
    assert done.returncode == 0, done.stderr
