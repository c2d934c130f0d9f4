"""main_grad: which gradient overwrites, where the buffer comes from, against plain gradients."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import opsgraph as og
from opsgraph.ops import BasicLinear, ConstantScale, Linear

WEIGHTS = ("fc1_weight", "fc2_weight")


def mlp(**options: Any) -> Any:
    torch.manual_seed(0)
    return og.LayerNormMLP(8, 12, device="cpu", params_dtype=torch.float64, **options)


def fused(value: float = 7.0, **options: Any) -> Any:
    """An MLP with main_grad, which still holds the last step's."""
    module = mlp(fuse_wgrad_accumulation=True, **options)
    for name in WEIGHTS:
        weight = module.get_parameter(name)
        weight.main_grad = torch.full_like(weight, value)
    return module


def plain(*losses: Any) -> dict[str, Tensor]:
    """Gradients of the weights after backwards of losses, each made of a module and x."""
    module = mlp()
    for loss in losses:
        loss(module).backward()
    return {name: module.get_parameter(name).grad for name in WEIGHTS}


def assert_main_grads(module: Any, right: dict[str, Tensor]) -> None:
    for name in WEIGHTS:
        torch.testing.assert_close(module.get_parameter(name).main_grad, right[name])


X = torch.randn(5, 8, dtype=torch.float64)


@pytest.mark.parametrize("delay", [False, True])
@pytest.mark.parametrize("flags", list(itertools.product((True, False, None), repeat=2)))
def test_a_module_twice_in_a_microbatch_overwrites_once(flags: Any, delay: bool) -> None:
    if True not in flags:
        return
    module = fused(delay_wgrad_compute=delay)
    module(module(X, flags[0]), flags[1]).square().sum().backward()
    if delay:
        module.backward_dw()
    assert_main_grads(module, plain(lambda m: m(m(X)).square().sum()))


@pytest.mark.parametrize("attribute", [False, True])
def test_backwards_in_any_order(attribute: bool) -> None:
    right = plain(lambda m: m(X).sum(), lambda m: m(X).square().sum())
    for order in ((0, 1), (1, 0)):
        module = fused()
        losses = [module(X, is_first_microbatch=True).sum(), module(X, False).square().sum()]
        for k in order:
            losses[k].backward()
        assert_main_grads(module, right)
    if attribute:  # the first of every backward
        for name in WEIGHTS:
            module.get_parameter(name).overwrite_main_grad = True
        module(module(X)).square().sum().backward()
        assert_main_grads(module, plain(lambda m: m(m(X)).square().sum()))
        module(X).sum().backward()
        assert_main_grads(module, plain(lambda m: m(X).sum()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_overwrites_once(reentrant: bool) -> None:
    module, x = fused(), X.clone().requires_grad_()
    h = checkpoint(module, x, True, use_reentrant=reentrant)
    checkpoint(module, h, False, use_reentrant=reentrant).square().sum().backward()
    assert_main_grads(module, plain(lambda m: m(m(X)).square().sum()))


def test_what_sees_no_gradient_overwrites_nothing() -> None:
    module = fused()
    module(X, True).sum().backward()
    with torch.no_grad():
        module(X, True)
    with torch.inference_mode():
        module(X, True)
    module(X, False).sum().backward()
    assert_main_grads(module, plain(*[lambda m: m(X).sum()] * 2))


def test_two_modules_that_share_weights_overwrite_once() -> None:
    first, second = fused(), mlp(fuse_wgrad_accumulation=True)
    for name, parameter in list(first.named_parameters()):
        setattr(second, name, parameter)
    second(first(X, True), True).square().sum().backward()
    assert_main_grads(first, plain(lambda m: m(m(X)).square().sum()))


@pytest.mark.parametrize("flags", [(True, False), (False, True), (None, None)])
def test_delayed_microbatches_come_in_the_order_of_their_backwards(flags: Any) -> None:
    module = fused(0.0, delay_wgrad_compute=True)
    for flag, factor in zip(flags, (1.0, 3.0), strict=True):
        (factor * module(X, flag).sum()).backward()
    assert module.queued_backward_dw() == 2
    module.backward_dw()
    assert_main_grads(module, plain(lambda m: m(X).sum()))
    module.backward_dw()
    assert_main_grads(module, plain(lambda m: 4 * m(X).sum()))


def test_delayed_gradients_leave_no_dummy() -> None:
    module = fused(0.0, delay_wgrad_compute=True)
    for name in WEIGHTS:
        module.get_parameter(name).grad_added_to_main_grad = False
    for _ in range(2):
        module(X).sum().backward()
        module.backward_dw()
    for name in WEIGHTS:
        assert module.get_parameter(name).grad is None
        assert module.get_parameter(name).grad_added_to_main_grad is True
    told: list[Any] = []
    # Megatron-LM's hook asks for a gradient, if it is but a dummy.
    module.register_wgrad_accumulation_and_reduce_hooks(
        lambda: told.append(module.fc1_weight.grad is not None)
    )
    module(X).sum().backward()
    module.backward_dw()
    assert told == [True]


def test_a_buffer_that_is_asked_for() -> None:
    """As Megatron-FSDP's parameters have it."""
    layer, x = Linear(8, 4, bias=False, accumulate_into_main_grad=True), torch.randn(3, 8)
    weight: Any = layer.weight
    buffer = torch.ones(4, 8)
    weight.get_main_grad = lambda: buffer
    layer(x).sum().backward()
    torch.testing.assert_close(buffer, 1 + x.sum(0).expand(4, 8))
    assert weight.grad is None


def test_a_backward_that_asks_for_no_weight_adds_none() -> None:
    module, x = fused(1.0), X.clone().requires_grad_()
    module(x).sum().backward(inputs=[x])
    torch.autograd.grad(module(x).sum(), x)
    assert all((module.get_parameter(name).main_grad == 1).all() for name in WEIGHTS)
    module(x).sum().backward(inputs=[module.fc1_weight])
    assert (module.fc2_weight.main_grad == 1).all()
    right = plain(lambda m: m(X).sum())["fc1_weight"]
    torch.testing.assert_close(module.fc1_weight.main_grad, 1 + right)


class Backward(og.Fuser):
    """A backward of a layer and a scale, of which the latter may be absent."""

    backend = "reference"
    pattern = dict(fc=BasicLinear, scale=ConstantScale | None)

    def reject(self, scale: Any) -> str | None:
        return None if scale is None else "the weight gradient goes into main_grad"

    def wgrad(self, dy: Tensor, fc_x: Tensor, scale_scale: float | None) -> Tensor:
        return dy.t() @ fc_x

    def dgrad(self, dy: Tensor, fc_weight: Tensor, scale_scale: float | None) -> Tensor:
        return dy @ fc_weight


def test_a_product_of_a_pattern_whose_other_op_is_absent() -> None:
    module = og.Sequential(
        BasicLinear(8, 3, accumulate_into_main_grad=True), device="cpu", dtype=X.dtype
    )
    module[0].weight.main_grad = torch.zeros_like(module[0].weight)
    with og.register(Backward):
        y = module(X)
        assert "Backward" in [step.name for step in module.plan(x=X).backward]
        y.sum().backward()
    torch.testing.assert_close(module[0].weight.main_grad, torch.ones(3, 5, dtype=X.dtype) @ X)
