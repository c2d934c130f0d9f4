"""LoRA branches: in a plan, frozen, with dropout, merged, and those of peft's layers."""

import copy
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from saved_bytes import saved_bytes
from torch import Tensor, nn

import opsgraph as og
from opsgraph.ops import ConstantScale, Linear, LoRA, LoRALinear, RMSNorm, SwiGLU, Tee


def lora(*args: Any, **options: Any) -> LoRA:
    op = LoRA(*args, **options)
    nn.init.normal_(op.lora_B)
    return op


def frozen(*args: Any, **options: Any) -> Linear:
    return Linear(*args, **options).requires_grad_(False)


def test_the_branch_starts_as_nothing() -> None:
    linear, x = Linear(16, 24), torch.randn(5, 16)
    assert torch.equal(og.Sequential(LoRALinear(linear, LoRA(16, 24)))(x), linear(x))


def test_fused_with_what_is_around_and_a_frozen_layer_keeps_its_input_for_lora_a_alone() -> None:
    """Of 64 rows: x, its rstd, and SwiGLU's input; the second layer's input is made again."""
    adapted = LoRALinear(frozen(32, 96, bias=False), lora(32, 96, 4))
    mlp = og.Sequential(RMSNorm(32), adapted, SwiGLU(), LoRALinear(frozen(48, 32), lora(48, 32, 4)))
    x = torch.randn(64, 32, requires_grad=True)
    assert saved_bytes(lambda: mlp(x)) == 64 * 4 * (32 + 1 + 96)
    plan = mlp.plan(training=True, x=x)
    assert [*plan.kinds].count("LoRA") == 2
    without = og.Sequential(frozen(32, 96))
    assert saved_bytes(lambda: without(x)) == 0
    for branch in (adapted.branches[0], mlp[3].branches[0]):
        branch.requires_grad_(False)
    mlp[0].requires_grad_(False)
    assert saved_bytes(lambda: mlp(x)) == 64 * 4 * (32 + 1 + 96)
    mlp(x).sum().backward()
    assert x.grad is not None
    assert all(parameter.grad is None for parameter in mlp.parameters())


def test_dropout_is_of_the_branch_and_its_gradient_has_the_same_mask() -> None:
    op = LoRA(200, 200, 200, alpha=100.0, dropout=0.25, name="other")
    for weight in (op.lora_A, op.lora_B):
        nn.init.eye_(weight)
    module = og.Sequential(Tee("other"), ConstantScale(0.0), op)
    other = torch.ones(50, 200, requires_grad=True)
    y = module(other)
    kept = y != 0
    assert 0.2 < float((~kept).float().mean()) < 0.3
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 0.5 / 0.75))
    assert not torch.equal(module(other) != 0, kept)
    y.sum().backward()
    torch.testing.assert_close(other.grad, kept * (0.5 / 0.75))
    assert op.lora_A.grad is not None
    torch.testing.assert_close(op.lora_A.grad.diagonal(), kept.sum(0) * (0.5 / 0.75))
    module.eval()
    torch.testing.assert_close(module(other), torch.full((50, 200), 0.5))


