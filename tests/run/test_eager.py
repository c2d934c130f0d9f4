"""Memory that a module shares: gradients, outputs and inputs, in any number of dimensions."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import opsgraph as og
from opsgraph.ops import (
    GELU,
    Add,
    AddExtraInput,
    Bias,
    ConstantScale,
    Dropout,
    Identity,
    LayerNorm,
    Linear,
    MakeExtraOutput,
    ReLU,
    Residual,
    RMSNorm,
    SwiGLU,
    Tee,
)

SHAPES: list[tuple[int, ...]] = [(6,), (1, 6), (4, 6), (2, 3, 6), (1, 1, 6), (2, 1, 3, 6)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


class Exp(og.Op):
    """An op whose backward needs what it returned."""

    def fwd(self, x: Tensor) -> Any:
        return x.exp(), ()

    def bwd(self, dy: Tensor, y: Tensor) -> Any:
        return dy * y, ()


class Hidden(og.Op):
    """The same, but for the name and the form under which it keeps that."""

    saves = ("kept",)

    def fwd(self, x: Tensor) -> Any:
        y = x.exp()
        return y, (y.t(),)

    def bwd(self, dy: Tensor, kept: Tensor) -> Any:
        return dy * kept.t(), ()


class Same(og.Op):
    """An op that returns what it is given."""

    def fwd(self, x: Tensor) -> Any:
        return x, ()

    def bwd(self, dy: Tensor) -> Any:
        return dy, ()


class Turned(og.Op):
    """An op whose result is a view of memory of its own."""

    def fwd(self, x: Tensor) -> Any:
        return (2 * x.t()).t(), ()

    def bwd(self, dy: Tensor) -> Any:
        return 2 * dy, ()


PASSING: dict[str, Callable[..., nn.Module]] = {
    "add": lambda **k: og.Sequential(Add(), **k),
    "two adds": lambda **k: og.Sequential(Add(), AddExtraInput(), **k),
    "identity": lambda **k: og.Sequential(Identity(), **k),
    "scaled by 1": lambda **k: og.Sequential(ConstantScale(1.0), **k),
    "dropout of 0": lambda **k: og.Sequential(Dropout(0.0), **k),
    "dropout in evaluation": lambda **k: og.Sequential(Dropout(0.5), **k).eval(),
    "several that do nothing": lambda **k: og.Sequential(Identity(), Dropout(0.0), **k),
    "a tee": lambda **k: og.Sequential(Tee(), **k),
    "residuals in each other": lambda **k: og.Sequential(Residual(Residual(Identity())), **k),
    "a bias": lambda **k: og.Sequential(Bias(6), **k),
    "bias and add": lambda **k: og.Sequential(Bias(6), Add(), **k),
    "add before linear": lambda **k: og.Sequential(Add(), Linear(6, 6), MakeExtraOutput(), **k),
    "one that returns its input": lambda **k: og.Sequential(Same(), Add(), **k),
}


def leaves(module: nn.Module, shape: tuple[int, ...]) -> list[Tensor]:
    """An input, and as many extra inputs as the module takes, of plain numbers."""
    count = 1 + sum(isinstance(op, Add) for op in module.children())
    return [torch.full(shape, float(k + 1), requires_grad=True) for k in range(count)]


def outputs_of(y: Any) -> tuple[Tensor, ...]:
    return y if isinstance(y, tuple) else (y,)


@shapes
@pytest.mark.parametrize("double", [False, True], ids=["planned", "double_backward"])
@pytest.mark.parametrize("name", PASSING)
def test_gradients_are_the_callers_own(name: str, double: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module = PASSING[name](double_backward=double)
    inputs = leaves(module, shape)
    found = []
    for times in (1, 2):
        outputs = outputs_of(module(*inputs))
        given = [torch.ones_like(y) for y in outputs]
        torch.autograd.backward(outputs, given)
        gradients = [t.grad for t in (*inputs, *module.parameters()) if t.grad is not None]
        memory = [t.untyped_storage().data_ptr() for t in (*gradients, *given)]
        assert len(set(memory)) == len(memory), f"shared after {times}"
        assert all(bool((dy == 1).all()) for dy in given)
        found.append([gradient.clone() for gradient in gradients])
    for once, twice in zip(*found, strict=True):
        torch.testing.assert_close(twice, 2 * once)


CHANGED: dict[str, Callable[[], og.Sequential]] = {
    "mlp": lambda: og.Sequential(RMSNorm(6), Linear(6, 8), SwiGLU(), Linear(4, 6)),
    "relu": lambda: og.Sequential(ReLU()),
    "gelu": lambda: og.Sequential(Linear(6, 6), GELU()),
    "norm": lambda: og.Sequential(LayerNorm(6)),
    "wide": lambda: og.Sequential(Linear(6, 64)),
    "identity": lambda: og.Sequential(Identity(), Dropout(0.0)),
    "dropout": lambda: og.Sequential(Linear(6, 6), Dropout(0.0)),
    "view of its own memory": lambda: og.Sequential(Turned()),
    "frozen": lambda: og.Sequential(Linear(6, 6)).requires_grad_(False),
}


@shapes
@pytest.mark.parametrize("name", CHANGED)
def test_an_output_can_be_changed_in_place(name: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    module, x = CHANGED[name](), torch.randn(shape, requires_grad=True)
    more = torch.randn(*shape[:-1], module(x).shape[-1], requires_grad=True)

    def run(change: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        y = change(module(x * 1))
        yield y
        yield from torch.autograd.grad(y.square().sum(), (x, more))

    def in_place(y: Tensor) -> Tensor:
        y += more
        y.mul_(3)
        y[..., 0] = 0
        return y.unsqueeze_(0)

    def anew(y: Tensor) -> Tensor:
        y = (y + more) * 3
        return torch.cat((torch.zeros_like(y[..., :1]), y[..., 1:]), -1).unsqueeze(0)

    for one, other in zip(run(in_place), run(anew), strict=True):
        torch.testing.assert_close(one, other)


@shapes
def test_an_output_made_without_gradients_can_take_one_in_place(shape: tuple[int, ...]) -> None:
    module, x = CHANGED["mlp"](), torch.randn(shape)
    with torch.no_grad():
        y, expected = module(x), module(x)
    more = torch.ones(shape, requires_grad=True)
    y += more
    y.sum().backward()
    assert torch.equal(y, expected + 1)
    assert torch.equal(more.grad, torch.ones(shape))


@shapes
@pytest.mark.parametrize("op", [Exp, Hidden])
def test_a_change_of_what_was_saved_is_noticed(op: type[og.Op], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    for module in (og.Sequential(op()), og.Sequential(Linear(6, 6), op())):
        module(x).sum().backward()
        y = module(x)
        y += 1
        with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
            y.sum().backward()


@shapes
def test_extra_outputs_can_be_changed_or_the_change_is_noticed(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    read_later = og.Sequential(Linear(6, 6), Tee(), RMSNorm(6))
    y, extra = read_later(x)
    extra += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + extra.sum()).backward()
    used_no_more = og.Sequential(Linear(6, 6), Tee(), ConstantScale(2.0))
    found = []
    for in_place in (True, False):
        y, extra = used_no_more(x)
        extra = extra.mul_(3) if in_place else extra * 3
        found.append(torch.autograd.grad(y.sum() + extra.square().sum(), x)[0])
    torch.testing.assert_close(*found)


@shapes
@pytest.mark.parametrize(
    "module",
    [og.Sequential(Tee(), Linear(6, 6)), og.Sequential(Linear(6, 6), Tee()), og.Sequential(Same())],
    ids=["input", "twice the output", "returned input"],
)
def test_what_somebody_else_has_too_is_not_changed_in_place(
    module: og.Sequential, shape: tuple[int, ...]
) -> None:
    x = torch.randn(shape, requires_grad=True)
    for output in outputs_of(module(x * 1))[-1:]:
        with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
            output += 1


def test_a_sequence_that_does_nothing_returns_its_input() -> None:
    for name in ("identity", "scaled by 1", "dropout of 0", "dropout in evaluation"):
        module, x = PASSING[name](), torch.randn(2, 3, 6, requires_grad=True)
        assert module(x) is x
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), x)


@pytest.mark.parametrize("module", [GELU(), RMSNorm(0), og.Sequential(Add(), ReLU())], ids=repr)
def test_no_columns_and_no_rows_in_any_number_of_dimensions(module: nn.Module) -> None:
    width = 0 if isinstance(module, RMSNorm) else None
    for shape in [(0,), (2, 0), (2, 3, 0), (0, 3, 0), (2, 0, 3), (0, 3), (2, 1, 0, 4, 3)]:
        if shape[-1] != 0 and width == 0:
            continue
        inputs = [torch.randn(shape, requires_grad=True) for _ in range(2)]
        inputs = inputs[: 2 if isinstance(module, og.Sequential) else 1]
        y = module(*inputs)
        y.sum().backward()
        assert y.shape == shape
        assert all(x.grad.shape == shape for x in inputs)
        with torch.no_grad():
            assert module(*inputs).shape == shape


def test_an_input_made_in_inference_mode_trains_the_weights() -> None:
    torch.manual_seed(0)
    module = og.LayerNormMLP(6, 8, device="cpu")
    with torch.inference_mode():
        x = torch.randn(2, 3, 6)
    found = []
    for given in (x, torch.tensor(x.tolist())):
        module.zero_grad()
        module(given).square().sum().backward()
        found.append([p.grad.clone() for p in module.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def dropped(x: Tensor) -> Tensor:
    """Where a Dropout of ones has left something."""
    return x.detach() != 0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_dropout_draws_once_for_each_call_under_torch_compile(backend: str) -> None:
    module, x = og.Sequential(Linear(8, 8), Dropout(0.5)), torch.ones(16, 8, requires_grad=True)
    run = partial(torch.compile, backend=backend, fullgraph=True)

    def twice(x: Tensor) -> tuple[Tensor, Tensor]:
        return module(x), module(x)

    def again(x: Tensor) -> Tensor:
        made: Tensor = checkpoint(lambda x: module(x).square(), x, use_reentrant=False)
        return made

    first, second = run(twice)(x)
    assert not torch.equal(dropped(first), dropped(second))
    y = run(again)(x)
    found = torch.autograd.grad(y.sum(), (x, *module.parameters()))
    plain = nn.functional.linear(x, module[0].weight, module[0].bias) * dropped(y) * 2
    expected = torch.autograd.grad(plain.square().sum(), (x, *module.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_what_draws_nothing_stays_one_call_for_a_compiler() -> None:
    found: list[list[str]] = []

    def look(graph: Any, _: Any) -> Any:
        found.append([str(n.target) for n in graph.graph.nodes if "opsgraph" in str(n.target)])
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=look, partition_fn=min_cut_rematerialization_partition)
    for module in (og.Sequential(Linear(6, 6)), og.Sequential(Linear(6, 6), Dropout(0.5))):
        x = torch.randn(2, 6, requires_grad=True)
        torch.compile(lambda x, m=module: m(x) + m(x), backend=backend, fullgraph=True)(x)
    assert found == [["opsgraph.forward.default"], 2 * ["opsgraph.forward_random.default"]]
