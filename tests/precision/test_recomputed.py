"""Checkpoints: a recomputation has the recipe and the scales of its forward, or is an error."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from compiled import cold
from recipe_cases import HIDDEN, example, mlp, results
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import opsgraph as og
from opsgraph.ops import Linear
from opsgraph.precision import recipe as r

__all__ = ["cold"]

CURRENT, MX = r.Float8CurrentScaling(), r.MXFP8BlockScaling()


def again(body: Any, x: Tensor) -> Any:
    return checkpoint(body, x, use_reentrant=False, context_fn=og.checkpoint_contexts)


@pytest.mark.parametrize("inside", [True, False])
def test_nested_checkpoints(inside: bool, device: str) -> None:
    """Also with the backward inside the context, which still ends with an update."""
    ours = r.DelayedScaling(amax_history_len=6 + inside)
    found = list[Any]()
    for nested in (True, False):
        layers = [mlp().to(device) for _ in range(3)]
        recipe = replace(ours, reduce_amax=nested)
        through = again if nested else lambda body, x: body(x)

        def inner(x: Tensor) -> Tensor:
            return through(layers[2], layers[1](x))  # noqa: B023

        def outer(x: Tensor) -> Tensor:
            return through(inner, layers[0](x)).sin()  # noqa: B023

        for _ in range(3):
            x = example().to(device).requires_grad_()
            with og.autocast(recipe=recipe):
                y = through(outer, x)
                if inside:
                    y.sum().backward()
            if not inside:
                y.sum().backward()
        buffers = [b for layer in layers for b in layer.buffers()]
        found.append([x.grad, y, *(p.grad for m in layers for p in m.parameters()), *buffers])
    assert all(map(torch.equal, *found))


OUTSIDE = [CURRENT, MX, r.DelayedScaling(), r.Float8CurrentScaling(backward_override="dequantized"),
           r.MXFP8BlockScaling(backward_override="high_precision")]  # fmt: skip


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", OUTSIDE)
def test_a_recomputation_without_its_recipe_is_an_error(
    recipe: r.Recipe, reentrant: bool, device: str
) -> None:
    module = og.LayerNormMLP(HIDDEN, 64, device=device)
    x = example(dtype=torch.float32).to(device).requires_grad_()
    with og.autocast(recipe=recipe):
        y = checkpoint(module, x, use_reentrant=reentrant)
    message = r"og\.checkpoint_contexts, use_reentrant=False"
    with pytest.raises(og.OpsgraphError, match=message):
        y.sum().backward()
    plain = checkpoint(module, x, use_reentrant=reentrant)  # and nothing is left of it
    plain.sum().backward()


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Linear": lambda: Linear(HIDDEN, 32, device="cpu"),
    "Sequential": lambda: mlp(torch.float32),
    "between plain modules": lambda: nn.Sequential(mlp(torch.float32), nn.Tanh()),
    "LayerNormMLP": lambda: og.LayerNormMLP(HIDDEN, 64, device="cpu"),
}
POWERS = r.Float8CurrentScaling(use_power_2_scales=True)


def forget(module: nn.Module) -> None:
    """Have a module look at its ops again, as an attribute that is set does."""
    op = next(m for m in module.modules() if isinstance(m, og.Op) or hasattr(m, "eps"))
    op.register_forward_hook(lambda *_: None)


BETWEEN: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "nothing": lambda module, x: None,
    "a plain call": lambda module, x: module(x),
    "another recipe": lambda module, x: results(module, POWERS, x),
    "a hook": lambda module, x: forget(module),
}


@pytest.mark.parametrize("back", [None, MX, POWERS])
@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_no_recomputation_is_in_another_recipe(
    reentrant: bool, name: str, between: str, back: r.Recipe | None
) -> None:
    """Whatever the module does between its forward and its backward, and what is around that."""
    module, x = LAYERS[name](), example(dtype=torch.float32).requires_grad_()
    with og.autocast(recipe=CURRENT):
        y = checkpoint(module, x, use_reentrant=reentrant)
    BETWEEN[between](module, x.detach().requires_grad_())
    with (
        pytest.raises((og.OpsgraphError, CheckpointError)) as raised,
        og.autocast(back is not None, back),
    ):
        y.sum().backward()
    if name != "between plain modules":  # whose backward asks for its tensors before ours
        assert "og.checkpoint_contexts" in str(raised.value)


@pytest.mark.parametrize("recipe", [CURRENT, r.DelayedScaling(amax_history_len=17)])
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_without_a_recipe_does_not_mind_calls_that_have_one(
    reentrant: bool, name: str, recipe: r.Recipe
) -> None:
    module, x = LAYERS[name](), example(dtype=torch.float32).requires_grad_()
    y = checkpoint(module, x, use_reentrant=reentrant)
    given = [x, *module.parameters()]
    want = torch.autograd.grad(module(x).sum(), given)
    results(module, recipe, x)
    y.sum().backward()
    assert all(torch.equal(t.grad, g) for t, g in zip(given, want, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("contexts", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_each_of_several_checkpoints_has_its_own_scales(name: str, contexts: bool) -> None:
    """Or, without `checkpoint_contexts`, those of which nothing is left are an error."""
    found = list[Any]()
    for checkpointed in (True, False):
        torch.manual_seed(0)
        module = LAYERS[name]()
        recipe = r.DelayedScaling(amax_history_len=18 + 2 * contexts + checkpointed)

        def body(x: Tensor) -> Tensor:
            with og.autocast(recipe=recipe):  # noqa: B023
                return module(x)  # noqa: B023

        inputs = [(k * example(dtype=torch.float32)).requires_grad_() for k in (3, 1, 7)]
        through = again if contexts else partial(checkpoint, use_reentrant=False)
        outputs = [through(body, x) if checkpointed else body(x) for x in inputs]
        outputs.pop().sum().backward()
        if checkpointed and not contexts:
            with pytest.raises(og.OpsgraphError, match=r"og\.checkpoint_contexts"):
                outputs.pop().sum().backward()
            return
        for y in outputs:
            y.sum().backward()
        found.append([*(x.grad for x in inputs), *(p.grad for p in module.parameters())])
    assert all(map(torch.equal, *found))


def look_again(module: og.Sequential) -> None:
    module.planner = "optimal"


def evaluate(module: og.Sequential) -> None:
    with torch.no_grad():
        module(example())


def change_rows(module: og.Sequential) -> None:
    module(example().repeat(2, 1).unsqueeze(0))


@pytest.mark.parametrize("before", [look_again, evaluate, change_rows])
@pytest.mark.parametrize("contexts", [1, 2])
def test_a_forward_that_looks_at_scales_more_often_than_its_recomputation(
    before: Callable[[og.Sequential], None], contexts: int
) -> None:
    """A call of a kind that is not known yet reads them several times, the next one once."""
    found = list[Any]()
    for checkpointed in (True, False):
        module = mlp()
        recipe = r.DelayedScaling(amax_history_len=30 + checkpointed)

        def body(x: Tensor) -> Tensor:
            for _ in range(contexts):
                with og.autocast(recipe=recipe):  # noqa: B023
                    x = module(x)  # noqa: B023
            return x

        body(example()).square().sum().backward()
        with og.autocast(recipe=recipe):
            before(module)
        module.zero_grad()
        x = (3 * example()).requires_grad_()
        y = again(body, x) if checkpointed else body(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in module.parameters())])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("recipe", [MX, r.DelayedScaling(amax_history_len=9)])
def test_a_recipe_inside_a_checkpoint_needs_nothing(
    recipe: r.Recipe, reentrant: bool, device: str
) -> None:
    """Each step's amax is noted once, and the recomputation has the scales of its forward."""
    delayed = isinstance(recipe, r.DelayedScaling)
    found = list[Any]()
    for checkpointed in (True, False):
        module = mlp().to(device)
        ours = replace(recipe, reduce_amax=checkpointed) if delayed else recipe

        def body(x: Tensor) -> Tensor:
            with og.autocast(recipe=ours):  # noqa: B023
                return module(x)  # noqa: B023

        steps = list[Any]()
        for step in range(4):
            x = ((1 + step) * example().to(device)).requires_grad_()
            y = checkpoint(body, x, use_reentrant=reentrant) if checkpointed else body(x)
            y.float().square().sum().backward()
            steps += [y.detach(), x.grad]
        with og.autocast(recipe=ours):
            pass
        found.append([*steps, *module.buffers()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_scales_that_are_gone_are_an_error() -> None:
    recipe, module = r.DelayedScaling(amax_history_len=8), Linear(HIDDEN, 32)

    def body(x: Tensor) -> Tensor:
        with og.autocast(recipe=recipe):
            return module(x)

    y = checkpoint(body, example(dtype=torch.float32).requires_grad_(), use_reentrant=False)
    other = Linear(HIDDEN, 32)
    for _ in range(2):
        with og.autocast(recipe=recipe):
            other(example(dtype=torch.float32))
    with pytest.raises(og.OpsgraphError, match=r"context_fn=og\.checkpoint_contexts"):
        y.sum().backward()


# -- torch.compile --


@pytest.mark.parametrize(
    ("where", "contexts"), [("inside", False), ("inside", True), ("around", True)]
)
def test_checkpoints_and_compiled_modules(where: str, contexts: bool) -> None:
    """Inside the compiled function and around it, delayed scaling has its forward's scales."""
    if where == "inside" and contexts and torch.__version__ < "2.12":
        pytest.skip("this Dynamo takes dispatch modes alone as a checkpoint's contexts")
    found = list[Any]()
    for compiled in (True, False):
        recipe = r.DelayedScaling(amax_history_len=12 + compiled + 2 * contexts)
        module: nn.Module = og.LayerNormMLP(16, 32, device="cpu")
        torch.manual_seed(0)
        for p in module.parameters():
            nn.init.normal_(p, 0, 0.1)
        options = dict(context_fn=og.checkpoint_contexts) if contexts else {}
        run: Any = module
        if compiled and where == "around":
            run = torch.compile(module, backend="aot_eager", fullgraph=True)
        body = run if compiled else module

        def through(x: Tensor) -> Any:
            return checkpoint(body, x, use_reentrant=False, **options)  # noqa: B023

        if compiled and where == "inside":
            call: Any = torch.compile(through, backend="aot_eager", fullgraph=True)
        else:
            call = through if compiled else module
        for step in range(3):
            torch.manual_seed(step)
            x = torch.randn(8, 16).mul_(1 + step).requires_grad_()
            with og.autocast(recipe=recipe):
                y = call(x)
            module.zero_grad()
            y.square().sum().backward()
        seen = [b[..., :2] for b in module.buffers()]
        found.append([y, x.grad, *(p.grad for p in module.parameters()), *seen])
    assert all(torch.equal(a[-3:], b[-3:]) for a, b in zip(*found, strict=True))
