"""Memory of replays: whose it is, when it is let go, how much there is at most."""

import weakref
from typing import Any

import pytest
import torch
from replays import (
    INNER,
    NETS,
    ROWS,
    WIDTH,
    assert_same_bits,
    build,
    compare,
    is_native,
    leaves,
    random,
    replaying,
    step,
    told,
)
from torch import Tensor, nn

import opsgraph as og
from benchmarks.memory import fresh_memory, tensor_peak
from opsgraph.fuser import Fuser
from opsgraph.guards.owned import in_place_of
from opsgraph.kernels.cpu import activations, gemm, memory
from opsgraph.kernels.cpu import build as library
from opsgraph.ops import Add, BasicLinear, Linear, RMSNorm, SwiGLU, Tee
from opsgraph.replay import recording

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")


@pytest.mark.parametrize("recipe", [None, og.recipe.Float8CurrentScaling()])
def test_memory_that_nothing_fills_is_known_to_the_recorder(recipe: Any) -> None:
    torch.use_deterministic_algorithms(False)
    x = random(ROWS, 64, dtype=torch.bfloat16)

    def use(module: Any) -> Any:
        with og.autocast(recipe is not None, recipe):
            return [step(module, x * k) for k in (1, 2, 1, 3)]

    module = compare(lambda: build("llama", torch.bfloat16), use)
    stages = module._recipes.values() if recipe else [module._stages]
    (plan,) = (plan for (stage,) in stages for plan in stage.plans.values())
    if recipe is None:
        assert is_native(plan)
    assert all("memory" not in line for lines in told(plan).values() for line in lines)


def test_no_result_shares_memory_and_results_may_be_changed() -> None:
    module, x = build("tap"), random(ROWS, WIDTH)
    expected = leaves(step(module, x))
    before: list[Tensor] = []
    for _ in range(4):
        found = [t for t in step(module, x) if t is not None]
        assert_same_bits(leaves(found), expected)
        starts = [t.untyped_storage().data_ptr() for t in (*found, *before, x)]
        starts += [p.untyped_storage().data_ptr() for p in module.parameters()]
        assert len(set(starts)) == len(starts)
        for tensor in found[2:]:
            tensor.fill_(7.0)
        before = found
    with torch.no_grad():
        for _ in range(4):
            outputs = module(x)
            assert_same_bits(leaves(outputs), expected[:2])
            for output in outputs:
                output.fill_(7.0)


def test_gradients_accumulate() -> None:
    def use(module: Any) -> Any:
        x = random(ROWS, WIDTH).requires_grad_()
        for k in range(5):
            y = module(x)
            y.backward(random(ROWS, WIDTH, seed=k))
        return [x.grad, *(p.grad for p in module.parameters())]

    compare(lambda: build("gpt"), use)


def test_a_second_backward() -> None:
    def use(module: Any) -> Any:
        found: list[Any] = []
        for k in range(5):
            x = random(ROWS, WIDTH, seed=k).requires_grad_()
            y = module(x)
            dy, wanted = random(ROWS, WIDTH), [x, *module.parameters()]
            for retain in (True, True, False):
                found += torch.autograd.grad(y, wanted, dy, retain_graph=retain)
            with pytest.raises(RuntimeError, match="a second time"):
                torch.autograd.grad(y, wanted, dy)
        return found

    compare(lambda: build("llama"), use)


@pytest.mark.parametrize("retain", [False, True])
def test_a_saved_value_dies_before_ops_after_its_last_use(retain: bool) -> None:
    """Saved values of the native part behind are gone when the op before it runs in Python."""
    alive: list[bool] = []
    seen: list[Any] = []

    class Looks(og.Op):
        """The identity, whose backward looks whether the values behind it still live."""

        def fwd(self, x: Tensor) -> Any:
            return x * 1, ()

        def bwd(self, dy: Tensor) -> Any:
            alive.append(any(r() is not None for r in seen))
            return dy * 1, ()

    module = og.Sequential(Looks(), *NETS["llama"]())
    for _ in range(5):
        alive.clear()
        x = random(ROWS, WIDTH).requires_grad_()
        y = module(x)
        saved = y.grad_fn.saved_tensors
        seen[:] = [weakref.ref(t) for t in saved if not isinstance(t, nn.Parameter)]
        del saved
        assert seen
        y.sum().backward(retain_graph=retain)
        assert alive == [retain]
        if retain:
            y.sum().backward()
        with pytest.raises(RuntimeError, match="a second time"):
            y.sum().backward()
        assert alive == [True, False][not retain :]


