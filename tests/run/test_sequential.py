"""The module's structure: list protocol, plain modules inside, sizes, state dicts, copies."""

import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import Case, check
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import (
    GELU,
    Add,
    BasicLinear,
    Bias,
    Identity,
    LayerNorm,
    Linear,
    Residual,
    RMSNorm,
    SiLU,
    SwiGLU,
    Tee,
)

# -- the list protocol: every edit does to both kinds of Sequential the same --


def delete(module: nn.Sequential, index: Any) -> None:
    del module[index]


def put(module: nn.Sequential, index: int, new: nn.Module) -> None:
    module[index] = new


def add_in_place(module: nn.Sequential, other: nn.Sequential) -> None:
    module += other


def times_in_place(module: nn.Sequential, count: int) -> None:
    module *= count


def by_name(module: nn.Sequential, name: str, new: nn.Module) -> None:
    setattr(module, name, new)


Make = Callable[[], nn.Module]
EDITS: dict[str, Callable[[nn.Sequential, Make, type], Any]] = {
    "nothing": lambda m, new, kind: None,
    "index": lambda m, new, kind: m[1],
    "negative index": lambda m, new, kind: m[-1],
    "index past the end": lambda m, new, kind: m[3],
    "slice": lambda m, new, kind: m[1:],
    "slice with a step": lambda m, new, kind: m[::2],
    "negative slice": lambda m, new, kind: m[-2:],
    "empty slice": lambda m, new, kind: m[2:1],
    "set": lambda m, new, kind: put(m, 1, new()),
    "set the last": lambda m, new, kind: put(m, -1, new()),
    "set past the end": lambda m, new, kind: put(m, 3, new()),
    "set by name": lambda m, new, kind: by_name(m, "1", new()),
    "delete": lambda m, new, kind: delete(m, 1),
    "delete the last": lambda m, new, kind: delete(m, -1),
    "delete a slice": lambda m, new, kind: delete(m, slice(0, 2)),
    "delete past the end": lambda m, new, kind: delete(m, 5),
    "append": lambda m, new, kind: m.append(new()),
    "extend": lambda m, new, kind: m.extend([new(), new()]),
    "insert": lambda m, new, kind: m.insert(1, new()),
    "insert at the end": lambda m, new, kind: m.insert(3, new()),
    "insert at -1": lambda m, new, kind: m.insert(-1, new()),
    "insert past the end": lambda m, new, kind: m.insert(9, new()),
    "pop": lambda m, new, kind: m.pop(1),
    "pop -1": lambda m, new, kind: m.pop(-1),
    "add": lambda m, new, kind: m + kind(new()),
    "add a list": lambda m, new, kind: m + [new()],
    "add in place": lambda m, new, kind: add_in_place(m, kind(new(), new())),
    "times": lambda m, new, kind: m * 2,
    "times from the left": lambda m, new, kind: 3 * m,
    "times 0": lambda m, new, kind: m * 0,
    "times a float": lambda m, new, kind: m * 1.5,
    "times in place": lambda m, new, kind: times_in_place(m, 2),
    "append what is no module": lambda m, new, kind: m.append("no"),
    "add_module": lambda m, new, kind: m.add_module("last", new()),
    "len": lambda m, new, kind: len(m),
    "names": lambda m, new, kind: [name for name, _ in m.named_children()],
}
STARTS: dict[str, Callable[[type, Make], nn.Sequential]] = {
    "positional": lambda kind, new: kind(new(), new(), new()),
    "OrderedDict": lambda kind, new: kind(
        OrderedDict((name, new()) for name in ("first", "second", "third"))
    ),
}


def shape_of(value: Any, ours: bool) -> Any:
    """What two results must have in common."""
    if isinstance(value, nn.Sequential):
        assert type(value) is (og.Sequential if ours else nn.Sequential)
        return list(value.state_dict())
    return "a module" if isinstance(value, nn.Module) else value


