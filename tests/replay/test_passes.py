"""Replayed passes do what the generated functions do: the same bits, whatever calls them, and how.

Every test runs the same calls of the same module twice, with replays and with OPSGRAPH_REPLAY=0.
"""

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
    step,
    told,
)
from torch import Tensor, nn

import opsgraph as og
from opsgraph.kernels.cpu import build as library
from opsgraph.layernorm_mlp import LayerNormMLP
from opsgraph.ops import Add, LayerNorm, Linear, RMSNorm
from opsgraph.replay import passes

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
    texts = told(module.plan(training, x))
    assert set(texts) == {"forward", "backward"}
    assert [len(each) for each in texts.values()] == [1, int(training)]
    assert all("in one native call" in text for each in texts.values() for text in each)


@pytest.mark.parametrize("rounding", ["input", "weight"])
@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
def test_a_norm_that_rounds_before_the_weight_is_one_native_call(norm: Any, rounding: str) -> None:
    """As the norms of most models of transformers do."""
    x = random(ROWS, WIDTH, dtype=torch.bfloat16)

    def make() -> og.Sequential:
        return og.Sequential(norm(WIDTH, normalized_dtype=rounding), dtype=torch.bfloat16)

    module = compare(make, lambda m: [train(m, x), infer(m, x)])
    plans = module.plan(True, x), module.plan(False, x)
    assert is_native(plans[0]), told(plans[0])
    assert told(plans[1])["forward"][0].endswith("in one native call")


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
    assert texts.keys() == {"forward", "backward"}
    first = ", ".join(["scale", "1", "4", "0"][name != "delayed" :])
    assert texts["forward"][0].startswith(first)
    # A product that is emulated reads a tensor's scale as a number.
    ops = ("Bias", "BasicLinear") if name in ("current", "delayed") else ("Bias",)
    for which in ("forward", "backward"):
        python = [text for text in texts[which] if "native call" not in text]
        assert len(python) < len(texts[which])
        assert all(any(f" {op}." in text for op in ops) for text in python), python


def test_a_recipe_on_and_off() -> None:
    recipes = [recipe_cases.RECIPES["delayed"], None, recipe_cases.RECIPES["rows"]]

    def use(module: Any) -> Any:
        x = recipe_cases.example()
        found = [recipe_cases.results(module, recipes[k // 3 % 3], x + k) for k in range(18)]
        return [found, list(module.buffers())]

    compare(recipe_cases.mlp, use)


def test_weight_gradients_that_wait() -> None:
    def use(module: Any) -> Any:
        for k in range(5):
            module(random(ROWS, WIDTH, seed=k)).backward(random(ROWS, WIDTH, seed=k + 9))
            module.backward_dw()
        return [parameter.grad for parameter in module.parameters()]

    compare(lambda: build("gpt", delay_wgrad_compute=True), use)


def test_gradients_into_main_grad() -> None:
    def make() -> Any:
        torch.manual_seed(0)
        last = Linear(WIDTH, WIDTH, accumulate_into_main_grad=True)
        module = og.Sequential(RMSNorm(WIDTH), Linear(WIDTH, WIDTH), last)
        last.weight.main_grad = torch.zeros(WIDTH, WIDTH)
        return module

    def use(module: Any) -> Any:
        for k in range(5):
            module(random(ROWS, WIDTH, seed=k)).backward(random(ROWS, WIDTH, seed=k + 9))
        return [module[2].weight.main_grad, module[1].weight.grad]

    compare(make, use)


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


def test_a_weight_of_two_layers_and_then_two_weights() -> None:
    def make() -> Any:
        torch.manual_seed(0)
        one, other = Linear(WIDTH, WIDTH, bias=False), Linear(WIDTH, WIDTH, bias=False)
        other.weight = one.weight
        return og.Sequential(RMSNorm(WIDTH), one, other)

    def use(module: Any) -> Any:
        found = [leaves(step(module, random(ROWS, WIDTH, seed=k))) for k in range(4)]
        module[2].weight = nn.Parameter(2 * module[2].weight.detach())
        return [found, [step(module, random(ROWS, WIDTH, seed=k)) for k in range(4)]]

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
        assert names == ["opsgraph forward", "opsgraph backward"]


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
