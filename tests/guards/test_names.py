"""Names in generated source: whatever users call their values, no two share a variable."""

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsgraph as og
from opsgraph.guards.names import free, root, variable
from opsgraph.ops import BasicLinear, GroupedLinear, Linear, RMSNorm, SiLU, Tee

F64 = torch.float64
AWKWARD = (
    "x1", "x0", "weight1", "weight", "d0", "d", "dx", "dweight", "ops", "saved", "torch", "inf",
    "nan", "check", "ref_x", "ref_dx", "q", "qweight", "weight1_row", "weight_more", "_", "__init",
    "rstd1", "x1_", "xq", "g2", "Affine", "forward", "None_", "σ", "ops_0",
)  # fmt: skip


def affine(factor: str, term: str, saved: str, by_hand: bool = True) -> type[og.Op]:
    """`y = sin(x) * factor + term`, and cos(x) saved, under those names."""

    def __init__(self: Any) -> None:
        og.Op.__init__(self)
        setattr(self, factor, nn.Parameter(torch.randn(32, dtype=F64)))
        setattr(self, term, nn.Parameter(torch.randn(32, dtype=F64)))

    def fwd(self: Any, x: Tensor, a: Tensor, b: Tensor) -> Any:
        return x.sin() * a + b, (x.cos(),)

    def bwd(self: Any, dy: Tensor, x: Tensor, cos: Tensor, a: Tensor) -> Any:
        return dy * a * cos, ((dy * x.sin()).sum(0), dy.sum(0))

    fwd.declared_arguments = ("x", factor, term)  # type: ignore[attr-defined]
    bwd.declared_arguments = ("dy", "x", saved, factor)  # type: ignore[attr-defined]
    members = dict(__init__=__init__, fwd=fwd, saves=(saved,), names=(factor, term))
    return type("Affine", (og.Op,), members | (dict(bwd=bwd) if by_hand else {}))


def plain(module: og.Sequential, x: Tensor) -> Tensor:
    """The same by autograd."""
    for op in module:
        if not isinstance(op, Tee):
            a, b = (getattr(op, name) for name in type(op).names)  # type: ignore[attr-defined]
            x = x.sin() * a + b
    return x


def assert_right(module: og.Sequential) -> None:
    x = torch.randn(3, 32, dtype=F64, requires_grad=True)
    leaves = [x, *module.parameters()]
    y = plain(module, x)
    found = module(x)
    outputs = found if isinstance(found, tuple) else (found,)
    torch.testing.assert_close(outputs[0], y)
    for output in outputs[1:]:
        torch.testing.assert_close(output, x)
    dy = torch.randn_like(y)
    given = [dy, *(torch.zeros_like(output) for output in outputs[1:])]
    expected = torch.autograd.grad(y, leaves, dy)
    torch.testing.assert_close(torch.autograd.grad(outputs, leaves, given), expected)
    with torch.no_grad():
        again = module(x)
    torch.testing.assert_close(again[0] if isinstance(again, tuple) else again, y.detach())


@pytest.mark.parametrize("name", AWKWARD)
def test_values_may_have_any_name(name: str) -> None:
    torch.manual_seed(0)
    usual = affine("weight", "bias", "rstd")
    kinds = [
        usual if hasattr(og.Op, name) else affine(name, "bias", "rstd"),
        affine("weight", f"{name}1", f"{name}2"),
        affine("weight", "bias", name) if name not in ("d", "weight") else usual,
        affine(f"{name}1", f"d{name}" if name != "x0" else "b", "rstd", by_hand=False),
    ]
    assert_right(og.Sequential(Tee(), *(kind() for kind in kinds), usual()))


def test_names_that_end_in_digits_are_told_from_numbers() -> None:
    """Op 1 saves `rstd1`, op 11 saves `rstd`."""
    kinds = [affine("a", "b", "c") for _ in range(13)]
    kinds[1], kinds[11] = affine("w1", "b1", "rstd1"), affine("w", "b", "rstd")
    module = og.Sequential(*(kind() for kind in kinds))
    assert_right(module)
    x = torch.randn(2, 32, dtype=F64)
    saved = module.plan(x=x, training=True).saved
    assert {"rstd1_1", "rstd11"} <= set(saved)


def test_roots_of_decorated_names_are_those_of_the_names() -> None:
    stems = ("x", "d", "q", "weight", "weight1", "rstd_", "qweight", "ref_x", "w_row0", "w_stored")
    before, after = ("", "d", "q", "ref_", "ref_d"), ("", "_stored", "_more", "_row0", "_col12")
    taken: set[str] = set()
    names: list[str] = []
    for stem, number in itertools.product(stems, ("0", "1", "10", "q1", "g1")):
        names.append(variable(stem, number, taken))
        taken.add(root(names[-1]))
    every = [f"{b}{name}{a}" for name in names for b in before for a in after]
    assert len(set(names)) == len(names)
    assert len(set(every)) == len(every)
    assert all(root(f"{b}{n}{a}") == root(n) for n in names for b in before for a in after)


