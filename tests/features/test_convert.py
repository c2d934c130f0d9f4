"""torch.nn to opsgraph and back: same results, same parameters."""

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import opsgraph as og
from opsgraph.features.convert import PlainOp
from opsgraph.ops import (
    GELU,
    Add,
    LayerNorm,
    Linear,
    LoRA,
    LoRALinear,
    Residual,
    RMSNorm,
    SiLU,
    SwiGLU,
    Tee,
    TransposedLinear,
)

pytestmark = pytest.mark.filterwarnings("ignore:from_torch leaves")


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.LayerNorm(12),
        nn.Linear(12, 20),
        nn.GELU("tanh"),
        nn.Sequential(nn.Linear(20, 8, bias=False), nn.SiLU(), nn.RMSNorm(8)),
        nn.Hardtanh(),
        nn.Dropout(0.0),
        nn.Identity(),
        nn.ReLU(),
    )


def test_from_torch_computes_the_same_with_the_same_parameters() -> None:
    model = _model()
    module = og.Sequential.from_torch(model)
    assert list(module.state_dict()) == list(model.state_dict())
    for one, other in zip(module.parameters(), model.parameters(), strict=True):
        assert one is other
    x = torch.randn(3, 4, 12)
    torch.testing.assert_close(module(x), model(x))
    assert isinstance(module[4], nn.Hardtanh)
    assert isinstance(module[3], og.Sequential)
    y = module(x)
    y.sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).sum().backward()
    for one, other in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(one, other.grad, rtol=1e-4, atol=1e-5)


def test_round_trip_has_the_same_classes() -> None:
    back = og.Sequential.from_torch(_model()).to_torch()
    assert [type(m) for m in back.modules()] == [type(m) for m in _model().modules()]
    x = torch.randn(5, 12)
    torch.testing.assert_close(back(x), _model()(x))


