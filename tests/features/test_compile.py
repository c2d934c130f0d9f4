"""torch.compile(fullgraph=True): cold, equal to eager, without breaks or repeated compilation."""

import copy
import operator
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import Compiled, assert_equal, cold, llama, results
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import opsgraph as og
from opsgraph.features import compiled as compiled_plans
from opsgraph.ops import (
    GELU,
    Add,
    AddExtraInput,
    ConstantScale,
    Dropout,
    LayerNorm,
    Linear,
    MakeExtraOutput,
    ReLU,
    Residual,
    RMSNorm,
    SiLU,
    SwiGLU,
    Tee,
)

__all__ = ["cold"]


class TiedLinear(nn.Module):
    """One Linear twice in one Sequential, and again in another."""

    def __init__(self) -> None:
        super().__init__()
        fc = Linear(16, 16)
        self.first = og.Sequential(fc, SiLU(), fc)
        self.second = og.Sequential(GELU(), fc)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


class Mixed(nn.Module):
    """Plain modules around and between the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.mlp = og.Sequential(RMSNorm(16), Linear(16, 32), nn.Tanh(), SwiGLU(), Tee("r"), SiLU())
        self.norm = nn.LayerNorm(16)
        self.mlp2 = og.LayerNormMLP(16, 32, device="cpu")

    def forward(self, x: Tensor) -> Tensor:
        h, r = self.mlp(self.embed(x))
        return self.mlp2(self.norm(h)) + r * x


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: og.Sequential(*llama()),
    "optimal": lambda: og.Sequential(*llama(), planner="optimal"),
    "residual": lambda: og.Sequential(Residual(*llama())),
    "named residual": lambda: og.Sequential(Tee("r"), *llama(), Add("r"), ReLU()),
    "an alias of the input": lambda: og.Sequential(MakeExtraOutput(), Linear(16, 16)),
    "nothing but an alias": lambda: og.Sequential(MakeExtraOutput(), Dropout(0.0)),
    "extra output": lambda: og.Sequential(Linear(16, 8), MakeExtraOutput(), SiLU()),
    "output twice": lambda: og.Sequential(Linear(16, 16), MakeExtraOutput()),
    "one op": lambda: RMSNorm(16),
    "tied": TiedLinear,
    "mixed": Mixed,
    "LayerNormMLP": lambda: og.LayerNormMLP(16, 32, device="cpu"),
    "LayerNormMLP, all returned": lambda: og.LayerNormMLP(
        16, 32, device="cpu", activation="swiglu", return_bias=True, return_layernorm_output=True
    ),
    "checkpoint": lambda: og.LayerNormMLP(16, 32, device="cpu", checkpoint=True),
}


ALSO = {"optimal", "residual", "named residual", "LayerNormMLP", "mixed"}
"""Compiled in tests below as well, or near to one that is."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if n in ALSO else ()) for n in MODULES]
)
def test_same_bits_as_eager(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    compiled = Compiled(module)
    results(compiled, module, torch.randn(5, 16))  # before eager has planned anything
    assert_equal(compiled, module, torch.randn(5, 16))
    assert compiled.count == 1
    assert_equal(compiled, module, torch.randn(2, 3, 16))


CACHED = """
import sys, torch, opsgraph as og
module = og.Sequential(getattr(og.ops, sys.argv[1])())
compiled = torch.compile(lambda x: 2 * module(x), fullgraph=True)
x = torch.randn(4, 16)
with torch.no_grad():
    assert torch.equal(compiled(x), 2 * module(x))
"""


@pytest.mark.slow
def test_a_cached_graph_is_not_taken_for_another_plan(tmp_path: Path) -> None:
    """Inductor keeps graphs on disk; the same inputs into another plan are another graph."""
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    for name in ("SwiGLU", "SiLU", "SwiGLU"):
        subprocess.run([sys.executable, "-c", CACHED, name], env=environment, check=True)


@pytest.mark.parametrize("backends", [None, ("reference",)], ids=str)
def test_a_handle_tells_the_plan(backends: tuple[str, ...] | None) -> None:
    x = torch.randn(2, 16)
    ops = SiLU(), SwiGLU(), ReLU(), Dropout(0.5)
    plans = [og.Sequential(op, backends=backends).plan(x=x) for op in ops]
    digests = [plan.handle.split("-")[0] for plan in plans]
    assert len(set(digests)) == 4
    again = og.Sequential(SiLU(), backends=backends, planner="optimal").plan(x=x)
    assert again.handle != plans[0].handle
    assert again.handle.split("-")[0] == digests[0]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_tensors_that_are_not_contiguous(backend: str) -> None:
    """The opaque ops' fakes promise contiguous results.

    Bits may differ: PyTorch makes the product of a gradient that is not contiguous, else we do.
    """
    module = og.Sequential(Linear(16, 16), AddExtraInput(), MakeExtraOutput())
    module[0].weight = nn.Parameter(torch.randn(16, 16).t())
    compiled, x = Compiled(module, backend), torch.randn(16, 5).t().requires_grad_()
    other = torch.randn(16, 5).t().requires_grad_()
    leaves = [x, other, *module.parameters()]
    for dy in (torch.randn(16, 5).t(), torch.randn(1, 1).expand(5, 16)):
        found, expected = (
            torch.autograd.grad(call(x, other), leaves, (dy, dy)) for call in (compiled, module)
        )
        for one, right in zip(found, expected, strict=True):
            torch.testing.assert_close(one, right)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_inductor(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    if name == "mixed":
        pytest.skip("Inductor compiles the plain torch modules, to other bits")
    compiled = Compiled(module, "inductor")
    assert_equal(compiled, module, torch.randn(5, 16))
    assert_equal(compiled, module, torch.randn(7, 16))


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", ["mlp", "named residual", "tied", "LayerNormMLP", "mixed"])
@pytest.mark.parametrize("training", [True, False])
def test_changing_rows_compile_at_most_twice(name: str, training: bool) -> None:
    module = MODULES[name]()
    compiled = Compiled(module)
    for rows in (4, 7, 2, 33, 16, 5, 64):
        with torch.set_grad_enabled(training):
            x = torch.randn(rows, 16)
            if training:
                assert_equal(compiled, module, x)
            else:
                assert torch.equal(compiled(x), module(x))
    assert compiled.count <= 2
    for batch in (2, 3, 5, 6, 7):
        results(compiled, module, torch.randn(batch, batch + 1, 16))
    assert compiled.count <= 4


def test_extra_inputs() -> None:
    module = og.Sequential(Linear(16, 16), AddExtraInput(), MakeExtraOutput(), SiLU(), Add("b"))
    compiled = Compiled(module)
    for rows in (3, 4, 5, 6, 7, 8):
        assert_equal(compiled, module, *(torch.randn(rows, 16) for _ in range(3)))
    assert compiled.count <= 2


def test_the_wrong_number_of_extra_inputs_is_an_error() -> None:
    """Dynamo wraps the message."""
    module = og.Sequential(Linear(16, 16), AddExtraInput())
    with pytest.raises(Exception, match=r"got 0 extra inputs, expected 1 \(other\)"):
        Compiled(module)(torch.randn(2, 16))
    with pytest.raises(Exception, match="0:Linear: got input width 5, expected 16"):
        Compiled(module)(torch.randn(2, 5), torch.randn(2, 5))
    with pytest.raises(Exception, match=r"OpError\(.*1:AddExtraInput.*other.* of shape"):
        Compiled(module)(torch.randn(2, 16), torch.randn(3, 16))


class Stack(nn.Module):
    """Equal layers, each a Sequential of its own."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(og.Sequential(Residual(*llama())) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("grad", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_plans_that_a_later_layer_adds_are_found(grad: bool) -> None:
    """Only the first layer's input needs no gradient: one table, two plans, in one trace."""
    stack = Stack(3)
    twice = og.Sequential(*llama())
    for module in (stack, lambda x: twice(twice(x))):
        torch.compiler.reset()
        compiled, x = Compiled(module), torch.randn(5, 16, requires_grad=grad)
        assert torch.equal(compiled(x), module(x))
        assert compiled.count == 1


def test_plans_of_several_dtypes_in_one_trace() -> None:
    module = og.Sequential(*llama())

    def mixed(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = module(x)
        return module(y.float())

    x = torch.randn(5, 16, requires_grad=True)
    assert torch.equal(Compiled(mixed)(x), mixed(x))


def test_equal_layers_compile_once() -> None:
    """Each layer compiled by itself, as FSDP has it: Dynamo's limit is 8 per code object."""
    stack, x = Stack(12), torch.randn(5, 16)
    counter = CompileCounterWithBackend("aot_eager")
    layers = [torch.compile(m, fullgraph=True, backend=counter) for m in stack.layers]

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    expected = results(stack, stack, x)
    for one, other in zip(results(run, stack, x), expected, strict=True):
        assert torch.equal(one, other)
    assert counter.frame_count <= 2
    for rows in (3, 9, 17):
        results(run, stack, torch.randn(rows, 16))
    assert counter.frame_count <= 4


def test_a_stack_of_layers_in_one_graph() -> None:
    stack = Stack(4)
    compiled = Compiled(stack)
    for rows in (5, 6, 7, 8):
        assert_equal(compiled, stack, torch.randn(rows, 16))
    assert compiled.count <= 2


@pytest.mark.parametrize("strict", [False, True])
def test_an_export_has_ops_of_pytorch_alone(tmp_path: Path, strict: bool) -> None:
    """So it runs in processes without opsgraph."""
    modules = {
        "sequence": og.Sequential(LayerNorm(8), Linear(8, 16), SwiGLU(), Linear(8, 8)),
        "block": og.LayerNormMLP(8, 16, normalization="RMSNorm", activation="swiglu", device="cpu"),
    }
    x, rows = torch.randn(3, 8), torch.export.Dim("rows", min=2, max=64)
    for name, module in modules.items():
        path = tmp_path / f"{name}.pt2"
        exported = torch.export.export(module, (x,), dynamic_shapes=({0: rows},), strict=strict)
        assert "opsgraph" not in str(exported.graph)
        torch.export.save(exported, path)
        other = torch.randn(9, 8)
        torch.testing.assert_close(torch.export.load(path).module()(other), module(other))


def test_a_saved_export_of_a_recipe_where_nothing_was_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph holds a plan by name, for the reference has no recipe, and says so."""
    module, x = og.Sequential(RMSNorm(16), Linear(16, 16)), torch.ones(16, 16)
    path = tmp_path / "plan.pt2"
    with og.autocast(recipe=og.recipe.Float8CurrentScaling()):
        if torch.__version__ < "2.10":
            module(x)  # docs/versions.md: it cannot export what makes plans for a recipe
        torch.export.save(torch.export.export(module, (x,)), path)
    monkeypatch.setattr(compiled_plans, "_handles", {})
    monkeypatch.setattr(compiled_plans, "_serial", Counter())
    with pytest.raises(RuntimeError, match=r"in another process .* Export the module's to_torch"):
        torch.export.load(path).module()(x)


def test_export() -> None:
    module, x = og.Sequential(*llama()).eval(), torch.randn(5, 16)
    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(module, (x,), dynamic_shapes=({0: rows},))
        for count in (5, 9):
            x = torch.randn(count, 16)
            torch.testing.assert_close(exported.module()(x), module(x))


def test_no_more_is_saved_than_the_plan_says() -> None:
    module = og.Sequential(*llama(), dtype=torch.bfloat16)
    x = torch.randn(32, 16, dtype=torch.bfloat16, requires_grad=True)
    compiled = Compiled(module)
    compiled(x)
    found: dict[int, int] = {}
    weights = {p.untyped_storage().data_ptr() for p in module.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = compiled(x)
    assert found, "the hooks saw nothing"
    assert sum(found.values()) <= 32 * module.plan().saved_bytes_per_row
    del y


def test_a_module_for_double_backward_is_traced_through() -> None:
    module = og.Sequential(*llama(), double_backward=True)
    compiled, x = Compiled(module), torch.randn(5, 16)
    expected = results(module, module, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # as Dynamo gives for functions with a cache
        found = results(compiled, module, x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_same_tensor_twice() -> None:
    module = og.Sequential(Linear(16, 16), AddExtraInput(), SiLU())
    x = torch.randn(5, 16, requires_grad=True)
    y, expected = Compiled(module)(x, x), module(x, x)
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found[0], torch.autograd.grad(expected.sum(), x)[0])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("option", ["delay_wgrad_compute", "fuse_wgrad_accumulation"])
def test_gradients_past_autograd_break_the_graph_once(option: str, inside: bool) -> None:
    """Python code brings them where they go. Dynamo looks into none of it."""
    module: Any = og.LayerNormMLP(16, 32, device="cpu", **{option: True})
    if inside:
        module = og.Sequential(ConstantScale(0.5), module)
    with pytest.raises(Exception, match=r"(which|that) torch.compile cannot see"):
        Compiled(module)(torch.randn(2, 16))
    x = torch.randn(2, 16, requires_grad=True)
    for weight in module.parameters():
        weight.main_grad = torch.zeros_like(weight)  # type: ignore[attr-defined]
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x: module(x * 2) + 1, backend="aot_eager")
    found = []
    for run in (compiled, lambda x: module(x * 2) + 1):
        y = run(x)
        y.sum().backward()
        if module.need_backward_dw():
            module.backward_dw()
        found.append([y, x.grad, *(w.grad for w in module.parameters())])
        module.zero_grad()
        x.grad = None
    for one, other in zip(*found, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    assert torch._dynamo.utils.counters["frames"]["total"] < 20  # of hundreds
    assert "UntypedStorage" not in str(torch._dynamo.utils.counters["graph_break"])
    torch._dynamo.utils.counters.clear()


def test_behind_a_break_of_a_users_module_nothing_of_ours_is_compiled() -> None:
    """Dynamo would follow hundreds of functions that plan, and fails in some."""

    class Breaks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return x * 2

    module = og.Sequential(*llama(), Breaks(), *llama())
    x = torch.randn(4, 16)
    expected, seen = module(x), []

    def backend(graph: Any, inputs: Any) -> Any:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.utils.counters.clear()
    assert torch.equal(torch.compile(module, backend=backend)(x), expected)
    assert torch._dynamo.utils.counters["frames"]["total"] < 20
    assert operator.mul in seen  # the user's module is compiled
    torch._dynamo.utils.counters.clear()


def _edited(module: Any, x: Tensor) -> list[Tensor]:
    module[1].scale = 0.25
    found = [module(x)]
    module[0].scale, module[1].scale = 3.0, 0.5
    found.append(module(x))
    module[0] = SiLU()
    found.append(module(x))
    module[0] = Residual(SiLU())
    return found


def _alone(module: Any, x: Tensor) -> list[Tensor]:
    op = module[1]
    op.scale = 0.25
    found = op(x)
    op.scale = 0.5
    return [found, op(x)]


def _hooked(module: Any, x: Tensor) -> list[Tensor]:
    handle = module[0].register_forward_hook(lambda op, given, y: 2 * y)
    found = module(x)
    handle.remove()
    return [found, module(x)]


CHANGES: dict[str, Callable[[Any, Tensor], list[Tensor]]] = {
    "settings": _edited,
    "one setting": lambda module, x: [(setattr(module[1], "scale", 0.25), module(x))[1]],
    "an op alone": _alone,
    "a hook": _hooked,
    "ops that are made": lambda module, x: [SiLU()(x) + ConstantScale(0.5)(x)],
    "sequences that are made": lambda module, x: [og.Sequential(SiLU(), Residual(ReLU()))(x)],
    "slices": lambda module, x: [module[1:](x), module[1:].to_torch()(x)],
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_in_a_compiled_function_counts(change: Any) -> None:
    """Dynamo would make it at the end of the graph, and plans of what is there before."""
    made = og.Sequential(Residual(SiLU()), ConstantScale(0.5), ReLU())
    modules = copy.deepcopy(made), made  # no sequence has looked at the ops of a copy yet
    x = torch.randn(4, 16)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda x: change(modules[0], x), backend="aot_eager")
    for _ in range(2):
        for one, right in zip(compiled(x), change(modules[1], x), strict=True):
            torch.testing.assert_close(one, right)
    assert torch._dynamo.utils.counters["frames"]["total"] < 50  # of hundreds that plan
    torch._dynamo.utils.counters.clear()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("make", [lambda: og.Sequential(*llama()), lambda: og.LayerNormMLP(16, 32)])
def test_a_plan_may_be_asked_for_and_inputs_are_tensors(make: Callable[[], nn.Module]) -> None:
    """Dynamo looks into neither: it would fail in the one, and end in other errors in the other."""
    module, x = make().to("cpu"), torch.randn(4, 16)

    def described(x: Tensor) -> tuple[Tensor, int]:
        return module(x), len(str(module.plan()))

    y, length = torch.compile(described, backend="eager")(x)
    assert torch.equal(y, module(x))
    assert length == len(str(module.plan())) > 0
    compiled = torch.compile(module, backend="eager")
    for wrong, name in (([1.0], "a list"), ((x,), "a tuple"), (None, "None")):
        with pytest.raises(og.OpError, match=f"got {name}, expected a tensor"):
            compiled(wrong)
    torch._dynamo.utils.counters.clear()


def test_an_op_may_be_made_of_a_layer_in_a_compiled_function() -> None:
    """Behind a break Dynamo finds a class method by the name of its function."""
    layer, x = nn.Linear(16, 16), torch.randn(4, 16)
    made = torch.compile(lambda x: Linear.of(layer)(x), backend="eager")(x)
    torch.testing.assert_close(made, layer(x))
    torch._dynamo.utils.counters.clear()
