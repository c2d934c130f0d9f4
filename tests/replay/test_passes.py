"""Replayed passes do what the generated functions do: the same bits, whatever calls them, and how.

Every test runs the same calls of the same module twice, with replays and with OPSGRAPH_REPLAY=0.
"""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import recipe_cases
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
from opsgraph.kernels.cpu import build as library
from opsgraph.kernels.cpu import memory
from opsgraph.layernorm_mlp import LayerNormMLP
from opsgraph.ops import Add, Linear, RMSNorm
from opsgraph.replay import passes, recording

pytestmark = pytest.mark.skipif(library.why_not() is not None, reason="no C++ compiler")

DTYPES = (torch.float32, torch.bfloat16)


def train(module: Any, x: Tensor, steps: int = 5) -> list[Any]:
    """Steps of gradient descent: outputs, gradients, and the parameters at the end."""
    found = []
    for k in range(steps):
        results = step(module, x + k, seed=10 + k)
        found.append(leaves(results))
        gradients = results[-len(list(module.parameters())) :]
        with torch.no_grad():
            for parameter, gradient in zip(module.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient
    return [*found, list(module.parameters())]


def infer(module: Any, x: Tensor, steps: int = 5) -> list[Any]:
    with torch.no_grad():
        torch.manual_seed(4)
        return [leaves(module(x + k)) for k in range(steps)]


# -- the same bits --


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NETS)
def test_five_steps_of_training_and_inference(name: str, dtype: torch.dtype) -> None:
    x = random(ROWS, WIDTH, dtype=dtype)
    module = compare(lambda: build(name, dtype), lambda m: [train(m, x), infer(m, x)])
    for training in (True, False):
        texts = told(module.plan(training, x))
        assert all(any("native call" in text for text in each) for each in texts.values() if each)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name, training", [("llama", True), ("residual", True), ("gpt", False)])
def test_which_passes_are_one_native_call(name: str, training: bool, dtype: torch.dtype) -> None:
    module, x = build(name, dtype), random(ROWS, WIDTH, dtype=dtype)
    train(module, x, 3) if training else infer(module, x, 3)
    plan = module.plan(training, x)
    texts = told(plan)
    assert set(texts) == {"forward", "backward"}
    assert [len(each) for each in texts.values()] == [1, int(training)]
    assert all("in one native call" in text for each in texts.values() for text in each)


def test_nothing_is_told_before_it_is_known() -> None:
    module, x = build("llama"), random(ROWS, WIDTH)
    step(module, x)
    plan = module.plan(True, x)
    assert told(plan) == {"forward": [], "backward": []}
    assert "replay" not in str(plan)
    step(module, x)
    assert is_native(plan)
    assert str(plan).splitlines()[-3:] == [
        "replay",
        "  forward  0, 1, 2, 3: 4 launches in one native call",
        f"  backward {told(plan)['backward'][0]}",
    ]


def test_leading_dimensions() -> None:
    x = random(2, 3, WIDTH)
    compare(lambda: build("llama"), lambda m: [train(m, x), infer(m, x)])


@pytest.mark.parametrize("returned", [False, True])
def test_layernorm_mlp(returned: bool) -> None:
    x = random(2, 3, WIDTH)

    def make() -> Any:
        torch.manual_seed(0)
        return LayerNormMLP(WIDTH, INNER, return_layernorm_output=returned)

    compare(make, lambda m: [train(m, x), infer(m, x)])


def under_a_recipe(recipe: Any) -> Callable[[Any], Any]:
    def use(module: Any) -> Any:
        x = recipe_cases.example()
        found = [recipe_cases.results(module, recipe, x + k) for k in range(5)]
        with torch.no_grad(), og.autocast(enabled=True, recipe=recipe):
            return [found, [module(x) for _ in range(3)]]

    return use