@pytest.mark.parametrize("name", ["llama", "gpt", "residual"])
def test_peak_memory(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large tensors: what is called large is scaled down with the sizes."""
    torch.use_deterministic_algorithms(False)  # filling memory is an op that is not replayed
    monkeypatch.setattr(memory, "LEAST", 1)
    monkeypatch.setattr(recording, "LARGE", 2**14)
    x, dy = random(512, WIDTH).requires_grad_(), random(512, WIDTH)
    peaks = {}
    for on in (False, True):
        with replaying(on), fresh_memory():
            module = build(name)

            def run(module: Any = module) -> None:
                module(x).backward(dy)
                x.grad = None
                module.zero_grad()

            for _ in range(3):
                run()
            peaks[on] = tensor_peak(run)
            if on:
                assert any("native" in text for text in told(module.plan(True, x))["backward"])
    assert peaks[True] <= peaks[False]


def test_a_stretch_lets_go_of_its_room() -> None:
    """Of two stretches' temporaries, each more than a mebibyte, one's are there at a time."""
    torch.use_deterministic_algorithms(False)  # filling memory is an op that is not replayed
    width, peaks = 256, {}
    x = random(2048, width, dtype=torch.bfloat16)
    for on in (False, True):
        with replaying(on), fresh_memory():
            torch.manual_seed(0)
            module = og.Sequential(
                Tee("r"), RMSNorm(width), Linear(width, 4 * width), SwiGLU(),
                Linear(2 * width, width), Add("r"), RMSNorm(width), Linear(width, width),
                dtype=torch.bfloat16,
            )  # fmt: skip
            for _ in range(3):
                step(module, x)
            peaks[on] = tensor_peak(lambda module=module: step(module, x))
            parts = module.plan(True, x).passes.backward.record.parts if on else ()
    assert sum(getattr(part, "arena", 0) >= memory.LEAST for part in parts) > 1
    assert peaks[True] <= peaks[False]


class _InPlace(Fuser):
    """As ActivationLinearBackward on a GPU."""

    backend, priority = "cpu", 1
    pattern = dict(act=SwiGLU, fc=BasicLinear)
    consumes, gives, wants = ("act_x",), ("fc_x",), dict(fc_weight="y")

    def bwd(self, dy: Tensor, act_x: list[Tensor], fc_weight: Tensor, want: Any) -> Any:
        pre = act_x.pop()
        gradient, out = gemm.dgrad(dy, fc_weight), in_place_of(pre)
        names = frozenset(want)
        dx, y, _ = activations.activation_backward(gradient, pre, "swiglu", want=names, out=out)
        return dx, (y,)


class _Exp(og.Op):
    """e^x, whose backward reads its result."""

    def fwd(self, x: Tensor) -> Any:
        return x.exp(), ()

    def bwd(self, dy: Tensor, y: Tensor) -> Any:
        return dy * y, ()


_InPlace.__module__ = "opsgraph.in_place"  # else it stays in Python


def _saves_memory(retain: bool) -> tuple[int, list[Any]]:
    """A step's peak and gradients where a gradient may be written over what was saved."""

    x, dy = random(512, WIDTH).requires_grad_(), random(512, WIDTH)
    with og.register(_InPlace), fresh_memory():
        module = build("llama")

        def run() -> None:
            module(x).backward(dy, retain_graph=retain)

        for _ in range(3):
            x.grad = None
            module.zero_grad()
            run()
        plan = module.plan(True, x)
        assert "InPlace" in plan.backward_source
        assert not any("Python" in text for text in told(plan)["backward"])
        found = leaves([x.grad, *(p.grad for p in module.parameters())])
        x.grad = None
        module.zero_grad()
        return tensor_peak(run), found


def test_each_stretch_has_room_for_its_own_temporaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one stretch asks for was once what the last one asks for."""
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(recording, "LARGE", 2**14)
    monkeypatch.setattr(memory, "LEAST", 1)
    x = random(512, WIDTH)
    with og.register(_InPlace):
        module = build("llama")
        for _ in range(2):  # the second is recorded
            step(module, x)
        record, namespace = module.plan(True, x).passes.backward.record, dict[str, Any]()
        lines = [line for n, part in enumerate(record.parts) for line in part.text(n, namespace)]
        begin = "room = kept(*"
        rooms = [line.removeprefix(begin)[:-1] for line in lines if line.startswith(begin)]
        arenas = [part.arena for part in record.parts if part.arena]
        assert len({*arenas}) > 1
        assert [namespace[room][0] for room in rooms] == [(arena,) for arena in arenas]
        compare(lambda: build("llama"), lambda module: [step(module, x) for _ in range(6)])


class _Once(dict[str, Any]):
    """Names of a record's text, each for one value."""

    def __setitem__(self, name: str, value: Any) -> None:
        assert name not in self or self[name] == value, name
        super().__setitem__(name, value)


@pytest.mark.parametrize("recipe", [None, og.recipe.DelayedScaling()])
@pytest.mark.parametrize("name", NETS)
def test_a_name_in_a_record_stands_for_one_thing(
    name: str, recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(recording, "LARGE", 2**10)
    monkeypatch.setattr(memory, "LEAST", 1)
    x = random(ROWS, WIDTH, dtype=torch.bfloat16)
    with og.autocast(recipe is not None, recipe):
        module = build(name, torch.bfloat16)
        for _ in range(2):
            step(module, x)
    stages = module._recipes.values() if recipe else [module._stages]
    plans = [plan for (stage,) in stages for plan in stage.plans.values()]
    passes = [run for plan in plans for run in (*plan.passes, *(plan.joined or ()))]
    records = [run.record for run in passes if getattr(run, "record", None)]
    assert records
    for record in records:
        namespace = _Once()
        for number, part in enumerate(record.parts):
            list(part.text(number, namespace))


def test_a_replay_writes_over_what_nothing_else_refers_to(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.use_deterministic_algorithms(False)  # filling memory is an op that is not replayed
    monkeypatch.setattr(recording, "LARGE", 2**14)
    (alone, found), (retained, expected) = _saves_memory(False), _saves_memory(True)
    assert_same_bits(found, expected)
    assert retained - alone > 0.9 * 512 * 2 * INNER * 4


def test_what_is_read_later_is_not_written_over(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.use_deterministic_algorithms(False)
    monkeypatch.setattr(recording, "LARGE", 2**14)
    x, dy = random(64, 2 * INNER), random(64, WIDTH)

    def make() -> og.Sequential:
        torch.manual_seed(0)
        return og.Sequential(_Exp(), SwiGLU(), og.ops.Linear(INNER, WIDTH, bias=False))

    def use(module: og.Sequential) -> Any:
        found = []
        for _ in range(4):
            leaf = x.clone().requires_grad_()
            found += torch.autograd.grad(module(leaf), [leaf, *module.parameters()], dy)
        return found

    with og.register(_InPlace):
        module = compare(make, use)
        assert "InPlace" in module.plan(True, x).backward_source
