"""Weight gradients that wait for `backward_dw`: the same bits, of one backward, nothing lost."""

import contextlib
import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from recipe_cases import RECIPES
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import opsgraph as og
from opsgraph.ops import GELU, ConstantScale, GroupedLinear, Linear, Residual, RMSNorm, SwiGLU
from opsgraph.ops.activation_names import ACTIVATIONS
from opsgraph.ops.delayed import tensors

Make = Callable[..., nn.Module]


def results(
    make: Make, x: Tensor, dy: Tensor, recipe: Any = None, **options: Any
) -> dict[str, Tensor]:
    """Gradients of x and of the parameters, after `backward_dw` where they are delayed."""
    torch.manual_seed(0)
    module: Any = make(**options)
    x = x.clone().requires_grad_()
    with og.autocast(recipe=recipe) if recipe else contextlib.nullcontext():
        y = module(x)
    y.backward(dy)
    if options.get("delay_wgrad_compute"):
        module.backward_dw()
        assert not module.queued_backward_dw()
    return {"x": x.grad} | {name: p.grad for name, p in module.named_parameters()}


def assert_same_bits(make: Make, x: Tensor, dy: Tensor, recipe: Any = None) -> None:
    plain = results(make, x, dy, recipe)
    late = results(make, x, dy, recipe, delay_wgrad_compute=True)
    for name, right in plain.items():
        assert torch.equal(late[name], right), name


def mlp(dtype: torch.dtype = torch.float32, width: int = 16, **options: Any) -> Make:
    return lambda **more: og.LayerNormMLP(
        width, 2 * width, params_dtype=dtype, device="cpu", **options, **more
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    for dtype, rows in ((torch.bfloat16, 37), (torch.float32, 1)):
        x, dy = torch.randn(2, rows, 16, dtype=dtype)
        assert_same_bits(mlp(dtype, activation=activation), x, dy)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_large_sizes(dtype: torch.dtype) -> None:
    """Where the activation's pass would overwrite what the weight gradient still reads."""
    x, dy = torch.randn(2, 1030, 256, dtype=dtype)
    assert_same_bits(mlp(dtype, 256, activation="gelu"), x, dy)


@pytest.mark.parametrize("backends", [None, ("aten", "reference"), ("reference",)])
def test_residuals_and_scales(backends: Any) -> None:
    def make(**options: Any) -> nn.Module:
        inner = RMSNorm(16), Linear(16, 32), GELU(), Linear(32, 16)
        ops = Residual(*inner), Residual(Linear(16, 16)), Linear(16, 16), ConstantScale(0.3)
        return og.Sequential(*ops, dtype=torch.bfloat16, backends=backends, **options)

    x, dy = torch.randn(2, 3, 5, 16, dtype=torch.bfloat16)
    assert_same_bits(make, x, dy)


@pytest.mark.parametrize("name", ["current", "rows", "delayed", "blocks", "mx", "nvfp4 plain"])
def test_recipes(name: str) -> None:
    x, dy = torch.randn(2, 32, 128, dtype=torch.bfloat16)
    assert_same_bits(mlp(torch.bfloat16, 128), x, dy, RECIPES[name])


def test_autocast() -> None:
    x, dy = torch.randn(2, 8, 16)
    for options in ({}, {"checkpoint": True}):
        found = []
        for late in (False, True):
            torch.manual_seed(0)
            module: Any = mlp(**options)(delay_wgrad_compute=late)
            with torch.autocast("cpu", torch.bfloat16):
                y = module(x)
            y.backward(dy.to(y.dtype))
            if late:
                module.backward_dw()
            found.append([p.grad for p in module.parameters()])
        assert all(map(torch.equal, *found))


# -- which gradients one call brings --


class Between(nn.Module):
    """A plain module between ops, so that there are several stages."""

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh()


def nested(**options: Any) -> og.Sequential:
    torch.manual_seed(0)
    inside = og.Sequential(Linear(8, 8), Between(), Linear(8, 8), **options)
    return og.Sequential(Linear(8, 8), Between(), inside, og.LayerNormMLP(
        8, 8, device="cpu", **options), Linear(8, 8), **options)  # fmt: skip


def test_one_call_does_all_of_the_oldest_backward() -> None:
    plain, late = nested(), nested(delay_wgrad_compute=True)
    batches = torch.randn(2, 4, 8)
    assert late.need_backward_dw()
    assert not plain.need_backward_dw()
    for x in batches:
        late(late(x)).sum().backward()
    assert late.queued_backward_dw() == 2
    for left, x in ((1, batches[0]), (0, batches[1])):
        plain(plain(x)).sum().backward()
        late.backward_dw()
        assert late.queued_backward_dw() == left
        for one, other in zip(plain.parameters(), late.parameters(), strict=True):
            if one.dim() == 2:  # the others' gradients did not wait
                torch.testing.assert_close(other.grad, one.grad)
    with pytest.raises(RuntimeError, match="no weight gradient is queued"):
        late.backward_dw()


def test_only_what_the_backward_was_asked_for_waits() -> None:
    module, x = nested(delay_wgrad_compute=True), torch.randn(4, 8, requires_grad=True)
    module(x)  # its graph is dropped
    module(x).sum().backward(inputs=[x])
    torch.autograd.grad(module(x).sum(), x)
    assert module.queued_backward_dw() == 0
    module(x).sum().backward(inputs=[module[0].weight])
    assert module.queued_backward_dw() == 1
    module.backward_dw()
    assert [n for n, p in module.named_parameters() if p.grad is not None] == ["0.weight"]
    module.requires_grad_(False)
    module(x).sum().backward()
    assert module.queued_backward_dw() == 0


def test_a_weight_that_is_frozen_while_its_gradient_waits_gets_none() -> None:
    module, x = nested(delay_wgrad_compute=True), torch.randn(4, 8)
    for _ in range(2):
        module(x).sum().backward()
    module.backward_dw()
    weights = {name: p for name, p in module.named_parameters() if p.dim() == 2}
    once = {name: weight.grad.clone() for name, weight in weights.items()}
    frozen = {"0.weight", "3.fc1_weight"}
    for name in frozen:
        weights[name].requires_grad_(False)
    module.backward_dw()
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, (2 - (name in frozen)) * once[name])


