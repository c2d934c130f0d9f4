"""The CPU's fusers over products: every layout that may be measured, main_grad, frozen weights."""

from collections.abc import Mapping
from itertools import product

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import opsgraph as og
from opsgraph.fusers.cpu import products as cpu_gemm
from opsgraph.kernels.choices import Choices
from opsgraph.kernels.cpu import gemm, memory
from opsgraph.ops import GELU, Linear, MakeExtraOutput, ReLU, RMSNorm, SwiGLU
from opsgraph.testing import assert_same

LAYOUTS = ["mm", "flipped", "onednn", *(f"mm{c}" for c in (" first", " second", " first second"))]


class Chooser:
    """Answers every question with one layout."""

    def __init__(self, answer: str) -> None:
        self.answer, self.asked = answer, 0

    def __call__(self, candidates: Mapping[str, object]) -> str:
        self.asked += 1
        if self.answer == "onednn" and self.answer not in candidates:
            return "mm"  # no library's product of bf16 without AVX-512
        return self.answer


@pytest.fixture(params=[False, True], ids=["large", "small"], autouse=True)
def one_pass(request, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether tensors count as so small that memory does not matter; else blocks are of 4 rows."""
    monkeypatch.setattr(cpu_gemm, "_one_pass", lambda x: request.param)
    monkeypatch.setattr(cpu_gemm, "ROWS", 4)
    return request.param


@pytest.fixture(params=LAYOUTS)
def chooser(request, monkeypatch: pytest.MonkeyPatch) -> Chooser:
    made = Chooser(request.param)
    monkeypatch.setattr(gemm, "SMALL", 0)
    monkeypatch.setattr(gemm, "TINY", 0)
    monkeypatch.setattr(gemm, "FEW", -1)
    monkeypatch.setattr(gemm, "choices", Choices("gemm", tuple, made, list))
    monkeypatch.setattr(gemm, "_chosen", {})
    return made


def mlp(bias: bool = True, dtype: torch.dtype = torch.float32, **options) -> og.Sequential:
    act, width = (GELU(), 24) if bias else (SwiGLU(), 48)
    return og.Sequential(
        RMSNorm(16), Linear(16, width, bias), act, Linear(24, 16, bias), dtype=dtype, **options
    )


def reference(module: og.Sequential) -> og.Sequential:
    return og.Sequential(*module, backends=("reference",))


def gradients(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor | None]:
    x = x.detach().requires_grad_()
    for parameter in module.parameters():
        parameter.grad = None
    y = module(x)
    y.backward(dy)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def step_names(module: og.Sequential, training: bool = True) -> list[str]:
    plan = module.plan(training)
    return [step.name for step in (*plan.forward, *plan.backward)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout_gives_the_references_gradients(
    chooser: Chooser, bias: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    module = mlp(bias, dtype)
    x, dy = torch.randn(2, 37, 16).to(dtype)
    found = gradients(module, x, dy)
    names = {"LinearProduct", "NormProductBackward", "ActivationProductBackward"}
    assert names <= set(step_names(module))
    assert chooser.asked >= 6
    for one, other in zip(found, gradients(reference(module), x, dy), strict=True):
        assert_same(one, other, chooser.answer)


@pytest.mark.parametrize("bias", [True, False])
def test_inference_and_reentrant_checkpointing_have_the_bits_of_training(
    chooser: Chooser, bias: bool
) -> None:
    torch.manual_seed(0)
    module = mlp(bias, torch.bfloat16)
    x, dy = torch.randn(2, 37, 16).bfloat16()
    found = gradients(module, x, dy)
    with torch.no_grad():
        assert torch.equal(module(x), found[0])
    module.zero_grad()
    leaf = x.clone().requires_grad_()
    y = checkpoint(module, leaf, use_reentrant=True)
    y.backward(dy)
    again = [y.detach(), leaf.grad, *(p.grad for p in module.parameters())]
    for one, other in zip(again, found, strict=True):
        assert torch.equal(one, other)


def test_expanded_gradient_and_no_rows(chooser: Chooser) -> None:
    torch.manual_seed(0)
    module = mlp()
    for rows in (5, 0):
        x, dy = torch.randn(rows, 16), torch.ones(()).expand(rows, 16)
        found, expected = gradients(module, x, dy), gradients(reference(module), x, dy)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, f"{rows} rows")


@pytest.mark.parametrize(
    "frozen", [("1.weight",), ("3.weight",), ("1.weight", "3.weight"), ("1.bias",)]
)
def test_frozen_parameters(chooser: Chooser, frozen: tuple[str, ...]) -> None:
    torch.manual_seed(0)
    module = mlp()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in frozen)
    x, dy = torch.randn(2, 9, 16)
    found, expected = gradients(module, x, dy), gradients(reference(module), x, dy)
    assert sum(g is None for g in found) == len(frozen)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert_same(one, other, str(frozen))


@pytest.mark.parametrize("main", [torch.float32, torch.bfloat16], ids=str)
def test_accumulates_into_main_grad(chooser: Chooser, main: torch.dtype) -> None:
    torch.manual_seed(0)
    module = og.Sequential(
        Linear(16, 24, accumulate_into_main_grad=True),
        GELU(),
        Linear(24, 16, bias=False, accumulate_into_main_grad=True),
        ReLU(),
        Linear(16, 8, accumulate_into_main_grad=True),
        dtype=torch.bfloat16,
    )
    x, dy = torch.randn(19, 16).bfloat16(), torch.randn(19, 8).bfloat16()
    weights = [module[k].weight for k in (0, 2, 4)]
    found = []
    for run in (module, reference(module)):
        for weight in weights:
            weight.main_grad = torch.full(weight.shape, 0.25, dtype=main)
        for _ in range(2):
            assert all(gradients(run, x, dy)[k] is None for k in (2, 4, 5))
        found.append([weight.main_grad for weight in weights])
    assert "ActivationProductBackward" in step_names(module)
    for one, other in zip(*found, strict=True):
        assert not (one == 0.25).all()
        assert one.dtype == other.dtype == main
        assert_same(one.bfloat16(), other.bfloat16(), "main_grad")


def test_delayed_weight_gradients(chooser: Chooser) -> None:
    torch.manual_seed(0)
    module = mlp(delay_wgrad_compute=True)
    x, dy = torch.randn(2, 9, 16)
    expected = gradients(reference(module), x, dy)
    found = gradients(module, x, dy)
    assert module[1].weight.grad is None
    module.backward_dw()
    found = [*found[:2], *(p.grad for p in module.parameters())]
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, "delayed")


def test_a_gradient_of_the_input_handed_out(chooser: Chooser) -> None:
    torch.manual_seed(0)
    module = og.Sequential(MakeExtraOutput(), Linear(16, 24))
    x = torch.randn(9, 16)
    grads = []
    for run in (module, og.Sequential(*module, backends=("reference",))):
        given = x.clone().requires_grad_()
        y, out = run(given)
        grads.append(torch.autograd.grad((y, out), [given, *run.parameters()], (y, 2 * out)))
    assert "LinearProductBackward" in step_names(module)
    for one, other in zip(*grads, strict=True):
        assert_same(one, other, "tee")


@pytest.mark.parametrize("chooser", ["mm first second"], indirect=True)
def test_under_compile_nothing_is_measured_while_tracing(chooser: Chooser) -> None:
    torch.manual_seed(0)
    module = mlp()
    x, dy = torch.randn(2, 8, 16)
    asked = []

    def backend(graph, inputs):
        asked.append(chooser.asked)
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    with torch.no_grad():
        y = compiled(x)
    assert asked == [0]
    assert chooser.asked == 2
    assert torch.equal(y, module(x).detach())
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(compiled, x, dy), gradients(module, x, dy), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("chooser", ["mm first second"], indirect=True)
def test_repeatable_whatever_memory_is_taken(chooser: Chooser, monkeypatch) -> None:
    from opsgraph.kernels.cpu import memory

    monkeypatch.setattr(memory, "LEAST", 1)
    torch.manual_seed(0)
    module = mlp()
    x, dy = torch.randn(2, 33, 16)
    first = [g.clone() for g in gradients(module, x, dy)]
    for rows, _ in product((33, 5, 33, 7), range(2)):
        found = gradients(module, x[:rows], dy[:rows])
        if rows == 33:
            assert all(map(torch.equal, found, first))


@pytest.mark.parametrize("chooser", ["mm first second"], indirect=True)
def test_saved_tensors_and_results_outlive_later_calls(chooser: Chooser, monkeypatch) -> None:
    from opsgraph.kernels.cpu import memory

    monkeypatch.setattr(memory, "LEAST", 1)
    torch.manual_seed(0)
    module = mlp()
    xs = torch.randn(4, 9, 16)
    alone = [gradients(module, x, x) for x in xs]
    alone = [[g.clone() for g in found] for found in alone]
    for parameter in module.parameters():
        parameter.grad = None
    inputs = [x.clone().requires_grad_() for x in xs]
    outputs = [module(x) for x in inputs]
    for x, y, expected in zip(inputs, outputs, alone, strict=True):
        (dx,) = torch.autograd.grad(y, x, x.detach(), retain_graph=True)
        (again,) = torch.autograd.grad(y, x, x.detach())
        assert torch.equal(y, expected[0])
        assert torch.equal(dx, expected[1])
        assert torch.equal(again, dx)
        assert dx.data_ptr() != again.data_ptr()


@pytest.fixture
def kept_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor, however small, is in kept memory, to be overwritten once it has no owner."""
    monkeypatch.setattr(memory, "LEAST", 1)
    monkeypatch.setattr(cpu_gemm, "COLUMNS", 8)
    monkeypatch.setattr(memory, "pool", memory.Pool())


@pytest.fixture
def overwritten(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the gradient of a pre-activation took its place, backward by backward."""
    found: list[bool] = []
    real = cpu_gemm._activation_backward

    def noted(dy, act, pre, weight, names, dtype, dpre):
        found.append(dpre is pre)
        return real(dy, act, pre, weight, names, dtype, dpre)

    monkeypatch.setattr(cpu_gemm, "_activation_backward", noted)
    return found


@pytest.mark.parametrize("bias", [True, False])
def test_what_others_have_is_not_overwritten(
    chooser: Chooser, kept_memory: None, one_pass: bool, overwritten: list[bool], bias: bool
) -> None:
    torch.manual_seed(0)
    module = mlp(bias)
    x, dy = torch.randn(2, 37, 16)
    expected = gradients(reference(module), x, dy)
    for retain in ((False,), (True, False)):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        for again in retain:
            leaf.grad = None
            module.zero_grad()
            y.backward(dy, retain_graph=again)
            found = [y.detach(), leaf.grad, *(p.grad for p in module.parameters())]
            for one, other in zip(found, expected, strict=True):
                assert_same(one, other, f"{chooser.answer}, {retain}")

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: held.append(t) or t, lambda t: t):
        y = module(x.clone().requires_grad_())
    before = [t.clone() for t in held]
    y.backward(dy)
    for one, other in zip(held, before, strict=True):
        assert torch.equal(one, other)
    assert overwritten == ([] if one_pass else [True, False, True, False])


@pytest.mark.parametrize("act", [GELU(), SwiGLU(), SwiGLU(32)], ids=["GELU", "SwiGLU", "by 32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_activation_made_again_in_parts(
    chooser: Chooser, kept_memory: None, act: og.Op, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    width = 160 * (1 + isinstance(act, SwiGLU))
    module = og.Sequential(Linear(16, width), act, Linear(160, 16), dtype=dtype)
    x, dy = torch.randn(2, 37, 16).to(dtype)
    expected = gradients(reference(module), x, dy)
    for one, other in zip(gradients(module, x, dy), expected, strict=True):
        assert_same(one, other, chooser.answer)
