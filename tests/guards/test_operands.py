"""Operands of passes: what is not what the plan was made for raises, and what has no memory does.

Every case in Python and replayed: at the first call, at the second, which is recorded, at the
fourth, which is replayed, and with replays off.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from fractions import Fraction
from typing import Any

import pytest
import torch
from replays import compare, random, replaying
from torch import Tensor, nn

import opsgraph as og
from opsgraph.base.errors import OpError
from opsgraph.guards.operands import Operand, Operands
from opsgraph.ops import GELU, Add, Bias, LayerNorm, Linear, RMSNorm, SwiGLU, Tee

WIDTH, ROWS = 16, 6
CPU = torch.device("cpu")


@pytest.fixture(params=[0, 1, 3, "in Python"])
def calls(request: Any) -> Iterator[int]:
    """How many calls there were before."""
    with replaying(request.param != "in Python"):
        yield 2 if request.param == "in Python" else request.param


def _module(calls: int, make: Callable[[], Any] | None = None) -> Any:
    torch.manual_seed(0)
    layers = RMSNorm(WIDTH), Linear(WIDTH, 2 * WIDTH), SwiGLU(), Linear(WIDTH, WIDTH)
    module = og.Sequential(*layers) if make is None else make()
    for _ in range(calls):
        _step(module)
    return module


def _step(module: Any, between: Any = None, x: Tensor | None = None, context: Any = None) -> None:
    x = random(ROWS, WIDTH).requires_grad_() if x is None else x
    with context or nullcontext():
        y = module(x)
    if between is not None:
        between(module)
    y.backward(random(*y.shape, seed=4))


def _shortened(name: str) -> Callable[[nn.Module], None]:
    def shorten(module: nn.Module) -> None:
        parameter = module.get_parameter(name)
        parameter.data = parameter.data[: WIDTH // 2].clone()

    return shorten


def _freed(name: str, size: int = 0) -> Callable[[nn.Module], None]:
    return lambda module: module.get_parameter(name).untyped_storage().resize_(size)


@pytest.mark.parametrize("name, op", [("0.weight", "0:RMSNorm"), ("1.bias", r"1:Linear\+2:SwiGLU")])
def test_a_parameter_shortened_between_the_passes(calls: int, name: str, op: str) -> None:
    module = _module(calls)
    pattern = rf"{op}.*: got float32 \[8\] for \w+ in its backward, expected float32 \[\d+\] on cpu"
    with pytest.raises(OpError, match=pattern):
        _step(module, _shortened(name))


@pytest.mark.parametrize("name", ["layer_norm_weight", "layer_norm_bias", "fc1_weight"])
def test_one_of_layernorm_mlp(calls: int, name: str) -> None:
    module = _module(calls, lambda: og.LayerNormMLP(WIDTH, 32, activation="swiglu", device="cpu"))
    with pytest.raises(OpError, match=r"got float32 \[8.*\] for .* in its backward"):
        _step(module, _shortened(name))


def test_one_that_an_op_borrows(calls: int) -> None:
    norm, layer = LayerNorm(WIDTH), Linear(WIDTH, WIDTH)
    holder = nn.Module()
    holder.scale, holder.shift = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))
    norm.borrow(holder, weight="scale", bias="shift")
    module = _module(calls, lambda: og.Sequential(norm, layer))
    with pytest.raises(OpError, match=r"0:LayerNorm.*: got float32 \[8\] for weight0"):
        _step(module, lambda _: _shortened("scale")(holder))


def test_shorter_ones_of_functional_call_and_extra_inputs(calls: int) -> None:
    module = _module(calls)
    other = {"0.weight": torch.ones(WIDTH // 2)}
    with pytest.raises(OpError, match=r"0:RMSNorm: got weight of shape \(8,\), expected \(16,\)"):
        torch.func.functional_call(module, other, (random(ROWS, WIDTH),))
    added = og.Sequential(Linear(WIDTH, WIDTH), Add())
    with pytest.raises(OpError, match=r"1:Add: got other of shape \(3, 16\), expected \(6, 16\)"):
        added(random(ROWS, WIDTH), random(3, WIDTH))


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "3.bias"])
def test_a_parameter_whose_storage_was_freed(calls: int, name: str) -> None:
    module = _module(calls)
    _freed(name)(module)
    pattern = r"(got a freed storage for \w+ in its forward|whose storage was freed)"
    with pytest.raises(og.OpsgraphError, match=pattern):
        _step(module)
    with torch.no_grad(), pytest.raises(og.OpsgraphError, match=pattern):
        module(random(ROWS, WIDTH))


def test_storages_that_were_freed_between_the_passes_or_are_an_inputs(calls: int) -> None:
    module = _module(calls)
    with pytest.raises(og.OpsgraphError, match="freed"):
        _step(module, _freed("0.weight"))
    x = random(ROWS, WIDTH)
    x.untyped_storage().resize_(0)
    with pytest.raises(og.OpsgraphError, match="freed"):
        _module(calls)(x)


@pytest.mark.parametrize("name", ["0.weight", "1.weight", "3.bias"])
def test_a_storage_that_was_cut(calls: int, name: str) -> None:
    """In the forward and in the backward, where the layout is one that was seen before."""
    module = _module(calls)
    needed = module.get_parameter(name).untyped_storage().nbytes()
    pattern = rf"got a storage of 16 bytes where {needed} are needed for \w+ in its forward"
    kept = module.get_parameter(name).detach().clone()
    _freed(name, 16)(module)
    with pytest.raises(OpError, match=pattern):
        _step(module)
    with torch.no_grad(), pytest.raises(OpError, match=pattern):
        module(random(ROWS, WIDTH))
    _freed(name, needed)(module)
    with torch.no_grad():
        module.get_parameter(name).copy_(kept)
    _step(module)


def test_a_view_into_a_storage_that_was_cut(calls: int) -> None:
    module = _module(calls)
    for start in (0, WIDTH):
        x = random(ROWS, 2 * WIDTH)[:, start : start + WIDTH]
        module(x)
        x.untyped_storage().resize_(4 * WIDTH * ROWS)
        with pytest.raises(OpError, match=r"0:RMSNorm: got a storage of 384 bytes where .* for x0"):
            module(x)


def test_a_storage_that_was_cut_between_the_passes(calls: int) -> None:
    module = _module(calls)
    with pytest.raises(OpError, match="got a storage of 16 bytes where 64 are needed for weight0"):
        _step(module, _freed("0.weight", 16))


def test_zeros_that_pytorch_does_not_store(calls: int) -> None:
    module, like = _module(calls), random(ROWS, WIDTH) * 0
    zeros = torch._efficientzerotensor((ROWS, WIDTH))
    with torch.no_grad():
        assert torch.equal(module(zeros), module(like))
    found = []
    for dy in (zeros, like):
        module.zero_grad()
        module(random(ROWS, WIDTH)).backward(dy)
        found.append([p.grad for p in module.parameters()])
    assert all(map(torch.equal, *found))
    _step(module, x=zeros)


def test_values_that_pytorch_stores_negated() -> None:
    def use(module: Any) -> list[Any]:
        whole = torch.complex(random(ROWS, WIDTH), random(ROWS, WIDTH, seed=5))
        results: list[Any] = []
        for _ in range(4):
            for x in (whole.conj().imag, torch._neg_view(whole.imag.contiguous())):
                plain = x.resolve_neg().clone()
                assert x.is_neg()
                assert not plain.is_neg()
                y, leaf = module(x), plain.requires_grad_()
                assert torch.equal(y, module(plain))
                first, second = (
                    torch.autograd.grad(module(leaf), leaf, dy)[0] for dy in (x, plain.detach())
                )
                assert torch.equal(first, second)
                results += [y, first]
        return results

    for layers in ([RMSNorm(WIDTH), Linear(WIDTH, WIDTH)], [GELU()]):
        compare(lambda layers=layers: _module(0, lambda: og.Sequential(*layers)), use)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "shape": lambda t: t.flatten()[:2].clone(),
    "dtype": lambda t: t.double(),
    "device": lambda t: t.to("meta"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_hooks_unpack_is_another_tensor(calls: int, change: str) -> None:
    module = _module(calls)
    packed: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        _step(module)
    assert packed
    for changed in range(len(packed)):
        order = iter(range(len(packed)))

        def unpack(t: Tensor, changed: int = changed, order: Iterator[int] = order) -> Tensor:
            return CHANGES[change](t) if next(order) == changed else t

        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack)
        with pytest.raises(OpError, match=r"for .* in its backward, expected float32"):
            _step(module, context=hooks)


def test_what_hooks_unpack_may_lie_in_another_way(calls: int) -> None:
    def restrided(t: Tensor) -> Tensor:
        return torch.stack((t, t), -1)[..., 0]

    found = []
    for unpack in (restrided, lambda t: t):
        module = _module(calls)
        module.zero_grad()
        _step(module, context=torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack))
        found.append([p.grad for p in module.parameters()])
    assert all(map(torch.equal, *found))


def test_a_parameter_that_is_replaced_between_the_passes(calls: int) -> None:
    """The backward is that of the parameter which the forward read."""

    def replace(module: Any) -> None:
        module[0].weight = nn.Parameter(torch.full((WIDTH,), 2.0))

    found = []
    for between in (replace, None):
        module = _module(calls)
        module.zero_grad()
        x = random(ROWS, WIDTH).requires_grad_()
        _step(module, between, x)
        found.append(x.grad)
    assert torch.equal(*found)


class Chosen(og.Op):
    """Saves as many numbers as there are rows with a positive first one: none that it could say."""

    saves = ("rows",)

    def out(self, x: og.Spec) -> og.Spec:
        return x

    def saved(self, x: og.Spec) -> dict[str, og.Spec]:
        return {"rows": og.Spec((1,), torch.int64, x.device)}

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
        rows = (x[:, 0] > 0).nonzero()[:, 0]
        return x.index_fill(0, rows, 0.0), (rows,)

    def bwd(self, dy: Tensor, rows: Tensor) -> tuple[Tensor, tuple[()]]:
        return dy.index_fill(0, rows, 0.0), ()


def test_what_a_users_op_alone_reads_is_left_to_it(calls: int) -> None:
    module = _module(calls, lambda: og.Sequential(RMSNorm(WIDTH), Chosen()))
    x = random(ROWS, WIDTH).requires_grad_()
    _step(module, x=x)
    assert torch.equal(x.grad == 0, (x[:, :1] > 0).expand_as(x))


class Wide(og.Op):
    """Makes more columns than it says."""

    def out(self, x: og.Spec) -> og.Spec:
        return x

    def fwd(self, x: Tensor) -> tuple[Tensor, tuple[()]]:
        return torch.cat((x, x), 1), ()


@pytest.mark.parametrize("rest", [[RMSNorm(WIDTH)], [LayerNorm(WIDTH)], [Bias(WIDTH), GELU()]])
def test_kernels_do_not_read_past_what_an_op_makes_too_wide(rest: list[Any]) -> None:
    module = og.Sequential(Wide(), *rest)
    pattern = r"step 1.*: got an operand of shape \(16,\), expected 32 elements, one for each"
    with torch.no_grad(), pytest.raises(OpError, match=pattern):
        module(random(ROWS, WIDTH))


def test_rows_and_groups_of_rows() -> None:
    expected = [
        Operand("0:A", "x", (-1, 4), torch.float32, CPU),
        None,
        Operand("1:B", "scales", (-3, 2), torch.float32, CPU),
        Operand("2:C", "gathered", (-1, 4), torch.float32, CPU, Fraction(2)),
    ]
    operands = Operands("forward", expected)
    given = [torch.ones(7, 4), torch.ones(1), torch.ones(3, 2), torch.ones(14, 4)]
    operands.verify(given)
    for k, wrong, text in (
        (0, torch.ones(7, 5), r"0:A: got float32 \[7, 5\] for x in its forward, .*\[7, 4\]"),
        (2, torch.ones(2, 2), r"1:B: got float32 \[2, 2\] for scales in .*\[3, 2\]"),
        (3, torch.ones(7, 4), r"2:C: got float32 \[7, 4\] for gathered in .*\[14, 4\]"),
        (3, torch.ones(14, 4, dtype=torch.bfloat16), r"got bfloat16 \[14, 4\]"),
    ):
        with pytest.raises(OpError, match=text):
            operands.verify([*given[:k], wrong, *given[k + 1 :]])


def test_rows_that_the_first_operand_has_for_each_of_the_pass() -> None:
    gathered = Operand("0:A", "gathered", (-1, 4), torch.float32, CPU, Fraction(2))
    operands = Operands("backward", [gathered, Operand("1:B", "x", (-1, 2), torch.float32, CPU)])
    operands.verify([torch.ones(14, 4), torch.ones(7, 2)])
    with pytest.raises(OpError, match=r"got float32 \[14, 2\] for x .*\[7, 2\]"):
        operands.verify([torch.ones(14, 4), torch.ones(14, 2)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_main_grad_whose_storage_was_freed(calls: int, dtype: torch.dtype) -> None:
    layer = Linear(WIDTH, WIDTH, accumulate_into_main_grad=True, dtype=dtype)
    module, x = og.Sequential(layer), random(ROWS, WIDTH, dtype=dtype)
    for _ in range(calls):
        layer.weight.main_grad = torch.zeros(WIDTH, WIDTH)
        module(x).sum().backward()
    layer.weight.main_grad = torch.zeros(WIDTH, WIDTH)
    y = module(x)
    layer.weight.main_grad.untyped_storage().resize_(0)
    with pytest.raises(og.OpsgraphError, match="got a main_grad with a freed storage"):
        y.sum().backward()


def test_a_residual_and_its_gradient(calls: int) -> None:
    """Values with several readers: each is checked by the first of them."""
    make = lambda: og.Sequential(Tee("r"), RMSNorm(WIDTH), Linear(WIDTH, WIDTH), Add("r"))  # noqa: E731
    module = _module(calls, make)
    with pytest.raises(OpError, match=r"1:RMSNorm.*for weight1 in its backward"):
        _step(module, _shortened("1.weight"))
