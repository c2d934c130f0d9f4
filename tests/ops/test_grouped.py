"""GroupedLinear: names of parameters, split sizes, gradients that go elsewhere."""

import contextlib
import copy
import io
import pickle
from typing import Any

import pytest
import torch
from recipe_cases import RECIPES
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import GroupedLinear, RMSNorm, ScaledSwiGLU, TransposedGroupedLinear
from opsgraph.ops.joined import in_a_row as lie_in_a_row

SIZES = torch.tensor([2, 0, 3])


def layer(**options: Any) -> Any:
    torch.manual_seed(0)
    return GroupedLinear(3, 4, 6, device="cpu", **options)


def expected(op: Any, x: Tensor, sizes: list[int]) -> Tensor:
    """By the parameters' names, in plain PyTorch."""
    pieces = zip(range(3), x.split(sizes), strict=True)
    return torch.cat(
        [nn.functional.linear(p, getattr(op, f"weight{g}"), getattr(op, f"bias{g}", None))
         for g, p in pieces]
    )  # fmt: skip


def in_a_row(op: Any) -> bool:
    return lie_in_a_row([getattr(op, f"weight{g}") for g in range(3)])


# -- parameters --


def test_parameters_and_keys_are_named_by_group() -> None:
    names = [f"weight{g}" for g in range(3)] + [f"bias{g}" for g in range(3)]
    assert [n for n, _ in layer().named_parameters()] == names
    assert list(layer().state_dict()) == names
    assert list(layer(bias=False).state_dict()) == names[:3]
    assert layer(bias=False).bias is None
    assert layer().weight.shape == (3, 6, 4)


def test_gradients_of_each_group() -> None:
    op, x = layer(), torch.randn(5, 4)
    plain = copy.deepcopy(op)
    op(x, SIZES).square().sum().backward()
    expected(plain, x, [2, 0, 3]).square().sum().backward()
    for (name, one), other in zip(op.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)
    assert torch.equal(op.weight.grad[2], op.weight2.grad)


def test_parameters_of_whole_groups_still_load_and_can_be_set() -> None:
    op, weight, bias = layer(), torch.randn(3, 6, 4), torch.randn(3, 6)
    op.load_state_dict({"weight": weight, "bias": bias})
    assert torch.equal(op.weight1, weight[1])
    assert torch.equal(op.bias2, bias[2])
    op.weight = nn.Parameter(2 * weight)
    op.bias = None
    assert torch.equal(op.weight0, 2 * weight[0])
    assert in_a_row(op)
    x = torch.randn(5, 4)
    torch.testing.assert_close(op(x, SIZES), expected(op, x, [2, 0, 3]))
    with pytest.raises(og.OpError, match=r"got weight of shape \(2, 6, 4\), expected 3 groups"):
        op.weight = nn.Parameter(weight[:2])


def test_a_group_whose_memory_is_laid_out_otherwise_is_looked_at_again() -> None:
    """In the same place: of another shape it is an error, and a transposed one is read as such."""
    op, x, sizes = GroupedLinear(2, 4, 4, bias=False), torch.randn(5, 4), torch.tensor([2, 3])
    module = og.Sequential(op)
    for _ in range(3):
        module(x, sizes)
    whole = op.weight1.data
    op.weight1.data = whole.t()
    torch.testing.assert_close(module(x, sizes)[2:], x[2:] @ whole)
    op.weight1.data = whole[:2]
    with pytest.raises(og.OpError, match=r"got weight1 of shape \(2, 4\), expected \(4, 4\)"):
        module(x, sizes)


def test_kernels_read_parameters_without_a_copy_wherever_they_went() -> None:
    op, file = layer(), io.BytesIO()
    assert in_a_row(op)
    first = op.weight0
    for made in (
        op.double(), copy.deepcopy(op), pickle.loads(pickle.dumps(op)),
        layer().to_empty(device="cpu"), GroupedLinear(3, 4, out_features=6),
    ):  # fmt: skip
        assert in_a_row(made)
    assert op.weight0 is first
    torch.save(op.state_dict(), file)
    assert file.tell() < 8000
    lazy = og.Sequential(GroupedLinear(3, out_features=6), RMSNorm(6))
    lazy(torch.randn(5, 4), SIZES)
    assert in_a_row(lazy[0])


