"""main_grad, delayed weight gradients, checkpoint: what each promises, against plain backward."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from saved_bytes import saved_bytes
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Dropout, Linear, RMSNorm, SwiGLU
from tests.layernorm_mlp.test_module import HIDDEN, Setting

SETTINGS = [
    Setting(*values)
    for values in product(
        ("LayerNorm", "RMSNorm"), ("gelu", "swiglu"), (True, False), (False,),
        (torch.float32, torch.bfloat16),
    )
]  # fmt: skip
settings = pytest.mark.parametrize(
    "setting", SETTINGS, ids=lambda s: "-".join(str(v).removeprefix("torch.") for v in s)
)
WEIGHTS = ("fc1_weight", "fc2_weight")


def inputs(dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x, which wants a gradient, and dy."""
    torch.manual_seed(seed)
    x = torch.randn(3, 2, HIDDEN).to(dtype).requires_grad_()
    return x, torch.randn(3, 2, HIDDEN).to(dtype)


def gradients(module: nn.Module, x: Tensor, dy: Tensor, **more: Any) -> dict[str, Tensor | None]:
    """By name, `.grad` of the parameters and of x after one backward; all were None before."""
    module.zero_grad()
    module(x, **more).backward(dy)
    found = {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad}
    x.grad = None
    return found


