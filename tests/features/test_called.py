"""Ops with hooks, or a forward of their own, inside a Sequential: as in nn.Sequential."""

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Add, AddExtraInput, Linear, MakeExtraOutput, ReLU, Residual, SiLU, Tee

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def pair() -> tuple[og.Sequential, nn.Sequential]:
    """The same in opsgraph and in torch.nn."""
    torch.manual_seed(0)
    ours = og.Sequential(Linear(4, 6), SiLU(), Linear(6, 4), ReLU())
    theirs = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 4), nn.ReLU())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def note(seen: list[Any], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, *values: Any) -> None:
        tensors = [v for value in values for v in (value if isinstance(value, tuple) else [value])]
        seen.append((name, [t.detach().clone() for t in tensors if isinstance(t, Tensor)]))

    return hook


def change(module: nn.Module, *values: Any) -> Any:
    last = values[0] if type(values[-1]) is type(values[0]) is tuple else values[-1]
    return tuple(None if v is None else 2 * v for v in last) if type(last) is tuple else 2 * last


REGISTER: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": lambda m, hook: m.register_forward_hook(hook),
    "forward, always": lambda m, hook: m.register_forward_hook(hook, always_call=True),
    "forward pre": lambda m, hook: m.register_forward_pre_hook(hook),
    "full backward": lambda m, hook: m.register_full_backward_hook(hook),
    "full backward pre": lambda m, hook: m.register_full_backward_pre_hook(hook),
}


def results(module: nn.Module) -> list[Tensor]:
    x = X.clone().requires_grad_()
    module.zero_grad()
    y = module(x)
    y.square().sum().backward()
    return [y.detach(), *(t.grad.clone() for t in (x, *module.parameters()) if t.grad is not None)]


@pytest.mark.parametrize("register", REGISTER.values(), ids=REGISTER)
@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("first", [False, True])
def test_hooks_fire_as_in_nn_sequential(register: Any, place: int, first: bool) -> None:
    found: list[Any] = []
    for module in pair():
        seen: list[Any] = []
        if not first:
            results(module)
        handles = [register(module[place], note(seen, "note"))]
        outcomes = [results(module)]
        handles.append(register(module[place], change))
        outcomes.append(results(module))
        for handle in handles:
            handle.remove()
        count = len(seen)
        outcomes.append(results(module))
        assert len(seen) == count, "a hook that was removed has fired"
        found.append((outcomes, seen))
    (outcomes, seen), (expected, told) = found
    torch.testing.assert_close(outcomes, expected)
    torch.testing.assert_close([t for _, t in seen], [t for _, t in told])


def test_a_plan_says_which_ops_are_called_and_why() -> None:
    module, _ = pair()
    whole = module.plan()
    with module[2].register_forward_hook(note([], "")):
        plans = module.plan()
        assert plans.called == ("2:Linear: called as a module, for hooks",)
        assert "2:Linear: called as a module, for hooks" in str(plans)
        assert [plan.labels for plan in plans] == [
            ("0:Linear", "0:Linear", "1:SiLU"),
            ("2:Linear", "2:Linear"),
            ("3:ReLU",),
        ]
    assert str(module.plan()) == str(whole)


def test_the_module_that_a_hook_gets_is_the_op() -> None:
    module, _ = pair()
    seen: list[nn.Module] = []
    for op in module:
        op.register_forward_hook(lambda m, _, y: seen.append(m))
    module(X)
    assert seen == list(module)


@pytest.mark.parametrize("depth", [1, 2])
def test_hooks_inside_a_residual_fire(depth: int) -> None:
    inner, act = Linear(4, 4), SiLU()
    module: Any = Residual(inner, act)
    for _ in range(depth - 1):
        module = Residual(module, ReLU())
    outer, seen = og.Sequential(module, ReLU()), list[Any]()
    y, alone = outer(X), module(X)
    handle = inner.register_forward_hook(note(seen, "inner"))
    torch.testing.assert_close(outer(X), y)
    torch.testing.assert_close(module(X), alone)
    assert [len(tensors) for _, tensors in seen] == [2, 2]
    torch.testing.assert_close(seen[0][1][1], X @ inner.weight.t() + inner.bias)
    module.register_forward_hook(note(seen, "outer"))
    torch.testing.assert_close(outer(X), y)
    assert [name for name, _ in seen[2:]] == ["inner", "outer"]
    handle.remove()
    outer(X)
    assert [name for name, _ in seen[4:]] == ["outer"]