def test_parameters_that_lie_elsewhere_are_right_too() -> None:
    op, x = layer(), torch.randn(5, 4)
    op(x, SIZES)
    state = {name: 2 * value for name, value in op.state_dict().items()}
    op.load_state_dict(state, assign=True)
    assert not in_a_row(op)
    torch.testing.assert_close(op(x, SIZES), expected(op, x, [2, 0, 3]))
    op.weight1.requires_grad_(False)
    y = op(x, SIZES)
    with torch.no_grad():
        torch.testing.assert_close(op(x, SIZES), y)
    y.sum().backward()
    assert op.weight1.grad is None
    assert op.weight2.grad is not None


def test_a_parameter_that_is_modified_in_between_is_an_error() -> None:
    op = layer()
    y = op(torch.randn(5, 4), SIZES)
    with torch.no_grad():
        op.weight2.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_can_be_differentiated_again() -> None:
    op, x = og.Sequential(layer(), double_backward=True), torch.randn(5, 4, dtype=torch.double)
    op.double()
    weights = list(op.parameters())[:3]

    def loss(*given: Tensor) -> Tensor:
        return torch.func.functional_call(op, dict(zip(names, given, strict=True)), (x, SIZES))

    names = [n for n, _ in op.named_parameters()][:3]
    assert torch.autograd.gradgradcheck(loss, tuple(w.detach().requires_grad_() for w in weights))
    y = op(x, SIZES).square().sum()
    first = torch.autograd.grad(y, weights, create_graph=True)
    assert all(g is not None for g in torch.autograd.grad(sum(g.sum() for g in first), weights))


def test_compiled() -> None:
    op, x = og.Sequential(layer()), torch.randn(5, 4)
    op(x, SIZES).square().sum().backward()
    eager = [p.grad.clone() for p in op.parameters()]
    op.zero_grad()
    torch.compile(op, backend="aot_eager", fullgraph=True)(x, SIZES).square().sum().backward()
    for one, parameter in zip(eager, op.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, one)


def test_lists_that_change_are_compiled_too() -> None:
    """Dynamo has symbols in the place of numbers that change."""
    module = og.Sequential(GroupedLinear(3, 8, 8), GroupedLinear(3, 8, 8, False))
    compiled: Any = torch.compile(module, backend="eager", fullgraph=True)
    for sizes in ([3, 0, 5], [4, 4, 0], [2, 6, 7], (5, 2, 9)):
        x = torch.randn(sum(sizes), 8)
        assert torch.equal(compiled(x, sizes, sizes), module(x, sizes, sizes))
    with pytest.raises(og.OpError, match=r"split_sizes \[4, 5, 9\], expected .* add to 16"):
        compiled(torch.randn(16, 8), [4, 5, 9], [4, 5, 7])


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("kind", [GroupedLinear, TransposedGroupedLinear])
def test_a_weight_that_is_gone_is_named_with_the_op(
    kind: type[GroupedLinear], single: bool
) -> None:
    op: Any = kind(2, 4, 6, single_grouped_weight=single)
    op.weight = None
    shape = r"\(2, 6, 4\)" if kind is GroupedLinear else r"\(2, 4, 6\)"
    message = f"0:{kind.__name__}: got weight=None, expected a parameter of shape {shape}"
    with pytest.raises(og.OpError, match=message):
        og.Sequential(op)(torch.ones(3, 4), [1, 2])
    if not single:
        op = kind(2, 4, 6)
        op.weight1 = None
        with pytest.raises(og.OpError, match=f"^{kind.__name__}: got weight of groups .0. alone"):
            og.Sequential(op)(torch.ones(3, 4), [1, 2])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.torch.jit.trace:")
