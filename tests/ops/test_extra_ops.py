"""Ops whose extra inputs have shapes of their own: groups, row scales, modulation by sample."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from compare import LAYOUTS, lay_out
from torch import Tensor, nn

import opsgraph as og
from opsgraph import ops
from opsgraph.testing.formulas import FORMULAS

TOLERANCES = {
    torch.float32: (1e-3, 1e-5),  # GEMMs inside
    torch.float16: (1e-3, 2e-3),  # the scaled value is rounded one time more than the formula
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
ROWS, SIZES = 12, [5, 0, 7]


def _scaled(plain: nn.Module) -> Callable[..., Tensor]:
    """The plain activation's formula, times the scales."""

    def formula(parameters: dict[str, Tensor], x: Tensor, scales: Tensor) -> Tensor:
        return FORMULAS[type(plain)](plain, x, lambda name: None) * scales[..., None]

    return formula


def _tanh_srelu(parameters: dict[str, Tensor], x: Tensor, scales: Tensor) -> Tensor:
    clamped = 1.5 * torch.tanh(x.clamp(min=0) / 1.5)
    return clamped * clamped * scales[..., None]


def _grouped(parameters: dict[str, Tensor], x: Tensor, sizes: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    group = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
    weights, biases = (
        [parameters[f"0.{n}{g}"] for g in range(len(sizes)) if f"0.{n}{g}" in parameters]
        for n in ("weight", "bias")
    )
    y = torch.einsum("ri,roi->ro", rows, torch.stack(weights)[group])
    y = y + torch.stack(biases)[group] if biases else y
    return y.reshape(*x.shape[:-1], -1)


def _turned_groups(parameters: dict[str, Tensor], x: Tensor, sizes: Tensor) -> Tensor:
    whole = parameters.get("0.weight")
    named = {n: p.mT if "weight" in n else p for n, p in parameters.items()}
    if whole is not None:
        named = {f"0.weight{g}": weight for g, weight in enumerate(whole.mT)}
    return _grouped(named, x, sizes)


def _modulated(parameters: dict[str, Tensor], x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * (1 + scale[:, None]) + shift[:, None]


def _rms(parameters: dict[str, Tensor], x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    h = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    return _modulated(parameters, h, scale, shift)


def _layer(parameters: dict[str, Tensor], x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    h = x - x.mean(-1, keepdim=True)
    h = h / (h.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    return _modulated(parameters, h, scale, shift)


def _lora(*args: Any, **options: Any) -> ops.LoRA:
    """With lora_B other than 0, where it starts."""
    op = ops.LoRA(*args, **options)
    nn.init.normal_(op.lora_B)
    return op


def _branch(parameters: dict[str, Tensor], prefix: str, other: Tensor) -> Tensor:
    return other @ parameters[f"{prefix}lora_A"].T @ parameters[f"{prefix}lora_B"].T


def _low_rank(parameters: dict[str, Tensor], x: Tensor, other: Tensor) -> Tensor:
    return x + 2.0 * _branch(parameters, "0.", other)


def _low_rank_at_3(parameters: dict[str, Tensor], x: Tensor, other: Tensor) -> Tensor:
    return x + nn.functional.pad(_branch(parameters, "0.", other), (3, 1))


def _adapted(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    y = x @ parameters["0.linear.weight"].T + parameters["0.linear.bias"]
    second = nn.functional.pad(_branch(parameters, "0.branches.1.", x), (2, 1))
    return y + 2.0 * _branch(parameters, "0.branches.0.", x) + second


class Case(NamedTuple):
    build: Callable[[], nn.Module]
    formula: Callable[..., Tensor]
    extras: Callable[[tuple[int, ...]], list[Tensor]]
    shapes: tuple[tuple[int, ...], ...] = ((ROWS, 8), (3, 4, 8), (1, 12, 8))


def _scales(shape: tuple[int, ...]) -> list[Tensor]:
    return [torch.rand(shape[:-1], dtype=torch.double) + 0.5]


def _sizes(shape: tuple[int, ...]) -> list[Tensor]:
    return [torch.tensor(SIZES)]


def _samples(shape: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape[0], shape[-1], dtype=torch.double) for _ in range(2)]


def _others(shape: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*shape[:-1], 6, dtype=torch.double)]


CLAMPED = {"limit": 1.0, "alpha": 1.5, "glu_linear_offset": 0.5}
SAMPLED = ((3, 4, 8), (12, 1, 8), (2, 2, 3, 8))
TABLE = {
    "ScaledSwiGLU": Case(ops.ScaledSwiGLU, _scaled(ops.SwiGLU()), _scales),
    "ScaledGEGLU": Case(ops.ScaledGEGLU, _scaled(ops.GEGLU()), _scales),
    "ScaledReGLU": Case(ops.ScaledReGLU, _scaled(ops.ReGLU()), _scales),
    "ScaledQGEGLU": Case(ops.ScaledQGEGLU, _scaled(ops.QGEGLU()), _scales),
    "ScaledSReLU": Case(ops.ScaledSReLU, _scaled(ops.SReLU()), _scales),
    "ScaledClampedSwiGLU": Case(
        lambda: ops.ScaledClampedSwiGLU(**CLAMPED), _scaled(ops.ClampedSwiGLU(**CLAMPED)), _scales
    ),
    "ScaledClampedQGeGLU": Case(
        lambda: ops.ScaledClampedQGeGLU(**CLAMPED), _scaled(ops.ClampedSwiGLU(**CLAMPED)), _scales
    ),
    "ScaledClampedQGeGLU interleaved": Case(
        lambda: ops.ScaledClampedQGeGLU(2, **CLAMPED),
        _scaled(ops.ClampedSwiGLU(**CLAMPED, glu_interleave_size=2)),
        _scales,
    ),
    "ScaledSiTUGLU": Case(
        lambda: ops.ScaledSiTUGLU(beta1=0.5, beta2=0.75), _scaled(ops.SiTUGLU(0.5, 0.75)), _scales
    ),
    "ScaledSiTUGLU interleaved": Case(
        lambda: ops.ScaledSiTUGLU(1), _scaled(ops.SiTUGLU(glu_interleave_size=1)), _scales
    ),
    "ScaledTanhSReLU": Case(lambda: ops.ScaledTanhSReLU(1.5), _tanh_srelu, _scales),
    "GroupedLinear": Case(lambda: ops.GroupedLinear(3, 8, 5), _grouped, _sizes),
    "GroupedLinear without bias": Case(
        lambda: ops.GroupedLinear(3, 8, 5, bias=False), _grouped, _sizes
    ),
    "TransposedGroupedLinear": Case(
        lambda: ops.TransposedGroupedLinear(3, 8, 5), _turned_groups, _sizes
    ),
    "TransposedGroupedLinear of one parameter": Case(
        lambda: ops.TransposedGroupedLinear(3, 8, 5, bias=False, single_grouped_weight=True),
        _turned_groups,
        _sizes,
    ),
    "Modulate": Case(ops.Modulate, _modulated, _samples, SAMPLED[:2]),
    "AdaptiveRMSNorm": Case(lambda: ops.AdaptiveRMSNorm(eps=1e-3), _rms, _samples, SAMPLED[:2]),
    "AdaptiveLayerNorm": Case(
        lambda: ops.AdaptiveLayerNorm(8, eps=1e-3), _layer, _samples, SAMPLED[:2]
    ),
    "LoRA": Case(lambda: _lora(6, 8, 3, alpha=6.0), _low_rank, _others),
    "LoRA from a column": Case(lambda: _lora(6, 4, 3, start=3), _low_rank_at_3, _others),
    "LoRALinear": Case(
        lambda: ops.LoRALinear(
            ops.Linear(8, 5), _lora(8, 5, 3, alpha=6.0), _lora(8, 2, 3, start=2)
        ),
        _adapted,
        lambda shape: [],
    ),
}

EXTRA_OPS = {type(case.build()).__name__ for case in TABLE.values()}
EXTRA_OPS |= {"AllGather", "AllReduce", "AllReduceGrad", "ReduceScatter"}  # tests/distributed
CASES = [(name, shape) for name, case in TABLE.items() for shape in case.shapes]


def _run(function: Callable[..., Tensor], tensors: list[Tensor], wanted: list[Tensor]) -> list[Any]:
    y = function(*tensors)
    torch.manual_seed(3)
    dy = torch.randn(y.shape, dtype=torch.double).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


@pytest.mark.sampled(405)
@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name, shape", CASES, ids=lambda v: str(v).replace(" ", "_"))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_op_equals_its_formula(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    torch.manual_seed(0)
    case = TABLE[name]
    module = og.Sequential(case.build()).to(dtype)
    x = lay_out(torch.randn(shape, dtype=torch.double).to(dtype), layout)
    extras = [
        lay_out(e.to(dtype), layout) if e.is_floating_point() else e for e in case.extras(shape)
    ]
    inputs = [x, *extras]
    before = [t.clone() for t in inputs]
    for tensor in inputs:
        tensor.requires_grad_(tensor.is_floating_point())
    moving = [t for t in inputs if t.requires_grad]
    found = _run(module, inputs, [*moving, *module.parameters()])
    exact = [t.detach().double().requires_grad_() if t.requires_grad else t for t in inputs]
    parameters = {n: p.detach().double().requires_grad_() for n, p in module.named_parameters()}
    wanted = [*(t for t in exact if t.requires_grad), *parameters.values()]
    expected = _run(lambda *t: case.formula(parameters, *t), exact, wanted)
    rtol, atol = TOLERANCES[dtype]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        size = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(one.double(), other, rtol=rtol, atol=atol * size)
    for tensor, old in zip(inputs, before, strict=True):
        assert torch.equal(tensor, old)


def test_scales_may_have_another_dtype_and_keep_it_in_their_gradient() -> None:
    x = torch.randn(6, 8, dtype=torch.bfloat16, requires_grad=True)
    scales = torch.rand(6, requires_grad=True)
    ops.ScaledSwiGLU()(x, scales).float().sum().backward()
    assert scales.grad is not None
    assert scales.grad.dtype == torch.float32


@pytest.mark.parametrize("op", [ops.Modulate, ops.AdaptiveLayerNorm, ops.AdaptiveRMSNorm])
@pytest.mark.parametrize("shape", [(0, 8), (0, 3, 8), (4, 0, 8), (4, 3, 0)])
def test_modulation_takes_no_samples_no_rows_and_no_columns(
    op: Callable[[], og.Op], shape: tuple[int, ...]
) -> None:
    sizes = shape, (shape[0], shape[-1]), (shape[0], shape[-1])
    x, scale, shift = (torch.randn(size, requires_grad=True) for size in sizes)
    y = og.Sequential(op())(x, scale, shift)
    y.sum().backward()
    assert y.shape == shape
    for tensor in (x, scale, shift):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))


def test_wrong_extra_inputs_are_named() -> None:
    x = torch.randn(6, 8)
    with pytest.raises(og.OpError, match=r"0:ScaledSwiGLU: got scales f32\[\*,8\], expected f32"):
        og.Sequential(ops.ScaledSwiGLU())(x, x)
    with pytest.raises(og.OpError, match=r"split_sizes \[4, 4\], expected sizes that add to 6"):
        og.Sequential(ops.GroupedLinear(2, 8, 4))(x, torch.tensor([4, 4]))
    with pytest.raises(og.OpError, match="got 4 samples, expected a divisor of 6 rows"):
        og.Sequential(ops.Modulate())(x, torch.randn(4, 8), torch.randn(4, 8))
    with pytest.raises(og.OpError, match=r"Modulate: got scale \(3, 4\)"):
        og.Sequential(ops.Modulate())(x, torch.randn(3, 4), torch.randn(3, 8))


def test_grouped_linear_of_no_groups_is_refused() -> None:
    with pytest.raises(og.OpError, match="GroupedLinear: got num_groups=0, expected"):
        ops.GroupedLinear(0, 8, 4)


def test_grouped_linear_loads_transformer_engine_keys() -> None:
    op = ops.GroupedLinear(2, 3, 4)
    state = {f"weight{g}": torch.full((4, 3), float(g)) for g in range(2)}
    state |= {f"bias{g}": torch.full((4,), 10.0 + g) for g in range(2)}
    op.load_state_dict(state)
    assert op.weight[1].eq(1.0).all()
    assert op.bias is not None
    assert op.bias[0].eq(10.0).all()


def test_grouped_mlp_with_scales_trains() -> None:
    torch.manual_seed(0)
    sizes, scales = torch.tensor([3, 0, 5]), torch.rand(8, requires_grad=True)
    mlp = og.Sequential(ops.GroupedLinear(3, 6, 16), ops.ScaledSwiGLU(), ops.GroupedLinear(3, 8, 6))
    x = torch.randn(8, 6, requires_grad=True)
    y = mlp(x, sizes, scales, sizes)
    y.sum().backward()
    assert y.shape == (8, 6)
    empty = mlp[0].weight.grad[1]
    assert empty.eq(0).all()
    assert scales.grad is not None
    assert scales.grad.abs().sum() > 0


class TestChannels:
    """Named values between ops, by DESIGN's names and by TransformerEngine's methods."""

    def test_fan_out_and_the_caller(self) -> None:
        tee = ops.MakeExtraOutput()
        tee.set_extra_output_channel(0, "r", output_to_caller=True)
        adds = [ops.AddExtraInput(), ops.AddExtraInput()]
        for add in adds:
            add.set_extra_input_channel(0, "r")
        module = og.Sequential(tee, ops.ConstantScale(2.0), adds[0], adds[1])
        x = torch.randn(3, 4, requires_grad=True)
        y, out = module(x)
        torch.testing.assert_close(y, 4 * x)
        assert torch.equal(out, x)
        (y.sum() + 3 * out.sum()).backward()
        torch.testing.assert_close(x.grad, torch.full_like(x, 7.0))

    def test_not_handed_to_the_caller(self) -> None:
        tee, add = ops.MakeExtraOutput(), ops.AddExtraInput()
        tee.set_extra_output_channel(0, "r", output_to_caller=False)
        add.set_extra_input_channel(0, "r")
        x = torch.randn(3, 4)
        assert torch.equal(og.Sequential(tee, add)(x), 2 * x)

    def test_any_extra_input_may_read_a_channel(self) -> None:
        linear = ops.Linear(4, 8)
        scaled = ops.ScaledSwiGLU()
        with pytest.raises(IndexError, match="ScaledSwiGLU: got extra input 1 of 1"):
            scaled.set_extra_input_channel(1, "r")
        with pytest.raises(IndexError, match="Linear: got extra output 0 of 0"):
            linear.set_extra_output_channel(0, "r")

    def test_errors_at_construction(self) -> None:
        add = ops.AddExtraInput()
        add.set_extra_input_channel(0, "r")
        with pytest.raises(og.PlanError, match="got channel 'r' for other, expected one that"):
            og.Sequential(ops.GELU(), add)
        with pytest.raises(og.PlanError, match="1:Tee: channel 'r' has two producers"):
            og.Sequential(ops.Tee("r"), ops.Tee("r"), ops.Add("r"))
        with pytest.raises(og.PlanError, match="1:Tee: channel 'r' is read before it is provided"):
            og.Sequential(ops.Add("r"), ops.Tee("r"))

    def test_across_a_plain_module(self) -> None:
        add = ops.AddExtraInput()
        add.set_extra_input_channel(0, "r")
        module = og.Sequential(ops.Tee("r"), ops.GELU(), nn.Tanh(), add)
        x = torch.randn(3, 4)
        gelu = nn.functional.gelu(x, approximate="tanh")
        torch.testing.assert_close(module(x), x + torch.tanh(gelu))

    def test_widths_must_agree(self) -> None:
        module = og.Sequential(ops.Tee("r"), ops.Linear(4, 6), ops.Add("r"))
        with pytest.raises(og.OpError, match=r"2:Add: got other f32\[\*,4\], expected f32\[\*,6\]"):
            module(torch.randn(2, 4))
