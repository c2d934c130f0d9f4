"""What changes after the first call: each change is seen, as plain torch.nn would see it."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import (
    Bias,
    Dropout,
    GroupedLinear,
    LayerNorm,
    Linear,
    ReLU,
    Residual,
    RMSNorm,
    SiLU,
)

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


def by_dict(module: nn.Module, name: str, value: Any) -> None:
    module._parameters[name] = value


def by_state_dict(module: nn.Module, name: str, value: Any) -> None:
    module.load_state_dict({**module.state_dict(), name: value}, assign=True)


Hold = Callable[[Linear], tuple[nn.Module, Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]]]
HOLDERS: dict[str, Hold] = {
    "alone": lambda op: (op, lambda x, f: f(x)),
    "in a sequence": lambda op: (og.Sequential(op, ReLU()), lambda x, f: f(x).relu()),
    "in a residual": lambda op: (og.Sequential(Residual(op)), lambda x, f: x + f(x)),
    "two residuals deep": lambda op: (Residual(Residual(op)), lambda x, f: x + (x + f(x))),
    "in a nested sequence": lambda op: (
        og.Sequential(SiLU(), og.Sequential(op)),
        lambda x, f: f(nn.functional.silu(x)),
    ),
}


@pytest.mark.parametrize("put", [setattr, nn.Module.register_parameter, by_dict])
@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
@pytest.mark.parametrize("backends", [None, ("reference",)])
def test_a_bias_appears_and_goes(hold: Hold, put: Any, backends: Any) -> None:
    op = Linear(4, 4, bias=False)
    module, around = hold(op)
    if isinstance(module, og.Sequential):
        module.backends = backends
    for bias in (None, weight(4), None, weight(4)):
        put(op, "bias", bias)
        expected = around(X, lambda x, b=bias: nn.functional.linear(x, op.weight, b))  # type: ignore[misc]
        for _ in range(2):
            torch.testing.assert_close(module(X), expected)
        if bias is not None:
            grad = torch.autograd.grad(module(X).sum(), bias)
            torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), bias))


def test_a_bias_that_was_deleted_is_an_error_as_in_pytorch() -> None:
    module = og.Sequential(Linear(4, 4))
    module(X)
    del module[0].bias
    with pytest.raises(og.OpError, match="Linear: got no attribute 'bias'"):
        module(X)


def by_data(op: nn.Module, name: str, value: nn.Parameter) -> None:
    getattr(op, name).data = value.data


WRONG: dict[str, tuple[Callable[[], Any], str, str]] = {
    "a norm's weight": (lambda: LayerNorm(4), "weight", r"weight of shape \(2,\), expected \(4,\)"),
    "a norm's bias": (lambda: LayerNorm(4), "bias", r"bias of shape \(2,\), expected \(4,\)"),
    "rms": (lambda: RMSNorm(4), "weight", r"weight of shape \(2,\), expected \(4,\)"),
    "bias": (lambda: Bias(4), "bias", r"bias of shape \(2,\), expected \(4,\)"),
    "a matrix": (lambda: Linear(4, 4), "weight", r"weight of shape \(2,\), expected \(4, 4\)"),
    "a linear's bias": (lambda: Linear(4, 4), "bias", r"bias of shape \(2,\), expected \(4,\)"),
}


@pytest.mark.parametrize("put", [setattr, by_dict, by_data])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("make, name, message", WRONG.values(), ids=WRONG)
def test_a_parameter_of_another_shape_is_an_error(
    make: Any, name: str, message: str, first: bool, put: Any
) -> None:
    op = make()
    module = og.Sequential(op, SiLU())
    if not first:
        module(X)
    put(op, name, weight(2))
    with pytest.raises(og.OpError, match=rf"0:{type(op).__name__}: got {message}"):
        module(X)
    with torch.no_grad(), pytest.raises(og.OpError, match=message):
        module(X)


def test_a_groups_parameter_of_another_shape_is_an_error() -> None:
    op, sizes = GroupedLinear(2, 4, 4, bias=False), torch.tensor([1, 2])
    op(X, sizes)
    name = next(name for name, _ in op.named_parameters())
    setattr(op, name, nn.Parameter(torch.randn(op.get_parameter(name).shape)[..., :2]))
    with pytest.raises(og.OpError, match=r"GroupedLinear: got weight.* of shape"):
        op(X, sizes)


@pytest.mark.parametrize("backends", [None, ("reference",)])
@pytest.mark.parametrize(
    "make, name",
    [(lambda: Bias(4), "bias"), (lambda: Linear(4, 4), "weight")],
    ids=["bias", "linear"],
)
def test_a_parameter_that_an_op_cannot_do_without_is_missed(
    make: Any, name: str, backends: Any
) -> None:
    module = og.Sequential(make(), SiLU(), backends=backends)
    module(X)
    setattr(module[0], name, None)
    with pytest.raises(og.OpError, match=rf"got {name}=None, expected a parameter of shape \(4,"):
        module(X)


def test_a_linear_takes_other_sizes_with_another_weight() -> None:
    module = og.Sequential(Linear(4, 4, bias=False), SiLU())
    module(X)
    module[0].weight, module[0].out_features = weight(6, 4), 6
    torch.testing.assert_close(module(X), nn.functional.silu(X @ module[0].weight.t()))


def test_sizes_come_from_a_weight_that_is_assigned() -> None:
    module = og.Sequential(Linear(bias=False))
    module[0].weight = weight(6, 4)
    torch.testing.assert_close(module(X), X @ module[0].weight.t())


def test_a_parametrization_comes_and_goes() -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    module = og.Sequential(Linear(4, 4, bias=False), ReLU())
    module(X)
    own = module[0].weight.detach().clone()
    nn.utils.parametrize.register_parametrization(module[0], "weight", Twice())
    torch.testing.assert_close(module(X), (X @ (2 * own).t()).relu())
    nn.utils.parametrize.remove_parametrizations(module[0], "weight")
    torch.testing.assert_close(module(X), (X @ (2 * own).t()).relu())


EDITS: dict[str, Callable[[Residual], Any]] = {
    "set": lambda r: r.ops.__setitem__(1, ReLU()),
    "append": lambda r: r.ops.append(ReLU()),
    "insert": lambda r: r.ops.insert(0, ReLU()),
    "extend": lambda r: r.ops.extend([ReLU(), SiLU()]),
    "delete": lambda r: r.ops.__delitem__(1),
    "pop": lambda r: r.ops.pop(0),
    "another list": lambda r: setattr(r, "ops", nn.ModuleList([ReLU(), Linear(4, 4)])),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("wrap", [lambda r: r, og.Sequential, Residual], ids=["", "seq", "res"])
def test_edits_of_a_residual_are_seen(edit: Any, wrap: Any) -> None:
    inner = Residual(Linear(4, 4), SiLU())
    module = wrap(inner)
    module(X)
    for _ in range(2):
        edit(inner)
        y = X
        for op in inner.ops:
            y = op(y)
        expected = X + (X + y) if isinstance(module, Residual) and module is not inner else X + y
        torch.testing.assert_close(module(X), expected)
        if edit in (EDITS["delete"], EDITS["pop"]):
            break


def test_an_edit_of_a_residual_that_raises_changes_nothing() -> None:
    module = Residual(Linear(4, 4), SiLU())
    before, y = list(module.ops), module(X)
    for edit in (
        lambda ops: ops.extend([ReLU(), nn.ReLU()]),
        lambda ops: ops.append(nn.ReLU()),
        lambda ops: ops.insert(0, nn.ReLU()),
        lambda ops: ops.__setitem__(0, nn.ReLU()),
    ):
        with pytest.raises(og.PlanError, match="Residual: got ReLU, expected ops of opsgraph"):
            edit(module.ops)
    with pytest.raises(og.PlanError, match="Residual: got str, expected ops of opsgraph"):
        module.ops.insert(0, "ReLU()")
    assert list(module.ops) == before
    assert torch.equal(module(X), y)


class Stop(Exception):
    """Raised half-way."""


def half() -> Any:
    yield ReLU()
    raise Stop


class Half(nn.Sequential):
    def __iter__(self) -> Any:
        return half()


RAISING: dict[str, Callable[[og.Sequential], Any]] = {
    "insert": lambda m: m.insert(0, ReLU()),
    "extend": lambda m: m.extend(half()),
    "extend by no module": lambda m: m.extend([ReLU(), "no"]),
    "add in place": lambda m: m.__iadd__(Half()),
    "times in place": lambda m: m.__imul__(2),
    "delete": lambda m: m.__delitem__(slice(0, "no")),
    "set": lambda m: m.__setitem__(0, "no"),
    "append": lambda m: m.append("no"),
    "pop": lambda m: m.pop("no"),
}


@pytest.mark.parametrize("edit", RAISING.values(), ids=RAISING)
def test_an_edit_that_raises_leaves_the_sequence_as_it_was(edit: Any) -> None:
    module = og.Sequential()
    for name, op in {"a": Linear(4, 4), "1": SiLU(), "2": ReLU()}.items():
        module.add_module(name, op)
    before, plan, y = list(module._modules.items()), module.plan(), module(X)
    with pytest.raises((KeyError, TypeError, ValueError, Stop)):
        edit(module)
    assert list(module._modules.items()) == before
    assert module.plan() is plan
    assert torch.equal(module(X), y)


class Sizes(og.Op):
    """Constants and attributes that can change in place."""

    constants = ("sizes",)

    def __init__(self, sizes: Any, more: Any) -> None:
        super().__init__()
        self.sizes, self.more = sizes, more

    def fwd(self, x: Tensor, sizes: Any) -> Any:
        return x * sum(sizes) * len(self.more["a"]), ()


def test_lists_and_dicts_of_ops_may_change_in_place() -> None:
    op, other = (Sizes([1, 2], {"a": [0]}) for _ in range(2))
    module, beside = og.Sequential(SiLU(), Residual(op)), og.Sequential(SiLU(), Residual(other))
    h = nn.functional.silu(X)
    for _ in range(2):
        torch.testing.assert_close(module(X), h + 3 * h)
        torch.testing.assert_close(beside(X), h + 3 * h)
    op.sizes.append(3)
    torch.testing.assert_close(module(X), h + 6 * h)
    op.more["a"].append(0)
    torch.testing.assert_close(module(X), h + 12 * h)
    torch.testing.assert_close(beside(X), h + 3 * h)
    torch.testing.assert_close(op(X), 12 * X)


def test_a_compiled_sequence_sees_what_changes() -> None:
    op = Sizes([1, 2], {"a": [0]})
    module = og.Sequential(op, Linear(4, 4, bias=False))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), 3 * X @ module[1].weight.t())
    op.sizes.append(3)
    torch.testing.assert_close(compiled(X), 6 * X @ module[1].weight.t())
    module[1].bias = weight(4)
    expected = 6 * X @ module[1].weight.t() + module[1].bias
    torch.testing.assert_close(compiled(X), expected)


# -- what one op tells, and which owners --


def test_a_change_of_one_op_makes_no_other_module_prepare_again() -> None:
    changed = og.Sequential(Linear(4, 4), Dropout(0.5)).eval()
    others = og.Sequential(Linear(4, 4), Dropout(0.5)).eval(), og.LayerNormMLP(4, 8, device="cpu")
    for module in (changed, *others):
        module(X)
    stages = others[0]._stages, others[1]._sequences[0]._stages  # made once for each preparation
    mine = changed._stages
    changed[1].p = 0.25
    og.Sequential(Linear(4, 4), SiLU())(X)
    for module in (changed, *others):
        module(X)
    assert changed._stages is not mine
    assert others[0]._stages is stages[0]
    assert others[1]._sequences[0]._stages is stages[1]


def test_an_attribute_that_is_set_to_what_it_is_changes_nothing() -> None:
    module = og.Sequential(Linear(4, 4), Dropout(0.5)).eval()
    module(X)
    stages = module._stages
    module[1].p = 0.5
    module[0].weight = nn.Parameter(torch.ones(4, 4))
    module(X)
    assert module._stages is stages
    module[1].p = 0.25
    module(X)
    assert module._stages is not stages


def test_an_op_keeps_no_sequence_alive() -> None:
    op = Linear(4, 4)
    module = og.Sequential(op, SiLU())
    module(X)
    seen = weakref.ref(module)
    del module
    gc.collect()
    assert seen() is None
    op.in_features = 5  # tells no owner


def test_copies_tell_their_own_sequences() -> None:
    module = og.Sequential(Residual(Dropout(0.5))).eval()
    module(X)
    other = copy.deepcopy(module)
    other(X)
    stages = module._stages
    other[0].ops[0].p = 0.1
    module(X)
    assert module._stages is stages
    other.train()(X)
    assert "p=0.1" in repr(other)


# -- copies that share --


def copies(module: Any) -> list[Any]:
    replica = module._replicate_for_data_parallel()
    for name, child in replica._modules.items():
        replica._modules[name] = copies(child)[0] if isinstance(child, og.Op) else child
    for name, parameter in module._parameters.items():
        setattr(replica, name, None if parameter is None else parameter.detach().clone())
    return [replica, copy.copy(module)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(4, 4),
        lambda: RMSNorm(4),
        lambda: og.Sequential(Linear(4, 4), SiLU()),
        lambda: Residual(Linear(4, 4)),
    ],
)
def test_replicas_and_shallow_copies_compute_with_their_own_parameters(make: Any) -> None:
    module = make()
    y = module(X).detach()
    for k, other in enumerate(copies(module)):
        torch.testing.assert_close(other(X), y)
        target = other
        if isinstance(module, og.Sequential):
            target = other[0] if k == 0 else other
        if isinstance(module, Residual):
            continue
        if target is other and isinstance(module, og.Sequential):
            other[0] = Linear(4, 4)
        else:
            target.weight = target.weight * 2 if k == 0 else nn.Parameter(target.weight * 2)
        assert not torch.equal(other(X), y)
        torch.testing.assert_close(module(X), y, rtol=0, atol=0)


# -- first calls: in threads, without gradients --


@pytest.mark.parametrize(
    "make",
    [
        lambda: og.Sequential(RMSNorm(), Linear(out_features=64), SiLU(), Linear(out_features=4)),
        lambda: Linear(out_features=64),
        lambda: Residual(RMSNorm(), Linear(out_features=4)),
        lambda: copy.deepcopy(og.LayerNormMLP(4, 8, device="cpu")),
    ],
)
def test_threads_may_make_the_first_call_at_once(make: Any) -> None:
    for _ in range(5):
        module, barrier = make(), threading.Barrier(8)

        def call(_: int, module: Any = module, barrier: Any = barrier) -> Tensor:
            barrier.wait()
            found: Tensor = module(X)
            return found.detach()

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(call, range(8)))
        y = module(X)
        assert all(torch.equal(y, one) for one in found)
        assert all(p.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize(
    "make",
    [
        lambda: og.Sequential(RMSNorm(), Linear(out_features=4)),
        lambda: Linear(out_features=4),
        lambda: Residual(LayerNorm(), Linear(out_features=4)),
    ],
)
def test_sizes_first_told_without_gradients_can_be_trained(make: Any, first: Any) -> None:
    module = make()
    with first():
        module(X)
    module(X).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def test_torch_compile_makes_sizes_that_were_left_out() -> None:
    module = og.Sequential(RMSNorm(), Linear(out_features=4), SiLU())
    y = torch.compile(module, backend="aot_eager", fullgraph=True)(X)
    y.sum().backward()
    torch.testing.assert_close(y, module(X))
    assert all(p.grad is not None for p in module.parameters())