@pytest.mark.parametrize("name", ["ops", "lambda", "x1", "forward", "my fuser", "2x", "torch", "_"])
def test_classes_and_fusers_may_have_any_name(name: str) -> None:
    class Linears(og.Fuser):
        backend, pattern = "aten", dict(fc=BasicLinear, act=SiLU)

        def fwd(self, x: Tensor, fc_weight: Tensor) -> Any:
            return nn.functional.silu(x @ fc_weight.t()), ()

    kind = affine("w", "b", "c")
    kind.__name__ = Linears.__name__ = name
    module = og.Sequential(kind(), Linear(32, 32, bias=False), SiLU(), kind(), dtype=F64)
    x = torch.randn(3, 32, dtype=F64)
    with torch.no_grad():
        expected = module(x)
        with og.register(Linears):
            assert name in [step.name for step in module.plan(False, x).forward]
            torch.testing.assert_close(module(x), expected)
    next(iter(free(name, {name}))).isidentifier()


def test_private_names_of_fusers_are_told_from_ops_values() -> None:
    class Pair(og.Fuser):
        """Keeps values under names that ops here have too."""

        backend, pattern, saves = "aten", dict(a=SiLU, b=SiLU), ("w1", "rstd")

        def saved(self, ops: Any, x: og.Spec) -> Any:
            return {"w1": x, "rstd": x}

        def fwd(self, x: Tensor) -> Any:
            inner = nn.functional.silu(x)
            return nn.functional.silu(inner), (x.clone(), inner)

        def bwd(self, dy: Tensor, w1: Tensor, rstd: Tensor) -> Any:
            dy = torch.ops.aten.silu_backward(dy, rstd)
            return torch.ops.aten.silu_backward(dy, w1), ()

    ops = [affine("w", "b", "rstd")() for _ in range(11)]
    ops[1] = affine("w11", "b", "rstd")()
    silu = [SiLU(), SiLU()]
    x = torch.randn(3, 32, dtype=F64, requires_grad=True)
    with og.register(Pair):
        module = og.Sequential(ops[0], *silu, *ops[1:], *silu)
        assert [s.name for s in module.plan(x=x).forward].count("Pair") == 2
        found = torch.autograd.grad(module(x).sum(), [x, *module.parameters()])
    reference = og.Sequential(*module, backends=("reference",))
    expected = torch.autograd.grad(reference(x).sum(), [x, *module.parameters()])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "recipe", [None, og.recipe.MXFP8BlockScaling(), og.recipe.DelayedScaling()]
)
@pytest.mark.parametrize(
    "names",
    [
        (("qweight", "weight_row", "weight1_row"), ("weight1", "scaleq", "ampq")),
        (("scales_", "seen_", "part"), ("seen_", "b", "scales_")),
    ],
)
def test_quantized_weights_beside_values_of_their_names(recipe: Any, names: Any) -> None:
    usual = affine("a", "b", "c")
    layers = Linear(32, 32), GroupedLinear(1, 32, 32), Linear(32, 32, bias=False)
    ops = [affine(*names[0])(), layers[0], affine(*names[1])(), *layers[1:]]
    others = [usual(), layers[0], usual(), *layers[1:]]
    for k in (0, 2):
        for own, name in zip(("a", "b"), names[k // 2], strict=False):
            setattr(others[k], own, getattr(ops[k], name))
    x = torch.randn(32, 32, requires_grad=True)
    results = []
    for given in (og.Sequential(*ops, dtype=torch.float32), og.Sequential(*others)):
        module = copy.deepcopy(given)
        for _ in range(4):  # the later ones are replayed
            with og.autocast(enabled=recipe is not None, recipe=recipe):
                y = module(x, torch.tensor([32]))
            results.append([y, *torch.autograd.grad(y.sum(), [x, *module.parameters()])])
    for found, expected in zip(results[:4], results[4:], strict=True):
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("role", ["parameter", "constant", "extra input"])
@pytest.mark.parametrize("name", ["y", "dy"])
def test_names_of_the_ops_own_values_are_refused(name: str, role: str) -> None:
    def __init__(self: Any) -> None:
        og.Op.__init__(self)
        setattr(self, name, nn.Parameter(torch.ones(4)) if role == "parameter" else 2.0)

    def fwd(self: Any, x: Tensor, other: Any) -> Any:
        return x * other, ()

    fwd.declared_arguments = ("x", name)  # type: ignore[attr-defined]
    members: dict[str, Any] = dict(__init__=__init__, fwd=fwd)
    members |= {"constants": (name,)} if role == "constant" else {}
    members |= {"extra_inputs": (name,)} if role == "extra input" else {}
    with pytest.raises(og.PlanError, match=rf"0:Odd: .* cannot be called \['{name}'\]"):
        og.Sequential(type("Odd", (og.Op,), members)())


@pytest.mark.parametrize(
    "members, message",
    [
        (dict(saves=("rstd", "rstd")), "twice"),
        (dict(saves=("my value",)), "expected identifiers"),
        (dict(saves=("want",)), "cannot save under"),
        (dict(saves=("weight_stored",)), "parameters as stored"),
        (dict(saves="rstd"), "expected a tuple of names"),
    ],
)
def test_names_without_a_meaning_are_refused(members: dict[str, Any], message: str) -> None:
    with pytest.raises(og.PlanError, match=f"0:Odd: .*{message}"):
        og.Sequential(type("Odd", (RMSNorm,), members)(4))
