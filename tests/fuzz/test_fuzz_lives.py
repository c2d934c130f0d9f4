"""Random lives of random modules, and that the fuzzer finds what is planted."""

import gc
import os
import runpy
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from opsgraph import ops
from opsgraph.features.recipes import StageRecipe
from opsgraph.kernels.cpu import memory
from opsgraph.kernels.cpu.memory import Pool
from opsgraph.plan.claims import Space
from opsgraph.precision import tapes
from opsgraph.precision.autocast import Active
from opsgraph.replay import recording
from opsgraph.testing import formulas
from opsgraph.testing.fuzz import Impossible, Life, Wrong, blocks
from opsgraph.testing.fuzz.__main__ import main
from opsgraph.testing.fuzz.compare import drop
from opsgraph.testing.fuzz.known import known
from opsgraph.testing.fuzz.lives import Step, live, script, shrink
from opsgraph.testing.fuzz.plots import SCALED, Plot
from opsgraph.testing.fuzz.scaled import KINDS

FOUND = sorted((Path(__file__).parent / "found").glob("*.py"))


def lived(seeds: range, device: str = "cpu") -> int:
    """Live the lives of these seeds; returns how many steps they took."""
    steps = 0
    for seed in seeds:
        plot = Plot(seed, device=device)
        life = live(plot.start, plot.steps)
        steps += life.steps
        if life.error is not None:
            raise AssertionError(f"seed {seed}:\n{script(plot.start, plot.steps)}") from life.error
    return steps


def test_lives() -> None:
    assert lived(range(20)) > 150
    assert lived(range(SCALED, SCALED + 10)) > 75


def test_what_is_drawn_from_a_seed_on() -> None:
    """All of it in the modules and last steps of twenty lives, and nothing of it before."""
    new = "TransposedLinear(", "ScaledAdd(", "WeightedAdd(", "scale=", "GroupedLinear("

    def drawn(seeds: range) -> list[bool]:
        steps = [step for seed in seeds for step in Plot(seed).steps]
        text = repr([step for step in steps if step.method in ("build", "groups")])
        return [word in text for word in new]

    assert all(drawn(range(SCALED, SCALED + 20)))
    assert not any(drawn(range(SCALED - 20, SCALED)))


@pytest.mark.parametrize("compiled", [None, "aot_eager"])
def test_a_refusal_is_excused_under_dynamo_too(compiled: str | None) -> None:
    life = Life("float16", 68, backends=("reference",))
    life.build(1, "Add(None)", "Bias(1)")
    with pytest.raises(Impossible):
        life.call(wide=True, compiled=compiled)
    life.end()


def test_groups_against_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life("bfloat16", 3)
    source = "TransposedGroupedLinear(3, 8, 16, single_grouped_weight=True, bias=True)"
    calls = "plain", "no grad", "copied", "loaded", "pickled", "saved", "frozen"
    life.groups(source, (4, 0, 33), *calls, seed=5)
    life.groups(source, (0, 0, 0), *calls)
    right = formulas.grouped_linear

    def swapped(op: Any, x: Any, get: Any, sizes: Any) -> torch.Tensor:
        return right(op, x, get, sizes[::-1])

    monkeypatch.setattr(formulas, "grouped_linear", swapped)
    with pytest.raises(Wrong, match="plain: output"):
        life.groups(source, (4, 0, 33), "plain")


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_more_lives(part: int) -> None:
    assert lived(range(10_000 + 50 * part, 10_050 + 50 * part)) > 400
    assert lived(range(SCALED + 1000 + 20 * part, SCALED + 1020 + 20 * part)) > 150


@pytest.mark.gpu
@pytest.mark.parametrize("part", range(8))
def test_lives_on_a_gpu(part: int) -> None:
    assert lived(range(20_000 + 25 * part, 20_025 + 25 * part), "cuda") > 200
    assert lived(range(SCALED + 2000 + 10 * part, SCALED + 2010 + 10 * part), "cuda") > 75


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_what_was_found_stays_mended(path: Path) -> None:
    with mock.patch.dict(os.environ):  # a life that is not ended leaves OPSGRAPH_CHECK=1 there
        runpy.run_path(str(path))