@pytest.mark.parametrize("name", ["current", "delayed", "blocks", "mx"])
def test_recipes(name: str) -> None:
    recipe = recipe_cases.RECIPES[name]
    module = compare(recipe_cases.mlp, under_a_recipe(recipe))
    with og.autocast(enabled=True, recipe=recipe):
        plan = module.plan(True, recipe_cases.example())
    texts = told(plan)
    assert texts["prepare"] == ["1, 4: 2 launches in one native call"]
    for which in ("forward", "backward"):
        assert any("native call" in text for text in texts[which]), texts[which]


# -- calls that differ --


def test_twenty_row_counts_and_again() -> None:
    x = random(40, WIDTH)
    rows = [*range(1, 21)]
    compare(
        lambda: build("llama"),
        lambda m: [step(m, x[:n], seed=n) for _ in range(3) for n in rows],
    )


def test_more_row_counts_than_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "MOST", 4)
    x = random(40, WIDTH)
    counts = [*range(1, 10), *[3] * 3, *range(1, 10), *[9] * 3]
    module = compare(lambda: build("gpt"), lambda m: [step(m, x[:n], seed=n) for n in counts])
    for run in (module.plan(True, x).passes.forward, module.plan(True, x).passes.backward):
        assert len(run.records) == 4


def test_layouts_of_inputs_and_gradients() -> None:
    wide = random(ROWS, 2 * WIDTH)
    inputs = [
        wide[:, :WIDTH],
        random(WIDTH, ROWS).t(),
        random(1, WIDTH).expand(ROWS, WIDTH),
        random(2 * ROWS, WIDTH)[::2],
        wide.flatten()[1 : 1 + ROWS * WIDTH].view(ROWS, WIDTH),
    ]
    dys = [*inputs, torch.ones(()).expand(ROWS, WIDTH)]

    def use(module: Any) -> Any:
        found = []
        for _ in range(3):
            for given in inputs:
                for dy in dys:
                    leaf = given.detach().requires_grad_()
                    y = module(leaf)
                    found.append([y, *torch.autograd.grad(y, [leaf, *module.parameters()], dy)])
        return found

    compare(lambda: build("llama"), use)


def test_no_rows_before_and_after_others() -> None:
    some, none = random(ROWS, WIDTH), random(0, WIDTH)
    module = compare(
        lambda: build("llama"),
        lambda m: [step(m, x) for x in (*[none] * 3, *[some] * 3, none, some)],
    )
    assert is_native(module.plan(True, some))


def test_one_tensor_given_twice_and_then_two() -> None:
    x, z = random(ROWS, WIDTH, seed=1), random(ROWS, WIDTH, seed=2)
    halves = random(ROWS, 2 * WIDTH)
    calls = [(x, x)] * 3 + [(x, z)] * 3 + [(halves[:, WIDTH:], halves[:, :WIDTH])] * 3
    calls += [(halves[:, :WIDTH], random(ROWS, 2 * WIDTH, seed=9)[:, WIDTH:])] * 2

    def make() -> Any:
        torch.manual_seed(0)
        return og.Sequential(RMSNorm(WIDTH), Linear(WIDTH, WIDTH, bias=False), Add())

    def use(module: Any) -> Any:
        found = []
        for one, other in calls:
            a, b = one.detach().requires_grad_(), other.detach().requires_grad_()
            y = module(a, a if one is other else b)
            found.append(y)
            leaves = [a, *module.parameters()]
            found.append(torch.autograd.grad(y, leaves, random(ROWS, WIDTH)))
        return found

    compare(make, use)


def test_gradients_that_share_memory_and_then_do_not() -> None:
    def use(module: Any) -> Any:
        found = []
        for k in range(8):
            x = random(ROWS, WIDTH, seed=k).requires_grad_()
            y, tap = module(x)
            end = y + tap if k < 4 else y * 2 + tap * 3
            found += torch.autograd.grad(end, [x, *module.parameters()], random(ROWS, WIDTH))
        return found

    compare(lambda: build("tap"), use)