def test_a_retained_graph_brings_its_gradients_twice() -> None:
    module, x = nested(delay_wgrad_compute=True), torch.randn(4, 8)
    loss = module(x).sum()
    for retain in (True, False):
        loss.backward(retain_graph=retain)
    module.backward_dw()
    once = [p.grad.clone() for p in module[2].parameters() if p.dim() == 2]
    module.backward_dw()
    for gradient, weight in zip(once, (module[2][0].weight, module[2][2].weight), strict=True):
        torch.testing.assert_close(weight.grad, 2 * gradient)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_are_of_the_backward_that_runs_them_again(reentrant: bool) -> None:
    plain, late = mlp()(), mlp()(delay_wgrad_compute=True)
    late.load_state_dict(plain.state_dict())
    x = torch.randn(4, 16, requires_grad=True)
    h = checkpoint(late, x, use_reentrant=reentrant)
    checkpoint(late, h, use_reentrant=reentrant).square().sum().backward()
    plain(plain(x)).square().sum().backward()
    late.backward_dw()
    assert not late.queued_backward_dw()
    torch.testing.assert_close(late.fc1_weight.grad, plain.fc1_weight.grad)


def test_an_op_may_delay_alone() -> None:
    torch.manual_seed(0)
    module = og.Sequential(Linear(8, 8, delay_wgrad_compute=True), GELU(), Linear(8, 8))
    plain, x = copy.deepcopy(module), torch.randn(4, 8)
    plain[0].delay_wgrad_compute = False
    for each in (module, plain):
        each(x).sum().backward()
    assert module[0].weight.grad is None
    assert torch.equal(module[2].weight.grad, plain[2].weight.grad)
    module[0].backward_dw()
    assert torch.equal(module[0].weight.grad, plain[0].weight.grad)


# -- what is kept --


def kept_bytes(module: Any) -> int:
    """Bytes of what the queue holds; parameters and views of one storage count once, or not."""
    found = tensors(entry.gradient.gradient for entry in module.wgrad_queue)
    storages = {t.untyped_storage().data_ptr(): t.numel() * t.itemsize for t in found
                if not isinstance(t, nn.Parameter)}  # fmt: skip
    return sum(storages.values())


@pytest.mark.parametrize("options", [{}, {"recompute": False}, {"checkpoint": True}])
def test_the_operands_alone_are_kept(options: Any) -> None:
    """Of both products the gradient that arrived and the input: not what the norm had saved."""
    rows, width = 40, 64
    module = og.Sequential(
        RMSNorm(width), Linear(width, 2 * width), GELU(), Linear(2 * width, width),
        delay_wgrad_compute=True, **options,
    )  # fmt: skip
    module(torch.randn(rows, width)).backward(torch.randn(rows, width))
    assert kept_bytes(module) == 4 * rows * (width + 2 * width + 2 * width + width)


def test_a_recipe_keeps_the_copies_that_are_read() -> None:
    width, rows = 64, 32
    module = og.Sequential(Linear(width, width), dtype=torch.bfloat16, delay_wgrad_compute=True)
    with og.autocast(recipe=RECIPES["mx"]):
        y = module(torch.randn(rows, width, dtype=torch.bfloat16))
    y.backward(torch.randn(rows, width, dtype=torch.bfloat16))
    assert kept_bytes(module) == 2 * rows * width * (1 + 1 / 32)