def scales_by_order(patch: pytest.MonkeyPatch) -> None:
    """What a checkpoint did before: the n-th scale it reads is the n-th that its forward read."""
    by_order = tapes.taken
    patch.setattr("opsgraph.precision.delayed.taken", lambda scale, _: by_order(scale, None))


def unseen_modes(patch: pytest.MonkeyPatch) -> None:
    """Calls of a known kind that do not see `train()` and `eval()`."""
    patch.setattr("opsgraph.features.known._training", lambda module: True)


def unseen_edits(patch: pytest.MonkeyPatch) -> None:
    """A module that does not see that an op changed."""
    patch.setattr("opsgraph.run.sequential.Sequential._forget", lambda self: None)


START = Step("__init__", ("float32", 3), {"planner": "greedy"})
LONG = [
    Step("build", (8, "Linear(8, 8)", "Dropout(1.0)", "Bias(8)", "Residual(GELU())"), {}),
    Step("call", (), {"lead": (5,), "layout": "strided", "backward": "twice"}),
    Step("freeze", ("0.bias", True), {}),
    Step("call", (), {"seed": 5, "mode": "no_grad", "input_grad": True}),
    Step("insert", (2, "L2Normalization(eps=0.1)"), {}),
    Step("replace", ("0.weight", 7), {}),
    Step("call", (), {"seed": 9, "lead": (2, 3), "backward": "later"}),
    Step("train", (False,), {}),
    Step("call", (), {"seed": 2, "lead": (2, 3), "thread": True}),
    Step("finish", (0,), {}),
]