def test_hooked_ops_take_and_hand_out_extra_values() -> None:
    other = torch.randn(3, 4)
    module = og.Sequential(
        Tee("r"), Linear(4, 4), Add("r"), MakeExtraOutput(), AddExtraInput(), SiLU()
    )
    expected, seen = module(X, other), list[Any]()
    for op in module:
        op.register_forward_hook(note(seen, type(op).__name__))
    for ours, theirs in zip(module(X, other), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    names = ["Tee", "Linear", "Add", "MakeExtraOutput", "AddExtraInput", "SiLU"]
    assert [name for name, _ in seen] == names
    strict = og.Sequential(Tee("r"), SiLU(), AddExtraInput())
    strict[2].set_extra_input_channel(0, "r")
    expected = strict(X)
    strict[2].register_forward_pre_hook(note(seen, "strict"))
    torch.testing.assert_close(strict(X), expected)


class Doubled(Linear):
    """A forward of its own."""

    def forward(self, x: Tensor, *extra_inputs: Tensor) -> Any:
        return 2 * super().forward(x, *extra_inputs)


def test_a_forward_of_ones_own_is_what_runs() -> None:
    module, theirs = pair()
    expected = theirs(X)
    own = Doubled(4, 4)
    module.append(own)
    h = 2 * (expected @ own.weight.t() + own.bias)
    torch.testing.assert_close(module(X), h)
    assert module.plan().called == ("4:Doubled: called as a module, for a forward of its own",)
    residual = og.Sequential(Residual(own), SiLU())
    torch.testing.assert_close(
        residual(X), nn.functional.silu(X + 2 * (X @ own.weight.t() + own.bias))
    )
    module[1].forward = torch.tanh  # type: ignore[assignment]
    theirs[1] = nn.Tanh()
    h = 2 * (theirs(X) @ own.weight.t() + own.bias)
    torch.testing.assert_close(module(X), h)
    del module[1].forward
    theirs[1] = nn.SiLU()
    torch.testing.assert_close(module(X), 2 * (theirs(X) @ own.weight.t() + own.bias))


def test_an_error_of_a_called_op_comes_through() -> None:
    def broken(*_: Any) -> Any:
        raise KeyError("mine")

    module, _ = pair()
    module[1].forward = broken
    with pytest.raises(KeyError, match="mine"):
        module(X)
    module, _ = pair()
    module[1].register_forward_hook(broken)
    with pytest.raises(KeyError, match="mine"):
        module(X)
    module, _ = pair()
    module[3] = None  # type: ignore[assignment]
    with pytest.raises(TypeError, match="'NoneType' object is not callable"):
        module(X)


def test_options_hold_for_ops_that_are_called() -> None:
    module = og.Sequential(Linear(4, 4), SiLU(), delay_wgrad_compute=True, backends=["reference"])
    module[0].register_forward_hook(note([], ""))
    module(X).sum().backward()
    assert module[0].weight.grad is None
    module.backward_dw()
    assert module[0].weight.grad is not None
    assert {step.backend for plan in module.plan() for step in plan.forward} == {"reference"}
    twice = og.Sequential(Linear(4, 4), SiLU(), double_backward=True)
    twice[0].register_forward_hook(note([], ""))
    x = X.clone().requires_grad_()
    (dx,) = torch.autograd.grad(twice(x).sum(), x, create_graph=True)
    dx.sum().backward()


def test_old_weight_norm_works_for_its_hook() -> None:
    module, theirs = pair()
    for m in (module, theirs):
        m(X)
        with pytest.warns(FutureWarning):
            nn.utils.weight_norm(m[0])  # type: ignore[no-untyped-call]
        with torch.no_grad():
            m[0].weight_g.mul_(2)
    torch.testing.assert_close(module(X), theirs(X))


def test_a_composite_that_tells_no_parts_refuses_hooks_inside() -> None:
    class Block(og.Op):
        def __init__(self) -> None:
            super().__init__()
            self.act = SiLU()

        def lower(self) -> Any:
            return self.act.lower()

        fwd = SiLU.fwd

    module = og.Sequential(Block())
    torch.testing.assert_close(module(X), nn.functional.silu(X))
    module[0].act.register_forward_hook(note([], ""))
    with pytest.raises(og.PlanError, match="0:Block: got hooks on the SiLU inside"):
        module(X)


def test_hooks_fire_under_torch_compile_and_a_recipe() -> None:
    module, theirs = pair()
    module[0].register_forward_hook(change)
    theirs[0].register_forward_hook(change)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), theirs(X))
    wide = og.Sequential(Linear(16, 32), SiLU(), Linear(32, 16))
    wide[0].register_forward_hook(change)
    x = torch.randn(3, 16)
    with og.autocast(recipe=og.recipe.Float8CurrentScaling()):
        y = wide(x)
    torch.testing.assert_close(y, wide(x), rtol=0.2, atol=0.2)
    assert not torch.equal(y, wide(x))


class _Doubled(Linear):
    def forward(self, x: Tensor, *more: Tensor) -> Any:
        return 2 * super().forward(x, *more)


class _DoubledCall(Linear):
    def __call__(self, x: Tensor, *more: Tensor) -> Any:
        return 2 * super().__call__(x, *more)


@pytest.mark.parametrize("kind", [_Doubled, _DoubledCall])
def test_a_forward_of_its_own_is_one_graph_under_torch_compile(kind: type[Linear]) -> None:
    """Dynamo looks past a cache: the sequence that runs the op was made in the trace."""
    torch.compiler.reset()
    module = og.Sequential(Linear(4, 6), kind(6, 6), SiLU(), Residual(kind(6, 6)))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        found = results(compiled)
    for one, right in zip(found, results(module), strict=True):
        assert torch.equal(one, right)


def test_a_hook_keeps_no_sequence_alive() -> None:
    module, _ = pair()
    module[0].register_forward_hook(note([], ""))
    module(X)
    op, seen = module[0], weakref.ref(module)
    del module
    gc.collect()
    assert seen() is None
    torch.testing.assert_close(op(X), X @ op.weight.t() + op.bias)