def test_what_was_modified_meanwhile_is_an_error() -> None:
    module, x, dy = Linear(8, 8, delay_wgrad_compute=True), torch.randn(4, 8), torch.randn(4, 8)
    module(x).backward(dy)
    dy.zero_()
    with pytest.raises(og.OpsgraphError, match="modified in place after the backward"):
        module.backward_dw()
    assert module.queued_backward_dw() == 1


# -- which hooks hear of it --


def test_hooks_of_parameters_see_the_gradient() -> None:
    module, x = Linear(8, 8, delay_wgrad_compute=True), torch.randn(4, 8)
    seen: list[Tensor] = []
    module.weight.register_hook(lambda gradient: None if gradient is None else 2 * gradient)
    module.weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad))
    module(x).sum().backward()
    module.backward_dw()
    assert torch.allclose(module.weight.grad, 2 * x.sum(0).expand(8, 8))
    assert seen[-1] is module.weight.grad  # before, with None, in the backward itself


def test_hooks_of_wrappers_run_once_all_gradients_are_there() -> None:
    module: Any = og.LayerNormMLP(8, 16, device="cpu", delay_wgrad_compute=True)
    inner: Any = Linear(8, 8)
    sequence = og.Sequential(inner, module, delay_wgrad_compute=True)
    weights, told = (module.fc1_weight, module.fc2_weight, inner.weight), []
    for each in (module, inner):
        each.register_wgrad_accumulation_and_reduce_hooks(
            lambda: told.append([w.grad is not None for w in weights])
        )
    assert all(w.skip_backward_post_hook for w in weights)
    assert not hasattr(module.fc1_bias, "skip_backward_post_hook")
    sequence(torch.randn(4, 8)).sum().backward()
    assert told == []
    sequence.backward_dw()
    assert told == [[True] * 3] * 2


@pytest.mark.parametrize("lead", [(4,), (2, 2)])  # the latter's operands are views of such ones
@pytest.mark.parametrize("waits", [True, False])
def test_a_module_that_hooks_or_waiting_gradients_refer_to_is_freed(
    waits: bool, lead: tuple[int, ...]
) -> None:
    def use() -> list[weakref.ref[nn.Module]]:
        layers: list[Any] = [Linear(8, 8, delay_wgrad_compute=True)]
        layers += [og.LayerNormMLP(8, 7, device="cpu", delay_wgrad_compute=True)]
        layers += [og.Sequential(Linear(8, 7), GELU(), delay_wgrad_compute=True)]
        between = (Linear(8, 8), nn.Linear(8, 8), Linear(8, 7))  # whose output has a graph
        layers += [og.Sequential(*between, delay_wgrad_compute=True)]
        for layer in layers:
            hear = "register_wgrad_accumulation_and_reduce_hooks"
            getattr(layer, hear, lambda hook: None)(layer.zero_grad)
            layer(torch.randn(*lead, 8)).sum().backward()
            if not waits:
                layer.backward_dw()
            assert copy.deepcopy(layer).queued_backward_dw() == 0
        return [weakref.ref(module) for layer in layers for module in layer.modules()]

    modules = use()
    gc.collect()
    assert all(module() is None for module in modules)


def test_a_weight_that_is_computed_cannot_wait() -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    module = Linear(8, 8, delay_wgrad_compute=True)
    nn.utils.parametrize.register_parametrization(module, "weight", Double())
    with pytest.raises(og.OpError, match=r"0:.*Linear: got delay_wgrad_compute and a weight that"):
        module(torch.randn(4, 8))
    with pytest.raises(og.PlanError, match="double_backward: got it, and delay_wgrad_compute"):
        og.Sequential(Linear(8, 8), double_backward=True, delay_wgrad_compute=True)


def test_copies_have_nothing_to_wait_for() -> None:
    module = og.Sequential(Linear(8, 8), SwiGLU(), delay_wgrad_compute=True)
    module(torch.randn(4, 8)).sum().backward()
    assert copy.deepcopy(module).queued_backward_dw() == 0
    assert module.queued_backward_dw() == 1


def test_an_op_with_one_backward_for_all_can_wait() -> None:
    plain, sizes = GroupedLinear(3, 4, 6), torch.tensor([2, 0, 3])
    late, x = copy.deepcopy(plain), torch.randn(5, 4)
    sequence = og.Sequential(late, delay_wgrad_compute=True)
    plain(x, sizes).square().sum().backward()
    sequence(x, sizes).square().sum().backward()
    sequence.backward_dw()
    for one, other in zip(plain.parameters(), late.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
