"""Contexts: nested in each other, left in any order, in threads, compiled."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled import cold
from recipe_cases import HIDDEN, example, mlp, results
from torch import Tensor

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
