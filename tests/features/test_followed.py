"""Modules under torch.func, forward-mode AD, batched gradients and traces, beside plain PyTorch."""

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import opsgraph as og
from opsgraph.ops import GELU, Dropout, LayerNorm, Linear, Residual, RMSNorm, SwiGLU


def sequence() -> og.Sequential:
    return og.Sequential(Residual(RMSNorm(6), Linear(6, 8), SwiGLU(), Linear(4, 6)), GELU())


def mixed() -> og.Sequential:
    return og.Sequential(LayerNorm(6), Linear(6, 8), nn.Tanh(), Dropout(0.0), Linear(8, 6))


class Plain(nn.Module):
    """What LayerNormMLP computes, in PyTorch, with the parameters of one."""

    def __init__(self, module: og.LayerNormMLP) -> None:
        super().__init__()
        self.ours = copy.deepcopy(module)

    def forward(self, x: Tensor) -> Tensor:
        m, f = self.ours, nn.functional
        h = f.layer_norm(x, (6,), m.layer_norm_weight, m.layer_norm_bias)
        h = f.gelu(f.linear(h, m.fc1_weight, m.fc1_bias), approximate="tanh")
        return f.linear(h, m.fc2_weight, m.fc2_bias)


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A module, and what computes the same under PyTorch's own autograd."""
    torch.manual_seed(0)
    if name == "layernorm_mlp":
        ours = og.LayerNormMLP(6, 8, device="cpu", init_method=nn.init.xavier_normal_)
        return ours, Plain(ours)
    ours = sequence() if name == "sequence" else mixed()
    made = ours.to_torch() if name == "mixed" else og.Sequential(*ours, double_backward=True)
    return ours, made


def square(module: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x).square().sum()


def per_sample(module: nn.Module) -> Callable[[Tensor], Any]:
    weights = {n: p.detach() for n, p in module.named_parameters()}

    def loss(weights: Any, x: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(module, weights, (x[None],))
        return out.square().sum()

    return lambda x: tuple(torch.func.vmap(torch.func.grad(loss), (None, 0))(weights, x).values())


def dual(module: nn.Module, grad: bool) -> Callable[[Tensor], Any]:
    def run(x: Tensor) -> Any:
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            return forward_ad.unpack_dual(module(forward_ad.make_dual(x, x.cos()))).tangent

    return run


TRANSFORMS: dict[str, Callable[[nn.Module], Callable[[Tensor], Any]]] = {
    "grad": lambda m: torch.func.grad(square(m)),
    "vjp": lambda m: lambda x: torch.func.vjp(m, x)[1](x.sin())[0],
    "jvp": lambda m: lambda x: torch.func.jvp(m, (x,), (x.cos(),))[1],
    "jacrev": lambda m: torch.func.jacrev(m),
    "jacfwd": lambda m: torch.func.jacfwd(m),
    "hessian": lambda m: torch.func.hessian(square(m)),
    "vmap": lambda m: lambda x: torch.func.vmap(m)(torch.stack((x, x + 1))),
    "per-sample gradients": per_sample,
    "dual numbers": lambda m: dual(m, True),
    "dual numbers, no_grad": lambda m: dual(m, False),
    "jacobian, forward mode": lambda m: (
        lambda x: torch.autograd.functional.jacobian(m, x, strategy="forward-mode", vectorize=True)
    ),
    "jacobian, batched gradients": lambda m: (
        lambda x: torch.autograd.functional.jacobian(m, x, vectorize=True)
    ),
}


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", ["sequence", "mixed", "layernorm_mlp"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_gives_what_it_gives_of_plain_pytorch(
    transform: str, name: str, frozen: bool
) -> None:
    ours, plain = pair(name)
    for module in (ours, plain):
        module.requires_grad_(not frozen)
    x = torch.randn(3, 6)
    found, expected = (TRANSFORMS[transform](module)(x) for module in (ours, plain))
    if not isinstance(found, tuple):
        found, expected = (found,), (expected,)
        assert expected[0].abs().sum() > 0
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_forward_mode_ad_of_weights() -> None:
    ours, plain = pair("layernorm_mlp")
    found = []
    for module, prefix in ((ours, ""), (plain, "ours.")):
        weight = module.get_parameter(f"{prefix}fc1_weight").detach()
        x = torch.ones(2, 3, 6).cumsum(-1)

        def run(w: Tensor, m: Any = module, n: str = f"{prefix}fc1_weight", x: Any = x) -> Any:
            return torch.func.functional_call(m, {n: w}, (x,))

        with forward_ad.dual_level():
            y = run(forward_ad.make_dual(weight, weight.cos()))
            found.append(forward_ad.unpack_dual(y).tangent)
    assert found[1].abs().sum() > 0
    torch.testing.assert_close(*found)


def test_a_tangent_in_a_backward_that_began_outside_is_not_dropped() -> None:
    module, x = sequence(), torch.linspace(-1, 1, 18).view(3, 6).requires_grad_()
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    y = module(x)
    with forward_ad.dual_level():
        (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)  # no tangent, no objection
        assert torch.equal(dx, expected)
        dy = forward_ad.make_dual(torch.ones_like(y), torch.ones_like(y))
        with pytest.raises(og.PlanError, match="double_backward=True"):
            torch.autograd.grad(y, x, dy)