def assert_equal(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        got = found[name]
        assert (got is None) == (right is None), name
        assert got is None or torch.equal(got, right), name


# -- main_grad --


def accumulating(setting: Setting, dtype: torch.dtype, value: float = 1.0) -> og.LayerNormMLP:
    """An MLP whose weights have a main_grad filled with a value."""
    mlp = setting.module(fuse_wgrad_accumulation=True)
    for name in WEIGHTS:
        weight: Any = mlp.get_parameter(name)
        weight.main_grad = torch.full_like(weight, value, dtype=dtype)
    return mlp


@settings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_gradients_go_into_main_grad(setting: Setting, dtype: torch.dtype) -> None:
    x, dy = inputs(setting.dtype)
    plain = gradients(setting.module().double(), x.detach().double().requires_grad_(), dy.double())
    mlp = accumulating(setting, dtype)
    for count in (1, 2):
        found = gradients(mlp, x, dy)
        for name in WEIGHTS:
            weight: Any = mlp.get_parameter(name)
            assert found.pop(name) is None
            assert weight.main_grad.dtype == dtype
            error = weight.main_grad.double() - (1 + count * plain[name])
            coarse = torch.bfloat16 in (dtype, setting.dtype)
            assert error.norm() <= (1e-2 if coarse else 1e-5) * plain[name].norm() * count
    rest = gradients(setting.module(), x, dy)
    assert_equal(found, {n: g for n, g in rest.items() if n not in WEIGHTS})


def test_fp32_main_grad_of_bf16_weights_is_not_rounded_to_bf16() -> None:
    setting = Setting("RMSNorm", "relu", False, dtype=torch.bfloat16)
    mlp = accumulating(setting, torch.float32, 0.0)
    gradients(mlp, *inputs(torch.bfloat16))
    main = mlp.fc2_weight.main_grad
    assert not torch.equal(main, main.bfloat16().float())


def test_overwriting_main_grad() -> None:
    setting = Setting()
    x, dy = inputs(setting.dtype)
    plain = gradients(setting.module(), x, dy)
    for more, attribute in (({"is_first_microbatch": True}, False), ({}, True)):
        mlp = accumulating(setting, torch.float32, float("nan"))
        for name in WEIGHTS:
            if attribute:
                mlp.get_parameter(name).overwrite_main_grad = True
        gradients(mlp, x, dy, **more)
        for name in WEIGHTS:
            assert torch.equal(mlp.get_parameter(name).main_grad, plain[name])
    mlp = accumulating(setting, torch.float32, 1.0)
    gradients(mlp, x, dy, is_first_microbatch=True)
    gradients(mlp, x, dy, is_first_microbatch=False)
    for name in WEIGHTS:
        torch.testing.assert_close(mlp.get_parameter(name).main_grad, 2 * plain[name])


@pytest.mark.parametrize("zeros", [None, False, True])
def test_the_dummy_gradient(zeros: bool | None) -> None:
    mlp = accumulating(Setting(), torch.float32)
    for name in WEIGHTS:
        weight: Any = mlp.get_parameter(name)
        weight.grad_added_to_main_grad = False
        if zeros is not None:
            weight.zero_out_wgrad = zeros
    found = gradients(mlp, *inputs(torch.float32))
    for name in WEIGHTS:
        assert mlp.get_parameter(name).grad_added_to_main_grad is True
        dummy = found[name]
        assert dummy is not None
        assert dummy.shape == mlp.get_parameter(name).shape
        assert not zeros or not dummy.any()


def test_a_weight_without_main_grad_is_an_error_and_a_frozen_one_needs_none() -> None:
    mlp = Setting().module(fuse_wgrad_accumulation=True)
    x, dy = inputs(torch.float32)
    with pytest.raises(og.OpsgraphError, match=r"main_grad None, expected a tensor \(8, 12\)"):
        mlp(x).backward(dy)
    mlp.fc1_weight.requires_grad_(False)
    mlp.fc2_weight.requires_grad_(False)
    plain = gradients(Setting().module(), x, dy)
    found = gradients(mlp, x, dy)
    assert_equal(found, {n: None if n in WEIGHTS else g for n, g in plain.items()})


# -- delayed weight gradients --


@settings
def test_delayed_weight_gradients_are_bit_exact(setting: Setting) -> None:
    x, dy = inputs(setting.dtype)
    plain = gradients(setting.module(), x, dy)
    mlp = setting.module(delay_wgrad_compute=True)
    assert mlp.need_backward_dw()
    assert not setting.module().need_backward_dw()
    found = gradients(mlp, x, dy)
    assert_equal(found, {n: None if n in WEIGHTS else g for n, g in plain.items()})
    mlp.backward_dw()
    assert_equal({n: mlp.get_parameter(n).grad for n in WEIGHTS}, {n: plain[n] for n in WEIGHTS})
    with pytest.raises(RuntimeError, match="no weight gradient is queued"):
        mlp.backward_dw()


def test_delayed_gradients_accumulate_in_the_order_of_the_backwards() -> None:
    mlp, batches = (
        Setting().module(delay_wgrad_compute=True),
        [inputs(torch.float32, s) for s in (1, 2)],
    )
    plain = [gradients(Setting().module(), *batch) for batch in batches]
    for x, dy in batches:
        mlp(x).backward(dy)
    assert mlp.fc1_weight.grad is None
    mlp.backward_dw()
    assert torch.equal(mlp.fc1_weight.grad, plain[0]["fc1_weight"])
    mlp.backward_dw()
    assert torch.equal(mlp.fc1_weight.grad, plain[0]["fc1_weight"] + plain[1]["fc1_weight"])


def test_delayed_gradients_of_tied_weights_are_added() -> None:
    first = Linear(6, 6, bias=False, device="cpu")
    second = Linear(6, 6, bias=False, device="cpu")
    second.weight = first.weight
    x = torch.randn(4, 6)
    og.Sequential(first, second)(x).square().sum().backward()
    plain, first.weight.grad = first.weight.grad, None
    tied = og.Sequential(first, second, delay_wgrad_compute=True)
    tied(x).square().sum().backward()
    assert first.weight.grad is None
    tied.backward_dw()
    torch.testing.assert_close(first.weight.grad, plain)


def test_delayed_gradients_into_main_grad() -> None:
    setting = Setting()
    x, dy = inputs(setting.dtype)
    plain = gradients(setting.module(), x, dy)
    mlp = setting.module(delay_wgrad_compute=True, fuse_wgrad_accumulation=True)
    for name in WEIGHTS:
        mlp.get_parameter(name).main_grad = torch.zeros_like(mlp.get_parameter(name))
    gradients(mlp, x, dy)
    assert not mlp.fc1_weight.main_grad.any()
    mlp.backward_dw()
    for name in WEIGHTS:
        assert torch.equal(mlp.get_parameter(name).main_grad, plain[name])
        assert mlp.get_parameter(name).grad is None


# -- checkpoint --


@settings
def test_checkpoint_is_bit_exact(setting: Setting) -> None:
    x, dy = inputs(setting.dtype)
    found = gradients(setting.module(checkpoint=True), x, dy)
    assert_equal(found, gradients(setting.module(), x, dy))


def test_checkpoint_under_autocast_is_bit_exact() -> None:
    """Backward runs outside autocast, and makes again what was made inside."""
    results = []
    for checkpoint in (False, True):
        mlp, (x, dy) = Setting().module(checkpoint=checkpoint), inputs(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = mlp(x)
        y.backward(dy.to(y.dtype))
        results.append({n: p.grad for n, p in mlp.named_parameters()} | {"x": x.grad, "y": y})
    assert_equal(*results)


def test_checkpoint_makes_the_same_dropout_and_leaves_the_generator_alone() -> None:
    results = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        ops = RMSNorm(8), Dropout(0.4), Linear(8, 12), SwiGLU(), Dropout(0.2), Linear(6, 8)
        module = og.Sequential(*ops, device="cpu", checkpoint=checkpoint)
        x, dy = inputs(torch.float32)
        y = module(x)
        torch.manual_seed(5)
        y.backward(dy)
        after = torch.randn(3)
        torch.manual_seed(5)
        assert torch.equal(after, torch.randn(3))
        results.append({n: p.grad for n, p in module.named_parameters()} | {"x": x.grad, "y": y})
    assert_equal(*results)


def wide_mlp(**options: Any) -> Callable[[], Any]:
    mlp = og.LayerNormMLP(64, 256, device="cpu", activation="swiglu", **options)
    x = torch.randn(128, 64, requires_grad=True)
    return lambda: mlp(x)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_checkpoint_saves_memory(normalization: str) -> None:
    """At least 95% of what there is to save: all but the input."""
    plain = saved_bytes(wide_mlp(normalization=normalization))
    kept = saved_bytes(wide_mlp(normalization=normalization, checkpoint=True))
    bare = 128 * 64 * 4
    assert plain - kept >= 0.95 * (plain - bare)
    assert kept == bare


def test_checkpoint_and_delayed_gradients_go_together() -> None:
    x, dy = inputs(torch.float32)
    plain = gradients(Setting().module(), x, dy)
    mlp = Setting().module(checkpoint=True, delay_wgrad_compute=True)
    gradients(mlp, x, dy)
    mlp.backward_dw()
    assert_equal({n: mlp.get_parameter(n).grad for n in WEIGHTS}, {n: plain[n] for n in WEIGHTS})