def test_the_number_of_threads_changes() -> None:
    x = random(64, WIDTH)

    def use(module: Any) -> Any:
        found = []
        try:
            for n in (1, 1, 1, 2, 2, 2, 1, 2):
                torch.set_num_threads(n)
                found.append(step(module, x))
        finally:
            torch.set_num_threads(1)
        return found

    compare(lambda: build("llama"), use)


def change_in_place(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.mul_(1.5)


def swap_data(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.flip(0).clone()


def swap_layout(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() == 2:
            parameter.data = parameter.data.t().contiguous().t()


def freeze(module: nn.Module) -> None:
    first = next(module.parameters())
    first.requires_grad_(not first.requires_grad)


@pytest.mark.parametrize(
    "change",
    [
        change_in_place, swap_data, swap_layout, freeze, nn.Module.double, nn.Module.bfloat16,
        nn.Module.eval,
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["llama", "dropout"])
def test_parameters_change(name: str, change: Callable[[Any], Any]) -> None:
    def use(module: Any) -> Any:
        found = []
        for _ in range(3):
            for _ in range(3):
                x = random(ROWS, WIDTH, dtype=next(module.parameters()).dtype)
                found.append(step(module, x))
            with torch.no_grad():
                change(module)
        return found

    compare(lambda: build(name), use)


# -- memory --


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


# -- what is told of it --


def names_in_profile(call: Callable[[], Any]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events() if event.name.startswith("opsgraph ")]


def test_passes_have_names_while_a_profiler_runs() -> None:
    module, x = build("llama"), random(ROWS, WIDTH)
    for _ in range(5):
        assert names_in_profile(lambda: step(module, x)) == [
            "opsgraph forward", "opsgraph backward",
        ]  # fmt: skip
    assert is_native(module.plan(True, x))
    recipe = recipe_cases.RECIPES["current"]
    quantized = recipe_cases.mlp()
    for _ in range(3):
        names = names_in_profile(
            lambda: recipe_cases.results(quantized, recipe, recipe_cases.example())
        )
        assert names == ["opsgraph prepare", "opsgraph forward", "opsgraph backward"]


def test_steps_have_names_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = leaves(step(build("llama"), random(ROWS, WIDTH)))
    monkeypatch.setenv("OPSGRAPH_LOGS", "steps")
    module, x = build("llama"), random(ROWS, WIDTH)
    for _ in range(4):
        names = names_in_profile(lambda: assert_same_bits(leaves(step(module, x)), expected))
    plan = module.plan(True, x)
    for number, taken in (("0", "NormKernel.fwd"), ("3", "LinearProduct.fwd")):
        assert any(name.startswith(f"opsgraph {taken} {number} ") for name in names)
    assert [name for name in names if "Backward.bwd" in name]
    reason = "in Python: OPSGRAPH_LOGS=steps runs them one by one"
    assert told(plan) == {"forward": [reason], "backward": [reason]}


@pytest.mark.parametrize(
    "name, setting, reason",
    [
        ("OPSGRAPH_REPLAY", "0", "OPSGRAPH_REPLAY=0"),
        ("OPSGRAPH_CHECK", "1", "OPSGRAPH_CHECK=1 checks every step"),
    ],
)
def test_settings_that_keep_passes_in_python_are_told(
    name: str, setting: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = leaves(step(build("gpt"), random(ROWS, WIDTH)))
    monkeypatch.setenv(name, setting)
    module, x = build("gpt"), random(ROWS, WIDTH)
    for _ in range(4):
        assert_same_bits(leaves(step(module, x)), expected)
    lines = str(module.plan(True, x)).splitlines()
    assert lines[lines.index("replay") + 1 :] == [
        f"  forward  in Python: {reason}", f"  backward in Python: {reason}",
    ]  # fmt: skip


def test_a_module_that_autograd_runs_through_says_so() -> None:
    module, x = build("llama", double_backward=True), random(ROWS, WIDTH)
    for _ in range(3):
        step(module, x)
    assert told(module.plan(True, x))["forward"] == ["in Python: autograd runs through it"]