def test_gradcheck_of_forward_mode_and_of_batched_gradients() -> None:
    module = sequence().double()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    checks: dict[str, Any] = dict(check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradcheck(module, (x,), check_batched_forward_grad=True, **checks)


def test_batched_gradients_of_extra_outputs_and_inputs() -> None:
    from opsgraph.ops import Add, Tee

    torch.manual_seed(0)
    ours = og.Sequential(Linear(6, 6), Tee(), GELU(), Add())
    plain = og.Sequential(*ours, double_backward=True)
    x, other = torch.randn(2, 3, 6, requires_grad=True), torch.randn(2, 3, 6, requires_grad=True)
    batch = torch.randn(4, 2, 3, 6), torch.randn(4, 2, 3, 6)
    found = [
        torch.autograd.grad(m(x, other), (x, other), batch, is_grads_batched=True)
        for m in (ours, plain)
    ]
    for one, expected in zip(*found, strict=True):
        torch.testing.assert_close(one, expected)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["sequence", "layernorm_mlp"])
def test_transforms_inside_torch_compile(name: str) -> None:
    module, x = pair(name)[0], torch.randn(2, 3, 6)
    runs = [torch.func.grad(square(module)), torch.func.vmap(torch.func.grad(square(module)))]
    for run in runs:
        torch.testing.assert_close(
            torch.compile(run, backend="aot_eager", fullgraph=True)(x), run(x)
        )


def test_layernorm_mlp_differentiates_twice() -> None:
    module = og.LayerNormMLP(6, 8, device="cpu", double_backward=True)
    plain, x = Plain(module), torch.randn(3, 6, requires_grad=True)
    found = []
    for run in (module, plain):
        (dx,) = torch.autograd.grad(square(run)(x), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), x)[0])
    torch.testing.assert_close(*found)
    refused = og.LayerNormMLP(6, 8, device="cpu")
    with pytest.raises(RuntimeError, match="double_backward=True"):
        torch.autograd.grad(refused(x).sum(), x, create_graph=True)


def test_what_goes_past_autograd_is_refused_under_a_transform() -> None:
    x = torch.randn(3, 6)
    delayed = og.LayerNormMLP(6, 8, device="cpu", delay_wgrad_compute=True)
    added = og.LayerNormMLP(6, 8, device="cpu", fuse_wgrad_accumulation=True)
    for module in (delayed, added):
        with pytest.raises(og.PlanError, match=r"torch\.func"):
            torch.func.grad(square(module))(x)
        with torch.no_grad():  # nothing is there to go past it
            torch.testing.assert_close(torch.func.vmap(module)(x[None])[0], module(x))
    with pytest.raises(og.PlanError, match="double_backward"):
        og.Sequential(Linear(6, 6), double_backward=True, delay_wgrad_compute=True)
    refused = pytest.raises(og.PlanError, match=r"recipe.*torch\.func")
    with refused, og.autocast(recipe=og.recipe.Float8CurrentScaling()):
        torch.func.grad(square(og.LayerNormMLP(16, 32, device="cpu")))(torch.randn(16, 16))


@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no_grad"])
@pytest.mark.parametrize("name", ["sequence", "mixed", "layernorm_mlp"])
def test_jit_trace_records_what_is_computed(name: str, grad: bool) -> None:
    module, example = pair(name)[0], torch.randn(3, 6)
    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("error", category=torch.jit.TracerWarning)
        traced = torch.jit.trace(module, example)
        for x in (torch.randn(3, 6), torch.randn(5, 6)):
            torch.testing.assert_close(traced(x), module(x))


def test_jit_trace_of_an_op_alone() -> None:
    with torch.no_grad():
        traced = torch.jit.trace(op := RMSNorm(6), torch.randn(3, 6))
        torch.testing.assert_close(traced(x := torch.randn(3, 6)), op(x))


def every_op() -> list[Any]:
    """Every op's samples but those that exchange tensors with other ranks."""
    found = []
    for name in og.ops.__all__:
        kind = getattr(og.ops, name)
        if isinstance(kind, type) and issubclass(kind, og.Op) and not kind.collective:
            samples = enumerate(kind.sample()) if name != "Dropout" else ()
            found += [pytest.param(op, id=f"{name}-{k}") for k, op in samples]
    return found


@pytest.mark.parametrize("op", every_op())
def test_every_op_is_followed(op: og.Op) -> None:
    torch.manual_seed(0)
    module, plain = og.Sequential(op), og.Sequential(op, double_backward=True)
    x = torch.randn(4, op.in_width or 8)
    extras = [torch.ones_like(e) if e.is_floating_point() else e for e in module.example_extras(x)]

    def results(m: nn.Module) -> Iterator[Tensor]:
        def run(x: Tensor) -> Tensor:
            y = m(x, *extras)
            return y[0] if isinstance(y, tuple) else y

        yield torch.func.jvp(run, (x,), (x.cos(),))[1]
        leaf = x.clone().requires_grad_()
        dy = torch.randn(2, *run(leaf).shape, generator=torch.Generator().manual_seed(0))
        yield torch.autograd.grad(run(leaf), leaf, dy, is_grads_batched=True)[0]
        if m is module:
            with torch.no_grad():
                traced = torch.jit.trace(m, (x, *extras), check_trace=False)(x, *extras)
                yield traced[0] if isinstance(traced, tuple) else traced
        else:
            yield run(x).detach()

    for one, other in zip(results(module), results(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