@pytest.mark.parametrize("start", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_edits_are_those_of_nn_sequential(edit: Any, start: Any) -> None:
    def told(kind: type, new: Make) -> tuple[Any, list[str], nn.Sequential]:
        module = start(kind, new)
        if kind is og.Sequential:
            module(torch.ones(1, 4))  # planned before the edit
        try:
            result = shape_of(edit(module, new, kind), kind is og.Sequential)
        except (IndexError, KeyError, TypeError, ValueError) as error:
            result = type(error)
        return result, list(module.state_dict()), module

    expected_result, expected_names, _ = told(nn.Sequential, lambda: nn.Linear(4, 4))
    result, names, module = told(og.Sequential, lambda: Linear(4, 4))
    assert (result, names) == (expected_result, expected_names)
    plain = nn.Sequential(*(nn.Linear(4, 4) for _ in module))
    weights = zip(plain.parameters(), module.state_dict().values(), strict=True)
    for other, weight in weights:
        other.data.copy_(weight)
    x = torch.randn(3, 4)
    torch.testing.assert_close(module(x), plain(x), msg="the edit was not seen by the plan")


def test_slices_and_sums_share_the_modules_and_keep_the_options() -> None:
    module = og.Sequential(Linear(4, 4), SiLU(), planner="optimal", backends=("reference",))
    for other in (module[:1], module + og.Sequential(SiLU()), module * 2):
        assert other[0] is module[0]
        plan = other.plan()
        assert {s.backend for s in plan.forward} == {"reference"}
        assert set(plan.costs) == {"greedy", "optimal"}


# -- plain modules between ops --


class Doubling(nn.Module):
    """Not an op."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


PLAIN: dict[str, Callable[[], list[nn.Module]]] = {
    "between": lambda: [Linear(6, 8), nn.Tanh(), SwiGLU()],
    "at both ends": lambda: [Doubling(), Linear(6, 8), Doubling()],
    "alone": lambda: [nn.Linear(6, 4), nn.Tanh()],
    "with parameters": lambda: [RMSNorm(6), nn.Linear(6, 6), SiLU(), nn.Linear(6, 2)],
    "residual across": lambda: [Tee("r"), SiLU(), nn.Linear(6, 6), Linear(6, 6), Add("r")],
    "residual read on both sides": lambda: [
        *[Tee("r"), SiLU(), Add("r"), nn.Linear(6, 6)],
        *[SiLU(), Add("r"), Doubling(), Add("r")],
    ],
    "two channels across": lambda: [
        *[Tee("a"), SiLU(), Tee("b"), Doubling(), Add("a"), Doubling(), Add("b")]
    ],
    "extra inputs and outputs": lambda: [
        *[Add("in"), Tee("out"), Doubling(), Add(), Tee(), Doubling(), Add("in 2"), Tee("last")]
    ],
    "a channel without a name": lambda: [Tee(""), SiLU(), Doubling(), Add("")],
    "output also read later": lambda: [Tee("r", True), SiLU(), Doubling(), Add("r")],
    "nested": lambda: [SiLU(), og.Sequential(Linear(6, 8), SwiGLU()), LayerNorm(4)],
}


@pytest.mark.parametrize("build", PLAIN.values(), ids=PLAIN)
def test_plain_modules_between_ops(build: Callable[[], list[nn.Module]]) -> None:
    if build is PLAIN["nested"]:
        torch.manual_seed(0)
        module, x = og.Sequential(*build()), torch.randn(5, 6)
        flat = og.Sequential(module[0], *module[1], module[2])
        assert torch.equal(module(x), flat(x))
    else:
        check(build, (5, 6), rounded=True, gemm=True)


def test_extra_inputs_are_counted_over_all_stages() -> None:
    module = og.Sequential(Add("a"), nn.Tanh(), Add("b"))
    with pytest.raises(og.OpError, match=r"got 1 extra inputs, expected 2"):
        module(torch.ones(2, 3), torch.ones(2, 3))


def test_one_module_in_two_places() -> None:
    torch.manual_seed(0)
    module, x = og.Sequential(Residual(Linear(4, 4), SiLU())) * 2, torch.randn(5, 4)
    (weight, bias), y = module.parameters(), x
    for _ in range(2):
        y = y + nn.functional.silu(y @ weight.t() + bias)
    torch.testing.assert_close(module(x), y)
    found = torch.autograd.grad(module(x).sum(), [weight, bias])
    expected = torch.autograd.grad(y.sum(), [weight, bias])
    torch.testing.assert_close(found, expected)


# -- sizes left out --

LAZY: dict[str, tuple[Callable[[], list[nn.Module]], list[tuple[int, ...]]]] = {
    "from the first input": (
        lambda: [RMSNorm(), Linear(out_features=8), SwiGLU(), Linear(out_features=6)],
        [(6,), (8, 6), (8,), (6, 4), (6,)],
    ),
    "from the right": (lambda: [Linear(6), LayerNorm(5)], [(5, 6), (5,), (5,), (5,)]),
    "through a gate from the right": (
        lambda: [Linear(6, bias=False), SwiGLU(), RMSNorm(), BasicLinear(4, 2)],
        [(8, 6), (4,), (2, 4)],
    ),
    "from the left": (lambda: [Linear(6, 3), Bias(), GELU(), LayerNorm()], [(3, 6)] + [(3,)] * 4),
    "through a residual": (
        lambda: [Residual(RMSNorm(), Linear(6, 6, bias=False)), Linear(out_features=2)],
        [(6,), (6, 6), (2, 6), (2,)],
    ),
}


@pytest.mark.parametrize("build, shapes", LAZY.values(), ids=LAZY)
def test_sizes_left_out_are_told_by_neighbours(
    build: Callable[[], list[nn.Module]], shapes: list[tuple[int, ...]]
) -> None:
    module = og.Sequential(*build())
    module(torch.randn(3, 6))
    assert [tuple(p.shape) for p in module.parameters()] == shapes
    assert all(p.isfinite().all() for p in module.parameters()), "not initialized"
    check(build, (3, 6), rounded=True, gemm=True)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: [RMSNorm(), Linear()], "1:Linear: got no size for it"),
        (lambda: [SiLU(), nn.Tanh(), Linear(out_features=3)], "2:Linear: got no size for it"),
        (lambda: [Linear(6), SwiGLU(), nn.Tanh()], "0:Linear: got no size for it"),
    ],
)
def test_sizes_that_nobody_tells_are_an_error(build: Any, message: str) -> None:
    with pytest.raises(og.OpError, match=message):
        og.Sequential(*build())(torch.ones(2, 6))


def test_sizes_come_from_a_state_dict() -> None:
    full = og.Sequential(RMSNorm(6), Linear(6, 8), SwiGLU(), Linear(4, 6))
    module = og.Sequential(RMSNorm(), Linear(), SwiGLU(), Linear())
    module.load_state_dict(full.state_dict())
    x = torch.randn(2, 6)
    assert torch.equal(module(x), full(x))
    assert (module[1].in_features, module[1].out_features) == (6, 8)


# -- state dicts, copies, devices --


def mlp(**options: Any) -> og.Sequential:
    torch.manual_seed(0)
    return og.Sequential(Residual(RMSNorm(6), Linear(6, 8), SwiGLU(), Linear(4, 6)), **options)


def test_linear_is_a_drop_in_for_nn_linear() -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.Linear(8, 4, bias=False))
    torch.manual_seed(0)
    module = og.Sequential(LayerNorm(6), Linear(6, 8), Linear(8, 4, bias=False))
    x = torch.randn(3, 6)
    for name, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), "other initial values"
    nn.init.normal_(plain[1].weight)
    module.load_state_dict(plain.state_dict())
    torch.testing.assert_close(module(x), plain(x))
    nn.init.normal_(module[2].weight)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), plain(x))
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"2.bias\""):
        module.load_state_dict({**module.state_dict(), "2.bias": torch.zeros(4)})


def saved_and_loaded(module: og.Sequential) -> og.Sequential:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    found: og.Sequential = torch.load(file, weights_only=False)
    return found


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded]
)
@pytest.mark.parametrize("used", [False, True])
def test_copies_compute_the_same_and_are_independent(duplicate: Any, used: bool) -> None:
    module, x = mlp(planner="optimal"), torch.randn(3, 6)
    if used:
        module(x).sum().backward()
        module[0](x)  # the op alone
        module.zero_grad()
    other = duplicate(module)
    before = module(x)
    assert torch.equal(other(x), before)
    assert set(other.plan().costs) == {"greedy", "optimal"}
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1)
    assert torch.equal(module(x), before)
    assert not torch.equal(other(x), before)
    other(x).sum().backward()
    assert all(p.grad is None for p in module.parameters())
    assert all(p.grad is not None for p in other.parameters())


def test_meta_device() -> None:
    with torch.device("meta"):
        outside = mlp()
    module, x = mlp(device="meta"), torch.empty(3, 6, device="meta", requires_grad=True)
    for other in (outside, module):
        y = other(x)
        assert (y.device.type, y.shape) == ("meta", (3, 6))
        y.sum().backward()
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    for op in module.modules():
        if hasattr(op, "reset_parameters"):
            op.reset_parameters()
    x = torch.randn(3, 6)
    assert torch.equal(module(x), mlp()(x))


def test_the_module_moves_between_dtypes() -> None:
    module = mlp()
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert module.to(dtype)(torch.randn(3, 6, dtype=dtype)).dtype == dtype


def test_equal_layers_share_their_plans_and_nothing_else() -> None:
    layers = [og.Sequential(RMSNorm(6), Linear(6, 6), Identity()) for _ in range(40)]
    cases = [Case(lambda layer=layer: layer, (3, 6)) for layer in (layers[0], layers[-1])]
    for case in cases:
        case.check(gemm=True, rounded=True)
    x = torch.randn(3, 6)
    for layer in layers:
        x = layer(x)
    x.sum().backward()
    assert all(p.grad is not None for layer in layers for p in layer.parameters())
    assert len({id(layer.plan()) for layer in layers}) == 1
    other = og.Sequential(RMSNorm(6, eps=0.5), Linear(6, 6), Identity())
    assert other.plan() is not layers[0].plan()