def test_to_torch_runs_other_ops_plainly() -> None:
    module = og.Sequential(
        RMSNorm(8, zero_centered_gamma=True),
        Linear(8, 12),
        SwiGLU(),
        GELU("none"),
        dtype=torch.double,
    )
    plain = module.to_torch()
    assert [type(m) for m in plain] == [PlainOp, nn.Linear, PlainOp, nn.GELU]
    x = torch.randn(2, 3, 8, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(plain(x), module(x))
    assert torch.autograd.gradcheck(plain, (x,))


def test_to_torch_of_other_ops_takes_rows_without_columns() -> None:
    plain = og.Sequential(RMSNorm(0, zero_centered_gamma=True), SwiGLU()).to_torch()
    for shape in ((0,), (3, 0), (2, 3, 0), (0, 0)):
        assert plain(torch.empty(shape)).shape == shape


def test_to_torch_of_ops_that_name_values_inside() -> None:
    """A Residual's Tee and Add are its own; no value passes beside it."""
    torch.manual_seed(0)
    lora = LoRALinear(TransposedLinear(8, 8), LoRA(8, 4, 2, start=2), LoRA(8, 8, 3))
    for branch in lora.branches:
        nn.init.normal_(branch.lora_B)
    module = og.Sequential(
        Residual(RMSNorm(8), Residual(Linear(8, 8), scale=0.5), scale=-1.0, residual_scale=0.25),
        lora,
        Residual(),
        dtype=torch.double,
    )
    plain = module.to_torch()
    assert [type(m) for m in plain] == [PlainOp] * 3
    x = torch.randn(2, 3, 8, dtype=torch.double, requires_grad=True)
    torch.testing.assert_close(plain(x), module(x))
    grads = [torch.autograd.grad(m(x).sum(), [x, *module.parameters()]) for m in (plain, module)]
    torch.testing.assert_close(*grads)
    for open_ in (Residual(Tee()), Residual(Tee("a", to_caller=True), Add("a")), Tee("a")):
        with pytest.raises(og.PlanError, match=r"0:.* it has extra inputs or outputs, which nn"):
            og.Sequential(open_).to_torch()
    module[0].ops[0].register_forward_hook(_doubled)
    with pytest.raises(og.PlanError, match="0:Residual: ops beside a residual have hooks"):
        module.to_torch()


def _doubled(module: nn.Module, args: object, y: torch.Tensor) -> torch.Tensor:
    return 2 * y


PUT_ON: dict[str, Callable[[nn.Module], object]] = {
    "prune": lambda module: nn.utils.prune.l1_unstructured(module, "weight", amount=0.5),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrization": nn.utils.parametrizations.weight_norm,
    "hook": lambda module: module.register_forward_hook(_doubled),
    "forward": lambda module: setattr(
        module, "forward", lambda x, plain=module.forward: 2 * plain(x)
    ),
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.*norm` is deprecated")
@pytest.mark.parametrize("kind", PUT_ON)
def test_to_torch_keeps_what_was_put_on_an_op(kind: str) -> None:
    torch.manual_seed(0)
    module = og.Sequential(RMSNorm(8), Linear(8, 12), GELU("none")).double().eval()
    PUT_ON[kind](module[1])
    plain, x = module.to_torch(), torch.randn(5, 8, dtype=torch.double)
    for scale in (1.0, 1.5):
        module.load_state_dict({k: v * scale for k, v in module.state_dict().items()})
        torch.testing.assert_close(plain(x), module(x), rtol=1e-10, atol=1e-12)
        shared = {id(p) for p in module.parameters()}
        assert {id(p) for p in plain.parameters()} == shared
        gradients = []
        for one in (plain, module):
            module.zero_grad()
            one(x).square().sum().backward()
            gradients.append([p.grad for p in module.parameters()])
        torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
    assert torch.autograd.gradgradcheck(plain, (x[:2].requires_grad_(),))


def test_training_mode_is_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).eval()
    module = og.Sequential.from_torch(model)
    assert not module.training
    assert not module[1].training
    x = torch.randn(2, 4)
    torch.testing.assert_close(module(x), model(x))


def test_what_cannot_be_converted_is_named() -> None:
    with pytest.raises(og.PlanError, match=r"from_torch: got Linear, expected nn.Sequential"):
        og.Sequential.from_torch(nn.Linear(2, 2))
    with pytest.raises(og.PlanError, match=r"0:Tee: it has extra inputs or outputs"):
        og.Sequential(Tee("r"), GELU(), Add("r")).to_torch()


def test_norm_over_several_dimensions_there_and_back() -> None:
    plain = nn.Sequential(nn.LayerNorm((3, 4)), nn.RMSNorm((3, 4)))
    module = og.Sequential.from_torch(plain)
    assert [type(m) for m in module] == [LayerNorm, RMSNorm]
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(module(x), plain(x))
    back = module.to_torch()
    assert [m.normalized_shape for m in back] == [(3, 4), (3, 4)]
    torch.testing.assert_close(back(x), plain(x))


def test_a_module_that_occurs_twice_stays_twice_and_shared() -> None:
    torch.manual_seed(0)
    gelu, linear, block = nn.GELU(), nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.ReLU())
    plain = nn.Sequential(linear, gelu, block, gelu, linear, block)
    module = og.Sequential.from_torch(plain)
    assert len(module) == 6
    assert module[1] is module[3]
    assert module[0] is module[4]
    assert module[2] is module[5]
    assert module[0].weight is linear.weight
    assert list(module.state_dict()) == list(plain.state_dict())
    back = module.to_torch()
    assert [type(m) for m in back] == [type(m) for m in plain]
    assert back[0] is back[4]
    assert back[2] is back[5]
    x = torch.randn(3, 6)
    found = []
    for model in (module, plain, back):
        y = model(x)
        y.square().sum().backward()
        found.append([y.detach(), linear.weight.grad, block[0].bias.grad])
        plain.zero_grad()
    for other in found[1:]:
        for one, expected in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, expected)


class _Doubling(nn.Sequential):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def _with_hook() -> nn.Module:
    module = nn.Linear(6, 6)
    module.register_forward_hook(lambda m, args, y: 2 * y)
    return module


def _with_pre_hook() -> nn.Module:
    module = nn.GELU()
    module.register_forward_pre_hook(lambda m, args: (2 * args[0],))
    return module


def _with_backward_hook() -> nn.Module:
    module = nn.ReLU()
    module.register_full_backward_hook(lambda m, dx, dy: (2 * dx[0],))
    return module


def _patched() -> nn.Module:
    module = nn.SiLU()
    module.forward = lambda x: 3 * x  # type: ignore[method-assign]
    return module


def _patched_sequence() -> nn.Module:
    module = nn.Sequential(nn.ReLU())
    module.forward = lambda x: 3 * x  # type: ignore[method-assign]
    return module


def _hooked_sequence() -> nn.Module:
    module = nn.Sequential(nn.ReLU())
    module.register_forward_hook(lambda m, args, y: 2 * y)
    return module


def _parametrized() -> nn.Module:
    module = nn.Linear(6, 6)
    nn.utils.parametrizations.weight_norm(module)
    return module


def _weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.utils.weight_norm(nn.Linear(6, 6))


def _with_more() -> nn.Module:
    module = nn.Linear(6, 6)
    module.register_buffer("steps", torch.zeros(3))
    return module


def _bias_alone() -> nn.Module:
    module = nn.LayerNorm(6)
    nn.init.normal_(module.bias)
    module.weight = None  # type: ignore[assignment]
    return module


@pytest.mark.parametrize(
    "build",
    [
        _with_hook, _with_pre_hook, _with_backward_hook, _patched, _patched_sequence,
        _hooked_sequence, _parametrized, _weight_norm, _with_more, _bias_alone,
        lambda: _Doubling(nn.ReLU()), lambda: type("Own", (nn.Linear,), {})(6, 6),
    ],
)  # fmt: skip
def test_a_module_with_something_of_its_own_stays_itself(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    special = build()
    plain = nn.Sequential(nn.Linear(6, 6), special, nn.Sequential(special, nn.ReLU()))
    module = og.Sequential.from_torch(plain)
    assert module[1] is special
    assert module[2][0] is special
    assert list(module.state_dict()) == list(plain.state_dict())
    results = []
    for model in (module, plain):
        x = torch.full((2, 6), 0.5, requires_grad=True)
        y = model(x)
        results.append([y, *torch.autograd.grad(y.sum(), x)])
    for one, expected in zip(*results, strict=True):
        torch.testing.assert_close(one, expected)


def test_what_a_module_is_set_to_is_kept() -> None:
    plain = nn.Sequential(
        nn.Linear(6, 6, bias=False, dtype=torch.double), nn.LayerNorm(6, bias=False),
        nn.LayerNorm(6, elementwise_affine=False), nn.Sequential(nn.Dropout(0.5)),
    )  # fmt: skip
    plain[0].weight.requires_grad_(False)
    plain[3].eval()
    plain.add_module("none", None)
    module = og.Sequential.from_torch(plain)
    assert not module[0].weight.requires_grad
    assert module[0].weight.dtype == torch.double
    assert module[0].bias is None
    assert module[1].bias is None
    assert (module.training, module[3].training, module[3][0].training) == (True, False, False)
    assert module._modules["none"] is None
    assert module.to_torch()._modules["none"] is None


def test_a_sequence_with_a_forward_of_its_own_is_an_error() -> None:
    for module in (_Doubling(nn.ReLU()), _patched_sequence()):
        with pytest.raises(og.PlanError, match=r"with a forward of its own, expected one that"):
            og.Sequential.from_torch(module)  # type: ignore[arg-type]
    made = og.Sequential.from_torch(type("Named", (nn.Sequential,), {})(nn.ReLU()))
    assert type(made[0]).__module__.startswith("opsgraph")


def test_converting_changes_nothing_of_the_callers() -> None:
    special = _Doubling(nn.Dropout(0.5)).eval()
    plain = nn.Sequential(nn.Sequential(nn.Linear(6, 6).eval(), special), nn.ReLU())
    modes = [m.training for m in plain.modules()]
    module = og.Sequential.from_torch(plain)
    assert [m.training for m in plain.modules()] == modes
    back = module.to_torch()
    assert [m.training for m in back.modules()] == modes
    assert [m.training for m in plain.modules()] == modes


def _of_transformers(name: str, forward: Callable[..., torch.Tensor]) -> type[nn.Module]:
    """A norm as transformers has them: a weight, an epsilon, and a forward of the class's."""

    def init(self: nn.Module, width: int) -> None:
        nn.Module.__init__(self)
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(width)), 1e-6

    own = {"__init__": init, "forward": forward, "__module__": "transformers.models.some.modeling"}
    return type(name, (nn.Module,), own)


def _normalized(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    h = x.float()
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def _llama(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return self.weight * _normalized(self, x).to(x.dtype)


def _t5(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    half = self.weight.dtype in (torch.float16, torch.bfloat16)
    h = x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
    return self.weight * (h.to(self.weight.dtype) if half else h)


def _gemma(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (_normalized(self, x) * (1 + self.weight.float())).to(x.dtype)


def _olmo(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (_normalized(self, x) * self.weight).to(x.dtype)


def _squared(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return (_normalized(self, x) * self.weight.square()).to(x.dtype)


@pytest.mark.parametrize(
    ("forward", "zero_centered", "rounding"),
    [(_llama, False, "input"), (_t5, False, "weight"), (_gemma, True, None), (_olmo, False, None)],
)
def test_a_norm_of_transformers_is_known_by_its_values(
    forward: Callable[..., torch.Tensor], zero_centered: bool, rounding: str | None
) -> None:
    norm = _of_transformers("SomeRMSNorm", forward)(64).to(torch.bfloat16)
    op = RMSNorm.of(norm)
    assert op.weight is norm.weight
    assert (op.zero_centered_gamma, op.normalized_dtype) == (zero_centered, rounding)
    assert op.eps == 1e-6
    with torch.no_grad():
        norm.weight.uniform_(0.2, 1.8)
    x = torch.randn(8, 64, dtype=torch.bfloat16)
    assert (op(x) != norm(x)).double().mean() < 0.01


def test_a_norm_of_another_formula_is_no_op() -> None:
    norm = _of_transformers("SomeRMSNorm", _squared)(64)
    with pytest.raises(og.OpError, match="probe values are those of no setting of RMSNorm"):
        RMSNorm.of(norm)
    unlike = _of_transformers("GatedNorm", lambda self, x: x.missing)(64)
    with pytest.raises(og.OpError, match="probe values"):
        RMSNorm.of(unlike)


def test_activations_of_transformers_are_ops() -> None:
    silu = type("SiLUActivation", (nn.Module,), {"__module__": "transformers.activations"})()
    assert type(og.Sequential.from_torch(nn.Sequential(silu), strict=True)[0]) is SiLU
    alien = type("SiLUActivation", (nn.Module,), {})()
    with pytest.raises(og.OpError, match="no op is known for the class SiLUActivation"):
        SiLU.of(alien)


class Conv1D(nn.Module):
    """As transformers': the weight is `[in, out]`."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, out: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, out) / width**0.5)
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addmm(self.bias, x, self.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_conv1d_is_a_linear_that_reads_its_weight(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    first, second = Conv1D(48, 24).to(dtype), Conv1D(24, 48).to(dtype)
    module = og.Sequential(Linear.of(first), SiLU(), TransposedLinear.of(second))
    assert [id(p) for p in module.parameters()] == [
        id(p) for p in (*first.parameters(), *second.parameters())
    ]
    x = torch.randn(5, 24).to(dtype).requires_grad_()
    again = x.detach().clone().requires_grad_()
    for _ in range(3):  # recorded, then replayed
        first.zero_grad(), second.zero_grad()
        y, expected = module(x), second(nn.functional.silu(first(again)))
        tolerance = {"rtol": 2e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {}
        torch.testing.assert_close(y, expected, **tolerance)
        y.sum().backward()
        found = [p.grad for p in (*first.parameters(), *second.parameters())]
        first.zero_grad(), second.zero_grad()
        expected.sum().backward()
        for p, gradient in zip((*first.parameters(), *second.parameters()), found, strict=True):
            torch.testing.assert_close(gradient, p.grad, **tolerance)
    with torch.no_grad():
        first.weight.mul_(2)
    twice = second(nn.functional.silu(first(x)))
    torch.testing.assert_close(module(x), twice, rtol=4e-2, atol=6e-2)
    copied = copy.deepcopy(nn.ModuleList([first, second, module]))
    assert copied[2][0].weight is copied[0].weight


def test_from_torch_takes_a_conv1d_and_not_one_that_was_changed() -> None:
    model = nn.Sequential(Conv1D(6, 4), nn.SiLU(), Conv1D(4, 6))
    fused = og.Sequential.from_torch(model, strict=True)
    assert type(fused[0]) is TransposedLinear
    x = torch.randn(3, 4)
    torch.testing.assert_close(fused(x), model(x))
    hooked = Conv1D(4, 4)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(og.OpError, match=r"of\(Conv1D\): it has hooks"):
        Linear.of(hooked)


def test_what_is_left_alone_is_said_with_its_reason() -> None:
    hooked = nn.ReLU()
    hooked.register_forward_hook(lambda *_: None)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Sequential(hooked, nn.Hardtanh()))
    expected = r"1\.0 \(ReLU\): it has hooks.*1\.1 \(Hardtanh\): no op is known"
    with pytest.warns(UserWarning, match=expected):
        og.Sequential.from_torch(plain)
    with pytest.raises(og.PlanError, match=expected):
        og.Sequential.from_torch(plain, strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        og.Sequential.from_torch(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), strict=True)


def test_of_shares_the_parameters_also_in_copies() -> None:
    layer = nn.Linear(6, 4)
    op = Linear.of(layer)
    assert op.weight is layer.weight
    assert list(op.state_dict()) == list(layer.state_dict())
    x = torch.randn(3, 6)
    for one, other in (copy.deepcopy((op, layer)), pickle.loads(pickle.dumps((op, layer)))):
        assert one.weight is other.weight
        assert one.weight is not layer.weight
        torch.testing.assert_close(one(x), layer(x))
    op(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(4, 6))


def test_of_refuses_what_would_compute_something_else() -> None:
    with pytest.raises(og.OpError, match=r"RMSNorm: got of\(Linear\), which computes what Linear"):
        RMSNorm.of(nn.Linear(4, 4))
    with pytest.raises(og.OpError, match=r"of\(a tensor of shape .*\), expected a torch.nn.Module"):
        Linear.of(torch.zeros(2))  # type: ignore[arg-type]
    wrong, surplus, hooked = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    wrong.weight = nn.Parameter(torch.zeros(3, 4))
    surplus.extra = nn.Parameter(torch.zeros(1))
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(og.OpError, match=r"its weight has shape \(3, 4\), and its sizes say"):
        Linear.of(wrong)
    with pytest.raises(og.OpError, match="other parameters, buffers or submodules"):
        Linear.of(surplus)
    with pytest.raises(og.OpError, match="hooks or a forward of its own"):
        Linear.of(hooked)