@pytest.mark.parametrize("how", ["trace", "export", "strict export"])
def test_a_recorded_graph_is_for_other_sizes_too(how: str) -> None:
    """It had the sizes of the example, or was an error of torch.export's."""
    module = og.Sequential(
        GroupedLinear(3, 4, 6), TransposedGroupedLinear(3, 6, 4, single_grouped_weight=True)
    )
    x, sizes = torch.randn(5, 4), torch.tensor([1, 2, 2])
    graph: Any
    if how == "trace":
        graph = torch.jit.trace(module, (x, sizes, sizes.clone()))
    else:
        rows = {0: torch.export.Dim("rows")}
        graph = torch.export.export(
            module, (x, sizes, sizes.clone()), strict=how == "strict export",
            dynamic_shapes=(rows, (None, None)),
        ).module()  # fmt: skip
    for other in ([5, 0, 0], [0, 0, 5], [2, 1, 2], [3, 0, 4]):
        x, sizes = torch.randn(sum(other), 4), torch.tensor(other)
        x[-1] = float("inf")  # which is none of the others' rows
        mine, own = (x.clone().requires_grad_() for _ in range(2))
        y, expected = graph(mine, sizes, sizes), module(own, sizes, sizes)
        torch.testing.assert_close(y, expected, equal_nan=True)
        if how == "trace":
            weight = module[0].weight0
            found = torch.autograd.grad(y.sum(), [mine, weight])
            right = torch.autograd.grad(expected.sum(), [own, weight])
            torch.testing.assert_close(found, right, equal_nan=True)


# -- split sizes --


@pytest.mark.parametrize("kind", [list, tuple, torch.int32, torch.uint8, torch.int64, "numpy"])
def test_integers_of_any_kind_are_split_sizes(kind: Any) -> None:
    op, x = og.Sequential(RMSNorm(4), layer()), torch.randn(5, 4)
    sizes: Any = SIZES.to(kind) if isinstance(kind, torch.dtype) else SIZES.tolist()
    sizes = SIZES.numpy() if kind == "numpy" else kind(sizes) if callable(kind) else sizes
    assert torch.equal(op(x, sizes), op(x, SIZES))


@pytest.mark.parametrize(
    "sizes, message",
    [
        (None, "got split_sizes None, expected 3 integers"),
        ([2, 3], r"got 2 split_sizes \[2, 3\], expected 3 integers"),
        ([2.0, 0, 3], r"got split_sizes \[2.0, 0, 3\], expected 3 integers"),
        ([True, 1, 3], "expected 3 integers"),
        ("203", "got split_sizes '203'"),
        (5, "got split_sizes 5"),
        ([2, 0, 4], r"got split_sizes \[2, 0, 4\], expected sizes that add to 5"),
        ([6, -1, 0], r"got split_sizes \[6, -1, 0\], expected sizes that add to 5"),
        (torch.tensor([2.0, 0.0, 3.0]), r"float32 of shape \(3,\), expected integers of shape"),
        (torch.tensor([2, 0, 3, 0]), r"int64 of shape \(4,\), expected integers of shape \(3,\)"),
        (torch.tensor([[2, 0, 3]]), r"int64 of shape \(1, 3\)"),
        (torch.tensor([True, False, True]), "bool of shape"),
        (torch.tensor([2, 0, 4]), r"got split_sizes \[2, 0, 4\], expected sizes that add to 5"),
    ],
)
def test_wrong_split_sizes_are_named_with_the_op(sizes: Any, message: str) -> None:
    for grad in (True, False):
        module = og.Sequential(RMSNorm(4), layer())
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(og.OpError, match=f"^1:GroupedLinear: .*{message.removeprefix('got ')}"),
        ):
            module(torch.randn(5, 4), sizes)


# -- gradients that go elsewhere --