@pytest.mark.parametrize("plant", [unseen_modes, unseen_edits])
def test_a_planted_fault_is_found_and_shrunk(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """To a script that fails by itself, and is shorter than the life."""
    assert live(START, LONG).error is None
    plant(monkeypatch)
    assert isinstance(live(START, LONG).error, Wrong)
    shorter = shrink(START, LONG, lambda error: isinstance(error, Wrong))
    assert len(shorter) <= 4
    path = tmp_path / "failed.py"
    path.write_text(script(START, shorter))
    with pytest.raises(Wrong):
        runpy.run_path(str(path))


def test_scales_taken_by_order_are_found_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scales_by_order(monkeypatch)
    with pytest.raises(Wrong, match="gradient"):
        runpy.run_path(str(Path(__file__).parent / "found/delayed_checkpoint_after_an_option.py"))


MAKERS, POP, TAKE = Space.makers, Active.pop, Pool.take


def half_an_edit(held: Any, index: int) -> None:
    held.append(ops.GELU())
    raise ValueError


def oldest(self: Any, size: int) -> torch.UntypedStorage:
    """The block that was handed out longest ago, idle or not."""
    blocks = self._blocks.get(size)
    if not blocks:
        return TAKE(self, size)
    blocks.append(blocks.pop(0))
    storage: torch.UntypedStorage = blocks[-1].storage
    return storage


SLIPS: dict[str, tuple[tuple[Any, ...], tuple[str, ...], str]] = {
    "tapes": (
        ("opsgraph.precision.tapes.Replay.read", lambda self, place: torch.tensor(3.0)),
        ("twin('saved', 'delayed')",), "other bits",
    ),
    "told": (
        ("opsgraph.ops.delayed._tell", lambda gradients: None),
        ("set(1, 'delay_wgrad_compute', True)", "listen()", "call((16,))"), "hooks heard",
    ),
    "meet": (
        ("opsgraph.ops.linear.meet", lambda *_: None),
        ("call((16,), recipes=('delayed',))", "restart()"), "does not ask for 1.scaling",
    ),
    "edit": (("opsgraph.testing.fuzz.edges.BREAKS", {"half": half_an_edit}),
             ("broken(0, 'half')",), "left a part"),
    "taken": (("opsgraph.testing.fuzz.edges.BREAKS", {"none": lambda *_: None}),
              ("broken(0, 'none')",), "was taken"),
    "argument": ((), ("wrong('GELU', 'approximate', 'none')",), "was taken"),
    "level": (
        (formulas.FORMULAS, ops.LayerNorm, lambda op, x, get: x + get("weight") + get("bias")),
        ("alone(2, 'level')",), "output: off by",
    ),
    "layer": (
        (KINDS, "current", KINDS["current"]._replace(tiles="row")),
        ("layer('current', (16, 32, 64), 'plain')",), "a row is off by",
    ),
    "updates": (
        ("opsgraph.testing.fuzz.scaled.Products.close", lambda *_: None),
        ("layer('delayed', (16, 32, 64), 'plain', 'no grad')",), "plain: got scales",
    ),
    "contexts": (
        ("opsgraph.precision.autocast.Active.pop",
         lambda self, context: (POP(self, context), setattr(self, "key", None))),
        ("layer('mx', (16, 32, 64), 'nested')",), "nested: output",
    ),
    "memory": (("opsgraph.kernels.cpu.memory.Pool.take", oldest),
               ("overlap()",), "other bits after another call"),
    "products": (
        ("opsgraph.plan.claims.Space.makers", lambda self, name, _: MAKERS(self, name, True)),
        ("inspect()",), "a matrix product runs again",
    ),
    "views": (("opsgraph.testing.fuzz.life.Life._run", lambda self, inputs, *_: 2 * inputs[:1]),
              ("insert(0, 'Tee()')", "call()"), "no view of it"),
    "between": (
        ("opsgraph.features.known._training", lambda module: True),
        ("aside(8, 'Dropout(0.5)', 'Linear(8, 8)', between=[('train', [False])])",), "off by",
    ),
    "limits": ((formulas.FORMULAS, ops.ReLU, lambda op, x, get: x.clamp(-1, 1)),
               ("alone(3, 'inf')",), "output: got a number that is not finite"),
}  # fmt: skip


@pytest.mark.parametrize("slip", SLIPS)
def test_each_check_finds_a_slip(slip: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patched, steps, said = SLIPS[slip]

    def life() -> None:
        life = Life(seed=3)
        life.build(32, "Wave(2.0)", "Linear(32, 32)", "LayerNorm(32)", "ReLU()")
        for step in steps:
            eval(f"life.{step}", {"life": life})

    if patched and not isinstance(patched[-1], dict):
        life()
    if len(patched) == 3:
        monkeypatch.setitem(*patched)
    elif patched:
        monkeypatch.setattr(*patched)
    with pytest.raises(Wrong, match=said):
        life()


def test_a_later_microbatch_that_quantizes_anew_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life()
    life.mlp(32, 64)
    life.microbatch("rows")
    monkeypatch.setattr(StageRecipe, "_kept", lambda self, plan, weights: list(weights))
    with pytest.raises(Wrong, match="anew"):
        life.microbatch("rows")


def test_a_few_ops_aside_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life()
    life.build(8, "Tanh()")
    life.aside(5, "Tee()", "ReLU()", lead=(3,), layout="padded", quiet=True)
    monkeypatch.setitem(formulas.FORMULAS, ops.ReLU, lambda op, x, get: x.clamp_min(0) + 0 * x)
    life.aside(5, "Tee()", "ReLU()", lead=(3,))
    monkeypatch.setitem(
        formulas.FORMULAS, ops.ReLU, lambda op, x, get: torch.where(x < 0, 0, x)
    )  # whose gradient at 0 is 1
    with pytest.raises(Wrong, match="gradient of input 0"):
        life.aside(5, "Tee()", "ReLU()", lead=(3,), layout="padded", quiet=True)


@pytest.mark.parametrize("way", ["vjp", "jvp", "dual", "functional", "vmap", "trace"])
def test_each_transform_is_compared(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life()
    life.build(8, "Linear(8, 8)", "GELU()")
    life.transform(way)
    monkeypatch.setitem(formulas.FORMULAS, ops.GELU, formulas.FORMULAS[ops.SiLU])
    with pytest.raises(Wrong, match="off by"):
        life.transform(way)


def test_what_a_module_leaves_behind_is_found() -> None:
    for kind in ("nothing", "modules", "functions"):
        gc.collect()  # what other tests have left
        life = Life()
        life.build(7, "Linear(7, 5)", "Mish()")  # of which no other test has a plan
        life.verify(True)
        life.call()
        plans = [*life.module._stages[0].plans.values()]
        held = {"nothing": [], "modules": [life.module], "functions": plans}[kind]
        del plans
        if held:
            with pytest.raises(Wrong, match=rf"\d {kind}"):
                life.leave()
        else:
            life.leave()
        del held


@pytest.mark.parametrize("earlier", (True, False))
def test_what_is_left_says_of_which_life_it_is(earlier: bool) -> None:
    """Two modules of one structure plan in one table, whichever is there first."""
    gc.collect()
    life = Life()
    life.build(9, "Linear(9, 5)", "Mish()")
    life.call(lead=(3,))
    kept = [life.module if earlier else life.module._stages[0].table]
    if earlier:
        life = Life()
        life.build(9, "Linear(9, 5)", "Mish()")
    for _ in range(2):  # the last is replayed
        life.call(lead=(3,))
    whose = "an earlier life, is held by .*Stage" if earlier else "this life, is held by list"
    with pytest.raises(Wrong, match=f"functions .*Mish, of {whose}"):
        life.leave()
    del kept


def test_a_life_that_ends_keeps_no_module_by_what_waits() -> None:
    """A hook holds the life, which held an output: a cycle through autograd's nodes."""
    life = Life()
    life.build(4, "Linear(4, 4)", "Tanh()")
    life.hook(0)
    life.call(backward="later")
    module = weakref.ref(life.module)
    life.end()
    del life
    for _ in range(3):
        gc.collect()
    assert module() is None


def test_what_garbage_holds_through_autograd_is_not_left_behind() -> None:
    """A LayerNormMLP is a cycle; whether a node holds it shows when the node has gone."""
    gc.collect()
    gc.disable()  # or the node may go before
    try:
        life = Life()
        life.mlp(4, 4)
        ring = [life.module(torch.randn(2, 4, requires_grad=True)).exp()]
        ring.append(ring)
        del ring
        life.leave()
    finally:
        gc.enable()


def test_a_step_that_does_not_apply_is_left_out() -> None:
    life = Life()
    life.build(4, "GELU()")
    with pytest.raises(Impossible):
        life.replace("0.weight", 1)
    start = Step("__init__", (), {})
    steps = [Step("build", (4, "GELU()"), {}), Step("remove", (3,), {}), Step("call", (), {})]
    assert live(start, steps) == (2, None)


class Here:
    """In the place of a process: does it at once."""

    made: list["Here"] = []

    def __init__(self) -> None:
        self.lives, self.ended = 0, False
        self.made.append(self)

    def ask(self, function: Callable[..., Any], *given: Any) -> Any:
        assert not self.ended
        self.lives += 1
        return function(*given)

    def end(self) -> None:
        self.ended = True


def test_a_life_that_fails_is_the_last_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "Worker", Here)
    monkeypatch.setattr(blocks, "_own", threading.local())
    monkeypatch.setattr(Here, "made", [])

    def lived(seed: int, device: str) -> blocks.Told:
        return blocks.Told(3, "Wrong: an output", "in a file") if seed == 1 else blocks.Told(7)

    monkeypatch.setattr(blocks, "_lived", lived)
    block = blocks.run_block(0, "cpu")
    (failure,) = block.failures
    assert (block.steps, failure.seed, failure.error) == (31, 1, "Wrong: an output\nin a file")
    assert failure.script.startswith("# It failed behind other lives of its process")
    assert [(worker.lives, worker.ended) for worker in Here.made] == [
        (2, True), (1, True), (3, False),
    ]  # fmt: skip


def test_a_life_that_fails_by_itself_is_shrunk_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(blocks, "Worker", Here)
    monkeypatch.setattr(
        blocks, "Plot", lambda seed, device: SimpleNamespace(start=START, steps=LONG)
    )
    unseen_edits(monkeypatch)
    told = blocks._lived(7, "cpu")
    assert told.error.startswith("Wrong: ")
    failure = blocks._failure(7, "cpu", told)
    assert len(failure.script.splitlines()) <= 7
    assert not failure.script.startswith("#")


def test_every_other_life_takes_small_memory_for_large() -> None:
    """In a process of its own: what its lives leave unended keeps the sizes."""
    usual, worker = (memory.LEAST, recording.LARGE), blocks.Worker()
    try:
        seeds = blocks.SMALL - 1, blocks.SMALL, blocks.SMALL + 1, blocks.SMALL + 2
        sizes = [worker.ask(blocks.resize, seed) for seed in seeds]
    finally:
        worker.end()
    assert sizes == [usual, usual, blocks.SIZES, usual]
    assert (memory.LEAST, recording.LARGE) == usual
    head, life, _ = blocks.program(blocks.SMALL + 1, START, LONG).partition("life = ")
    tells = f"{head}print((memory.LEAST, recording.LARGE))"
    told = subprocess.run([sys.executable, "-c", tells], check=True, capture_output=True, text=True)
    assert life
    assert told.stdout.strip() == str(blocks.SIZES)
    assert "memory" not in blocks.program(blocks.SMALL, START, LONG)


def test_a_known_fault_is_recognised_by_its_kind_and_its_words() -> None:
    InterpreterError = type("InterpreterError", (Exception,), {})
    said = "TypeError('only 0-dimensional arrays can be converted to Python scalars')"
    assert known(InterpreterError(said)) == "Triton's interpreter with NumPy 2.4"
    assert known(TypeError(said)) is None
    assert known(InterpreterError("another")) is None
    told = blocks.Told(3, said, known="a fault")
    assert blocks._failure(1, "cpu", told).known == "a fault"  # and nothing is shrunk


def test_a_process_that_ends_is_a_failure() -> None:
    worker = blocks.Worker()
    assert worker.ask(abs, -3) == 3
    told = blocks._asked(worker, os._exit, 7)
    assert told.error == "EOFError: a process ended with exit code 7"


def test_a_known_fault_is_counted_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "cpu-7.jsonl"
    log.write_text(
        '{"first": 7, "steps": 12, "failed": [9], "known": {"8": "hooks that stay"}}\n'
        '{"seconds": 36.0, "processes": 2, "versions": "torch 2"}\n'
    )
    assert main(["--minutes", "0", "--seed", "7", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith(
        "cpu: 5 lives, 12 steps, 1 failed, 1 ended by a known fault (hooks that stay); "
        "seeds 7 to 11; 0.010 hours by 2 process(es), torch 2; 0.000 hours by "
    )


def test_what_the_frames_of_an_error_hold_is_let_go() -> None:
    """As PyTorch's hooks for saved tensors are, of a checkpoint whose function raises."""
    held: list[str] = []

    def holding() -> Iterator[None]:
        try:
            yield
        finally:
            held.append("let go")

    def fails() -> None:
        waiting = holding()
        next(waiting)
        raise ValueError

    with pytest.raises(Impossible) as kept:
        try:
            fails()
        except ValueError:
            raise Impossible from None
    assert not held
    drop(kept.value)
    assert held


def test_the_command_goes_on_where_it_stopped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("opsgraph.testing.fuzz.__main__.BLOCK", 1)
    arguments = ["--minutes", "0", "--seed", "7", "--processes", "1", "--out", str(tmp_path)]
    log = tmp_path / "cpu-7.jsonl"
    log.write_text('{"first": 7, "steps": 12, "failed": []}\n')
    assert main(arguments) == 0
    assert "1 lives, 12 steps" in capsys.readouterr().out
