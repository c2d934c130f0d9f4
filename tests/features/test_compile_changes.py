"""torch.compile(fullgraph=True) of modules that change: every call takes the plan that is right."""

from typing import Any

import pytest
import torch
from compiled import Compiled, assert_equal, cold, llama
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import Dropout, Linear, ReLU, RMSNorm, SiLU

__all__ = ["cold"]


def test_without_gradients() -> None:
    module = og.Sequential(Linear(16, 32), ReLU(), Linear(32, 16))
    compiled, x = Compiled(module), torch.randn(5, 16)
    with torch.no_grad():
        assert torch.equal(compiled(x), module(x))
    with torch.inference_mode():
        assert torch.equal(compiled(x), module(x))
    assert_equal(compiled, module, x)
    assert not torch.equal(compiled(x), compiled(2 * x))


def test_autocast() -> None:
    module = og.Sequential(*llama())
    compiled, x = Compiled(module), torch.randn(5, 16)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            assert compiled(x).dtype == dtype
            assert_equal(compiled, module, x)
    assert compiled(x).dtype == torch.float32
    assert_equal(compiled, module, x)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    assert torch.compile(inside, fullgraph=True, backend="aot_eager")(x).dtype == torch.bfloat16


@pytest.mark.skipif(
    torch.__version__ < "2.12", reason="this Dynamo fails for a plain nn.Sequential as well"
)
def test_freezing_and_thawing() -> None:
    module = og.Sequential(*llama())
    compiled, x = Compiled(module), torch.randn(5, 16)
    assert_equal(compiled, module, x)
    module[1].weight.requires_grad_(False)
    assert_equal(compiled, module, x)
    module.requires_grad_(False)
    assert_equal(compiled, module, x)
    compiled(x)  # neither x nor a parameter
    module.requires_grad_(True)
    assert_equal(compiled, module, x)
    assert all(p.grad is None for p in module.parameters())
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.usefixtures("without_cpu_backend")
def test_registering_and_unregistering() -> None:
    class Doubled(og.Fuser):
        backend, pattern = "aten", dict(act=SiLU)

        def fwd(self, x: Tensor) -> Any:
            return 2 * x, ()

    module = og.Sequential(Linear(16, 16), SiLU())
    compiled, x = Compiled(module), torch.randn(5, 16)
    before = compiled(x)
    with og.register(Doubled):
        torch.testing.assert_close(compiled(x), 2 * (x @ module[0].weight.T + module[0].bias))
        assert_equal(compiled, module, x)
    assert torch.equal(compiled(x), before)
    assert_equal(compiled, module, x)


def test_a_moved_module_and_replaced_parameters() -> None:
    module = og.Sequential(*llama())
    compiled, x = Compiled(module), torch.randn(5, 16)
    assert_equal(compiled, module, x)
    module.to(torch.bfloat16)
    assert_equal(compiled, module, x.bfloat16())
    module.to(torch.float64)
    assert_equal(compiled, module, x.double())
    module[3].weight = nn.Parameter(torch.zeros(16, 16, dtype=torch.float64))
    assert_equal(compiled, module, x.double())
    assert torch.equal(compiled(x.double()), module[3].bias.expand(5, 16))


def test_changed_settings_and_structure() -> None:
    module = og.Sequential(RMSNorm(16, eps=1e-5), Linear(16, 16))
    compiled, x = Compiled(module), torch.randn(5, 16)
    assert_equal(compiled, module, x)
    module[0].eps = 3.0
    assert_equal(compiled, module, x)
    module.append(SiLU())
    assert_equal(compiled, module, x)
    module[2] = ReLU()
    assert_equal(compiled, module, x)
    assert (compiled(x) >= 0).all()


def test_dropout() -> None:
    module = og.Sequential(Linear(16, 16), Dropout(0.25), SiLU())
    compiled, x = Compiled(module), torch.randn(400, 16)
    assert_equal(compiled, module, x)  # the same seed is drawn
    only = og.Sequential(Dropout(0.25))
    dropped, x = Compiled(only), torch.ones(4000, 16, requires_grad=True)
    y = dropped(x)
    assert abs((y != 0).float().mean().item() - 0.75) < 0.01
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(dx, y.detach())
    assert not torch.equal(dropped(x), y)
    only.eval()
    assert torch.equal(dropped(x), x)
    only.train()
    assert not torch.equal(dropped(x), x)