def mlp(backends: Any, **options: Any) -> og.Sequential:
    torch.manual_seed(0)
    ops = GroupedLinear(3, 8, 16, **options), ScaledSwiGLU(), GroupedLinear(3, 8, 8, **options)
    return og.Sequential(*ops, device="cpu", backends=backends)


def run(module: Any, recipe: Any = None) -> None:
    torch.manual_seed(1)
    x, scales = torch.randn(5, 8), torch.rand(5)
    with og.autocast(recipe=recipe) if recipe else contextlib.nullcontext():
        y = module(x, SIZES, scales, SIZES)
    y.square().sum().backward()


@pytest.mark.parametrize("backends", [None, ("reference",)])
def test_main_grad_and_delay(backends: Any) -> None:
    plain = mlp(backends)
    run(plain)
    late = mlp(backends, delay_wgrad_compute=True)
    run(late)
    fused = mlp(backends, accumulate_into_main_grad=True)
    both = mlp(backends, accumulate_into_main_grad=True, delay_wgrad_compute=True)
    weights = [n for n, _ in plain.named_parameters() if "weight" in n]
    for name in weights:
        assert late.get_parameter(name).grad is None
        assert late.get_parameter(name).skip_backward_post_hook
        for module in (fused, both):
            weight: Any = module.get_parameter(name)
            weight.main_grad = torch.ones_like(weight)
    told: list[int] = []
    late[0].register_wgrad_accumulation_and_reduce_hooks(lambda: told.append(0))
    for op in (late[2], late[0]):
        op.backward_dw()
    assert told == [0]
    for module in (fused, both):
        run(module)
    both.backward_dw()
    assert not both.queued_backward_dw()
    for name, parameter in plain.named_parameters():
        assert torch.equal(late.get_parameter(name).grad, parameter.grad), name
        for module in (fused, both):
            other: Any = module.get_parameter(name)
            found = other.main_grad - 1 if name in weights else other.grad
            torch.testing.assert_close(found, parameter.grad, msg=name)
            assert name not in weights or other.grad is None


@pytest.mark.parametrize("name", ["current", "rows", "mx", "high precision", "dequantized"])
def test_recipes(name: str) -> None:
    results = []
    for options in ({}, {"delay_wgrad_compute": True}, {"accumulate_into_main_grad": True}):
        torch.manual_seed(0)
        op: Any = GroupedLinear(2, 32, 32, **options)
        for g in range(2):
            op.get_parameter(f"weight{g}").main_grad = torch.zeros(32, 32)
        x = torch.randn(64, 32)
        with og.autocast(recipe=RECIPES[name]):
            y = op(x, [32, 32])
        y.square().sum().backward()
        if "delay_wgrad_compute" in options:
            op.backward_dw()
        gradient = "main_grad" if "accumulate_into_main_grad" in options else "grad"
        results.append([getattr(op.get_parameter(f"weight{g}"), gradient) for g in range(2)])
    for plain, late, fused in zip(*results, strict=True):
        assert torch.equal(plain, late)
        torch.testing.assert_close(plain, fused)


def test_a_dummy_where_it_is_asked_for() -> None:
    op = layer(accumulate_into_main_grad=True)
    for g in range(3):
        weight = getattr(op, f"weight{g}")
        weight.main_grad = torch.zeros_like(weight)
        weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, True
    op(torch.randn(5, 4), SIZES).sum().backward()
    assert op.weight2.grad_added_to_main_grad is True
    assert not op.weight2.grad.any()
    assert op.weight2.main_grad.any()


def test_modules_do_not_mind_the_default_device() -> None:
    grouped, x = og.Sequential(GroupedLinear(2, 32, 32)), torch.randn(6, 32)
    linear = og.Sequential(og.ops.Linear(32, 32))
    recipe = og.recipe.DelayedScaling()
    expected = grouped(x, [2, 4])
    with torch.device("meta"):
        assert torch.equal(grouped(x, [2, 4]), expected)
        with og.autocast(recipe=recipe):
            linear(x).sum().backward()
    assert linear[0].weight.grad.device.type == "cpu"
