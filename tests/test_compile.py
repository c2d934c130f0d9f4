"""torch.compile(fullgraph=True): cold, equal to eager, without breaks or repeated compilation."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

import opsgraph as og
from opsgraph.ops import (
    GELU,
    Add,
    AddExtraInput,
    Dropout,
    Linear,
    MakeExtraOutput,
    ReLU,
    Residual,
    RMSNorm,
    SiLU,
    SwiGLU,
    Tee,
)


@pytest.fixture(autouse=True)
def cold() -> Iterator[None]:
    """Every test starts with nothing compiled, and ends without a graph break."""
    torch.compiler.reset()
    counters.clear()
    yield
    assert not counters["graph_break"], dict(counters["graph_break"])
    torch.compiler.reset()


class Compiled:
    """A compiled module, and how often it was compiled."""

    def __init__(self, module: Callable[..., Any], backend: str = "aot_eager") -> None:
        self.counter = CompileCounterWithBackend(backend)
        self.run = torch.compile(module, fullgraph=True, backend=self.counter)

    def __call__(self, *inputs: Tensor) -> Any:
        return self.run(*inputs)

    @property
    def count(self) -> int:
        return self.counter.frame_count


def llama(width: int = 16) -> list[nn.Module]:
    return [RMSNorm(width), Linear(width, 2 * width), SwiGLU(), Linear(width, width)]


def results(call: Callable[..., Any], module: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Outputs, and gradients of all that needs one."""
    torch.manual_seed(3)
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    found = call(*leaves)
    outputs = list(found) if isinstance(found, tuple) else [found]
    moving = [y for y in outputs if y.requires_grad]
    if not moving:
        return outputs
    wanted = [*leaves, *(p for p in module.parameters() if p.requires_grad)]
    torch.manual_seed(4)
    dys = [torch.randn_like(y) for y in moving]
    return [*outputs, *torch.autograd.grad(moving, wanted, dys, allow_unused=True)]


def assert_equal(compiled: Compiled, module: nn.Module, *inputs: Tensor) -> None:
    """The same bits as in eager mode: outputs and every gradient."""
    expected = results(module, module, *inputs)
    for k, (one, other) in enumerate(
        zip(results(compiled, module, *inputs), expected, strict=True)
    ):
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other), f"result {k}"


class TiedLinear(nn.Module):
    """One Linear twice in one Sequential, and once more in another."""

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


@pytest.mark.parametrize("name", MODULES)
def test_same_bits_as_eager(name: str) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    compiled = Compiled(module)
    results(compiled, module, torch.randn(5, 16))  # before eager has planned anything
    assert_equal(compiled, module, torch.randn(5, 16))
    assert compiled.count == 1
    assert_equal(compiled, module, torch.randn(2, 3, 16))


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


class Stack(nn.Module):
    """Equal layers, each a Sequential of its own."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(og.Sequential(Residual(*llama())) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


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
    stack = Stack(12)
    compiled = Compiled(stack)
    for rows in (5, 6, 7, 8):
        assert_equal(compiled, stack, torch.randn(rows, 16))
    assert compiled.count <= 2


def test_export() -> None:
    module, x = og.Sequential(*llama()).eval(), torch.randn(5, 16)
    rows = torch.export.Dim("rows", min=2, max=64)
    with torch.no_grad():
        exported = torch.export.export(module, (x,), dynamic_shapes=({0: rows},))
        for count in (5, 9):
            x = torch.randn(count, 16)
            assert torch.equal(exported.module()(x), module(x))


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
    for one, other in zip(results(compiled, module, x), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_the_same_tensor_twice() -> None:
    module = og.Sequential(Linear(16, 16), AddExtraInput(), SiLU())
    x = torch.randn(5, 16, requires_grad=True)
    y, expected = Compiled(module)(x, x), module(x, x)
    assert torch.equal(y, expected)
    found = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found[0], torch.autograd.grad(expected.sum(), x)[0])


def test_delayed_weight_gradients_are_an_error() -> None:
    """They are queued in Python, which torch.compile cannot see."""
    module = og.LayerNormMLP(16, 32, device="cpu", delay_wgrad_compute=True)
    with pytest.raises(Exception, match="delay_wgrad_compute queues gradients"):
        Compiled(module)(torch.randn(2, 16))
