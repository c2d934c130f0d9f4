"""Contexts: nested in each other, left in any order, in threads, in checkpoints, compiled."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
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
from opsgraph.precision.autocast import active, microbatch

__all__ = ["cold"]

CURRENT, MX = r.Float8CurrentScaling(), r.MXFP8BlockScaling()
Around = Callable[[], AbstractContextManager[Any]]
AROUND: dict[str, Around] = {
    "none": nullcontext,
    "disabled": lambda: og.autocast(enabled=False),
    "current": lambda: og.autocast(recipe=CURRENT),
    "delayed": lambda: og.autocast(recipe=r.DelayedScaling(amax_history_len=77)),
}


def trained(recipe: r.Recipe, around: Around, once: bool = False) -> list[Tensor]:
    """Gradients and buffers after four steps with gradients of about 1e-6."""
    module = mlp(torch.float32)
    with around() if once else nullcontext():
        for _ in range(4):
            module.zero_grad()
            x = example(dtype=torch.float32).requires_grad_()
            with nullcontext() if once else around(), og.autocast(recipe=recipe):
                y = module(x)
            (1e-6 * y.square().mean()).backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("once", [False, True])
@pytest.mark.parametrize("name", AROUND)
def test_what_is_around_a_delayed_recipe_changes_nothing(name: str, once: bool) -> None:
    base = r.DelayedScaling(amax_history_len=5 + len(name) + 20 * once)
    found = trained(base, AROUND[name], once)
    expected = trained(replace(base, reduce_amax=False), nullcontext)
    assert all(map(torch.equal, found, expected))
    assert float(found[0].abs().max()) > 0


def test_what_is_inside_a_delayed_recipe_changes_nothing() -> None:
    recipe = r.DelayedScaling(amax_history_len=3)
    other = replace(recipe, reduce_amax=False)
    plain, nested, x = mlp(), mlp(), example()
    for _ in range(3):
        with og.autocast(recipe=recipe):
            expected = results(plain, recipe, x)
        with og.autocast(recipe=other):
            for around in AROUND.values():
                with around():
                    pass
            found = results(nested, other, x)
        assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, plain.buffers(), nested.buffers()))


@pytest.mark.parametrize("inner", ["disabled", "current", "delayed"])
@pytest.mark.parametrize("outer", AROUND)
def test_the_innermost_counts_and_the_outer_returns(outer: str, inner: str) -> None:
    with AROUND[outer]():
        before = active.key
        with pytest.raises(KeyError), AROUND[inner]() as context:
            assert active.key == context.key
            raise KeyError
        assert active.key == before
    assert (active.key, active.stack, active.delayed) == (None, (), {})


def test_one_context_in_itself_and_in_two_threads() -> None:
    context, seen = og.autocast(recipe=MX), list[Any]()
    first, second = threading.Event(), threading.Event()

    def one() -> None:
        with og.autocast(recipe=CURRENT), context, context:
            first.set()
            second.wait(10)
            seen.append(active.key == MX.key)
        seen.append(active.key is None)

    def two() -> None:
        first.wait(10)
        with context:
            second.set()
            thread.join(10)
            seen.append(active.key == MX.key)
        seen.append(active.key is None)

    thread, other = threading.Thread(target=one), threading.Thread(target=two)
    thread.start()
    other.start()
    other.join(10)
    assert seen == [True] * 4


def test_threads_that_share_a_delayed_recipe() -> None:
    """Each trains a module of its own, made and first called there."""
    recipe = r.DelayedScaling(amax_history_len=21)
    context, found, failed = og.autocast(recipe=recipe), list[Any](), list[Any]()

    def work(size: float) -> None:
        try:
            layer, x = Linear(HIDDEN, 32), torch.full((4, HIDDEN), size)
            for _ in range(5):
                with context:
                    y = layer(x)
                y.sum().backward()
            found.append((size, float(layer.get_submodule("scaling").scale[0])))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(2.0**k,)) for k in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failed
    assert sorted(found) == [(2.0**k, 448 / 2.0**k) for k in range(6)]


def test_contexts_may_be_left_in_another_order() -> None:
    """As a generator does that is suspended inside one, whatever is entered meanwhile."""

    def inside() -> Iterator[int | None]:
        with og.autocast(recipe=MX):
            yield active.key

    running = inside()
    assert next(running) == MX.key
    with og.autocast(recipe=CURRENT):
        running.close()
        assert active.key == CURRENT.key
    assert active.key is None


def test_a_decorated_function_runs_inside() -> None:
    @og.autocast(recipe=MX)
    def run(depth: int) -> list[int | None]:
        return [active.key, *(run(depth - 1) if depth else [])]

    assert run(2) == [MX.key] * 3
    assert active.key is None

    def generator() -> Iterator[int]:
        yield 1

    async def coroutine() -> None: ...

    for function in (generator, coroutine):
        with pytest.raises(og.OpsgraphError, match="which runs after it was called"):
            og.autocast(recipe=MX)(function)


def test_wrong_arguments_of_contexts() -> None:
    with pytest.raises(og.OpsgraphError, match=r"autocast: got enabled=<function .* expected True"):
        og.autocast(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(og.OpsgraphError, match="quantized_model_init: got recipe 'fp8'"):
        og.quantized_model_init(recipe="fp8").__enter__()  # type: ignore[arg-type]


def test_a_microbatch_inside_another_restores_it() -> None:
    with microbatch(True):
        with microbatch(False):
            assert active.first_microbatch is False
        assert active.first_microbatch is True
    assert active.first_microbatch is None


# -- checkpoints --


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


def test_a_recipe_made_inside_a_compiled_function() -> None:
    module, x = mlp(), example()

    def run(x: Tensor) -> Tensor:
        with og.autocast(recipe=r.Float8CurrentScaling(row_wise=True)):
            y = module(x)
        with og.autocast(recipe=r.CustomRecipe(by_role)), og.autocast(enabled=False):
            return y + module(x)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), run(x))


def by_role(role: str) -> og.quantizers.Quantizer:
    return og.quantizers.MXQuantizer()


def test_a_decorated_function_can_be_compiled() -> None:
    module, x = mlp(), example()
    run = og.autocast(recipe=MX)(lambda x: module(x))
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), run(x))
    assert active.key is None
    delayed = og.autocast(recipe=r.DelayedScaling())(lambda x: module(x))
    says_why = torch.__version__ >= "2.10"  # 2.9 drops the text where a context manager is left
    text = "DelayedScaling inside a compiled function" if says_why else "Observed exception"
    with pytest.raises(Exception, match=text):
        torch.compile(delayed, fullgraph=True, backend="aot_eager")(x)


def test_many_contexts_at_once() -> None:
    with ExitStack() as stack:
        for k in range(100):
            stack.enter_context(og.autocast(recipe=MX if k % 2 else CURRENT))
        assert active.key == MX.key
    assert active.key is None