def test_fp32_adapters_of_a_bf16_layer_are_computed_in_fp32() -> None:
    op = LoRALinear(frozen(32, 48, dtype=torch.bfloat16), lora(32, 48, 4))
    x = torch.randn(9, 32, dtype=torch.bfloat16, requires_grad=True)
    y, branch = op(x), op.branches[0]
    y.sum().backward()
    base, (a, b) = op.linear(x), (branch.lora_A, branch.lora_B)
    assert torch.equal(y, (base.float() + x.float() @ a.T @ b.T).bfloat16())
    assert (y.dtype, a.grad.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(b.grad, torch.ones(48, 9) @ (x.float() @ a.T))
    with torch.autocast("cpu", torch.bfloat16):
        assert op(x.detach().float()).dtype == torch.bfloat16


def test_merged_computes_the_same_and_modifies_nothing() -> None:
    op = LoRALinear(frozen(32, 48), lora(32, 48, 4, alpha=8.0), lora(32, 8, 2, start=40))
    x, before = torch.randn(9, 32), copy.deepcopy(op.state_dict())
    torch.testing.assert_close(op.merged()(x), op(x), rtol=1e-5, atol=1e-5)
    assert type(op.merged()) is Linear
    assert not op.merged().weight.requires_grad
    assert all(torch.equal(value, before[key]) for key, value in op.state_dict().items())


@pytest.mark.parametrize("recipe", [og.recipe.MXFP8BlockScaling(), og.recipe.DelayedScaling()])
def test_merged_of_a_weight_held_in_low_precision_has_the_branches(recipe: Any) -> None:
    """A write into a part of such a weight goes to a copy: the branches were lost."""
    with og.quantized_model_init(recipe=recipe):
        linear = Linear(32, 64)
    op = LoRALinear(linear, lora(32, 64, 4, alpha=8.0), lora(32, 8, 2, start=40))
    x, merged = torch.randn(9, 32), op.merged()
    assert type(merged.weight) is nn.Parameter
    assert merged.weight.requires_grad
    torch.testing.assert_close(merged(x), op(x), rtol=1e-5, atol=1e-5)


def test_without_branches_it_is_its_layer_alone() -> None:
    """The Tee that nothing reads was an output of the sequence."""
    op, x = LoRALinear(Linear(8, 8), lora(8, 8, 2)), torch.randn(3, 8, requires_grad=True)
    module = og.Sequential(op, SwiGLU())
    with_branch = module(x)
    del op.branches[0]
    expected = nn.functional.silu(op.linear(x)[:, :4]) * op.linear(x)[:, 4:]
    torch.testing.assert_close(module(x), expected)
    op.branches = nn.ModuleList([LoRA(8, rank=2)])  # its size is the layer's
    torch.testing.assert_close(module(x), expected)
    assert op.branches[0].out_features == 8
    assert not torch.allclose(with_branch, expected)
    assert isinstance(LoRALinear(Linear(8, 8))(x), Tensor)


def test_what_is_set_later_is_checked_as_at_construction() -> None:
    op, x = LoRALinear(Linear(8, 8), lora(8, 8, 2)), torch.randn(3, 8)
    y, linear = op(x), op.linear
    for wrong in (Linear(8, 8), og.ops.SiLU()):
        with pytest.raises(og.PlanError, match=r"LoRALinear: got \w+, expected LoRA branches"):
            op.branches.append(wrong)
        with pytest.raises(og.PlanError, match=r"LoRALinear: got \w+, expected LoRA branches"):
            op.branches = nn.ModuleList([wrong])
    with pytest.raises(og.OpError, match=r"got branches=None, expected an nn.ModuleList"):
        op.branches = None
    for strange in (nn.Linear(8, 8), og.ops.SiLU(), None):
        with pytest.raises(og.OpError, match=r"LoRALinear: got linear of \w+, expected a Linear"):
            op.linear = strange
    with pytest.raises(og.OpError, match=r"LoRALinear: got Linear\(None.* a Linear with its sizes"):
        op.linear = Linear()
    for value in ("a", float("nan"), None):
        with pytest.raises(og.OpError, match=r"LoRA: got scale=.*, expected a finite number"):
            op.branches[0].scale = value
    for column in ("a", -1, 0.5):
        with pytest.raises(og.OpError, match=r"LoRA: got start=.*, expected a whole number"):
            op.branches[0].start = column
    assert op.linear is linear
    assert torch.equal(op(x), y)


def test_copies_stand_in_one_sequence() -> None:
    op, x = LoRALinear(Linear(8, 8), lora(8, 8, 2)), torch.randn(3, 8)
    torch.testing.assert_close(og.Sequential(op, copy.deepcopy(op))(x), op(op(x)))
    with pytest.raises(
        og.PlanError, match="got the LoRALinear of 0:LoRALinear again, expected another"
    ):
        og.Sequential(op, op)(x)


def test_errors() -> None:
    with pytest.raises(og.OpError, match=r"LoRA: got rank=0, expected a whole number"):
        LoRA(8, 8, 0)
    with pytest.raises(og.OpError, match=r"got dropout=2, expected a probability from 0 to 1"):
        LoRA(8, 8, dropout=2)
    with pytest.raises(og.OpError, match=r"LoRA: got dropout of an extra .*, expected a name"):
        og.Sequential(LoRA(8, 8, dropout=0.5))(torch.ones(2, 8), torch.ones(2, 8))
    for branch in (LoRA(9, 8), LoRA(8, 7), LoRA(8, 4, start=5)):
        with pytest.raises(og.OpError, match=r"LoRALinear: got a branch LoRA\(.* one for Linear"):
            LoRALinear(Linear(8, 8), branch)
    with pytest.raises(og.OpError, match=r"LoRALinear: got linear of GELU, expected a Linear"):
        LoRALinear(og.ops.GELU())  # type: ignore[arg-type]
    with pytest.raises(og.OpError, match=r"0:LoRA: got input width 7, expected 8"):
        og.Sequential(LoRA(6, 8))(torch.ones(2, 7), torch.ones(2, 6))


# -- peft --


class Layer(nn.Module):
    """peft's lora.Linear as far as it is read, for where peft is not installed."""

    def __init__(self, base: nn.Linear, names: tuple[str, ...], dropout: float) -> None:
        super().__init__()
        self.base_layer, self.fan_in_fan_out = base, False
        self.in_features, self.out_features = base.in_features, base.out_features
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.scaling, self.lora_variant, self.lora_bias = {}, {}, {}
        self.lora_dropout = nn.ModuleDict()
        self.active_adapters, self.disable_adapters, self.merged = [names[0]], False, False
        for name in names:
            self.add(name, dropout)

    def add(self, name: str, dropout: float) -> None:
        self.lora_A[name] = nn.Linear(self.in_features, 4, bias=False)
        self.lora_B[name] = nn.Linear(4, self.out_features, bias=False)
        self.scaling[name] = 2.0
        self.lora_dropout[name] = nn.Dropout(dropout) if dropout else nn.Identity()

    def get_base_layer(self) -> nn.Module:
        return self.base_layer

    def merge(self) -> None:
        name = self.active_adapters[0]
        delta = self.lora_B[name].weight @ self.lora_A[name].weight
        self.base_layer.weight.data += self.scaling[name] * delta
        self.merged = True

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        for name in () if self.merged or self.disable_adapters else self.active_adapters:
            low = self.lora_A[name](self.lora_dropout[name](x))
            y = y + self.lora_B[name](low) * self.scaling[name]
        return y


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    module: Any = ModuleType("peft.tuners.lora.layer")
    module.Linear = Layer
    monkeypatch.setitem(sys.modules, "peft.tuners.lora.layer", module)

    def make(base: nn.Linear, *names: str, dropout: float = 0.0) -> Any:
        base.requires_grad_(False)
        return Layer(base, names, dropout)

    return make


def _peft(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.layer import Linear as PeftLinear

    def make(base: nn.Linear, *names: str, dropout: float = 0.0) -> Any:
        config = peft.LoraConfig(
            r=4, lora_alpha=8, init_lora_weights=False, lora_dropout=dropout
        )  # lora_B other than 0
        layer = PeftLinear(base.requires_grad_(False), names[0], config, r=4, lora_alpha=8)
        for name in names[1:]:
            layer.update_layer(name, 4, 8, config)
        layer.set_adapter(names[0])
        return layer

    return make


@pytest.fixture(params=[_stand_in, _peft], ids=["stand-in", "peft"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Makes a layer of peft: `make(nn.Linear, "adapter", "another", dropout=)`."""
    made: Callable[..., Any] = request.param(monkeypatch)
    return made


class MLP(nn.Module):
    """A block of a Llama's shape, as peft leaves it."""

    def __init__(self, make: Callable[..., Any], *names: str, **options: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(32)
        self.gate, self.up = (make(nn.Linear(32, 48, bias=False), *names, **options) for _ in "ab")
        self.down = make(nn.Linear(48, 32), *names, **options)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.down(nn.functional.silu(self.gate(h)) * self.up(h))

    def fused(self) -> og.Sequential:
        ops = Linear.of(self.gate, self.up), SwiGLU(), Linear.of(self.down)
        return og.Sequential(RMSNorm.of(self.norm), *ops)

    def each(self, **values: Any) -> None:
        for layer in (self.gate, self.up, self.down):
            for name, value in values.items():
                setattr(layer, name, value)


def check(mlp: MLP, fused: og.Sequential) -> Tensor:
    """The same outputs and gradients of x and of all that trains; returns y."""
    torch.manual_seed(1)
    x = torch.randn(7, 32, requires_grad=True)
    wanted = [x, *(p for p in mlp.parameters() if p.requires_grad)]
    results = []
    for run in (fused, mlp):
        y = run(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), wanted, allow_unused=True)])
    for found, expected in zip(*results, strict=True):
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    return results[0][0].detach()


def test_a_block_of_pefts_layers_is_one_plan(make: Callable[..., Any]) -> None:
    mlp = MLP(make, "a")
    fused = mlp.fused()
    check(mlp, fused)
    assert not [name for name, _ in fused.named_parameters() if name != "0.weight"]
    plan = fused.plan(training=True, x=torch.randn(7, 32))
    assert [*plan.kinds].count("LoRA") == 3


def test_what_is_done_to_the_layers_later_holds(make: Callable[..., Any]) -> None:
    mlp = MLP(make, "a", "b")
    fused = mlp.fused()
    first = check(mlp, fused)
    for layer in (mlp.gate, mlp.up, mlp.down):
        if isinstance(layer, Layer):
            layer.active_adapters = ["b"]
        else:
            layer.set_adapter("b")
    assert not torch.equal(check(mlp, fused), first)
    for layer in (mlp.gate, mlp.up, mlp.down):
        if isinstance(layer, Layer):
            layer.disable_adapters = True
        else:
            layer.enable_adapters(False)
    check(mlp, fused)
    for layer in (mlp.gate, mlp.up, mlp.down):
        if isinstance(layer, Layer):
            layer.disable_adapters = False
        else:
            layer.enable_adapters(True)
    unmerged = check(mlp, fused)
    for layer in (mlp.gate, mlp.up, mlp.down):
        layer.merge()
    torch.testing.assert_close(check(mlp, fused), unmerged, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        mlp.down.base_layer.bias += 1.0
    check(mlp, fused)


def test_what_the_op_cannot_follow_is_an_error(make: Callable[..., Any]) -> None:
    mlp, x = MLP(make, "a"), torch.randn(3, 32)
    fused = mlp.fused()
    mlp.down.scaling["a"] = 3.0
    with pytest.raises(og.OpError, match=r"scale 3.0 of adapter 'a', once 2.0, expected the op"):
        fused(x)
    mlp.down.scaling["a"] = 2.0
    fused(x)
    if isinstance(mlp.up, Layer):
        mlp.up.add("c", 0.0)
        mlp.up.active_adapters = ["a", "c"]
        with pytest.raises(og.OpError, match="adapter 'c' added to the layer, expected the op"):
            fused(x)


def test_pefts_dropout_is_in_training_alone(make: Callable[..., Any]) -> None:
    mlp, x = MLP(make, "a", dropout=0.5), torch.randn(7, 32)
    fused = mlp.fused()
    assert not torch.equal(fused(x), fused(x))
    mlp.eval()
    fused.eval()
    check(mlp, fused)


def test_layers_that_are_no_lora_linear_are_refused(make: Callable[..., Any]) -> None:
    for attribute, value, reason in (
        ("lora_variant", {"a": SimpleNamespace()}, "computes in another way"),
        ("lora_bias", {"a": True}, "has a bias"),
        ("fan_in_fan_out", True, "transposed"),
    ):
        layer = make(nn.Linear(8, 8), "a")
        setattr(layer, attribute, value)
        with pytest.raises(og.OpError, match=rf"Linear: got of\(peft's .*\): .*{reason}"):
            Linear.of(layer)
    with pytest.raises(og.OpError, match="a linear layer with adapters"):
        RMSNorm.of(make(nn.Linear(8, 8), "a"))
    with pytest.raises(og.OpError, match="linear base layer"):
        Linear.of(_hooked(make))


def _hooked(make: Callable[..., Any]) -> Any:
    layer = make(nn.Linear(8, 8), "a")
    layer.base_layer.register_forward_hook(lambda *_: None)
    return layer


@pytest.mark.slow
def test_under_compile(make: Callable[..., Any]) -> None:
    mlp, x = MLP(make, "a"), torch.randn(7, 32)
    fused = mlp.fused()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), fused(x))
