"""Scaled GEMMs: by the same PyTorch call on the CPU, which computes them slowly and exactly, and,
marked gpu, by the library, in all formats that the chip has."""

import pytest
import torch
import torch.nn.functional as F
from recipe_cases import RECIPES, example, mlp, results
from torch import Tensor

import opsgraph as og
from opsgraph.base import backend
from opsgraph.fuser import registered
from opsgraph.fusers.cublaslt import products as cublaslt
from opsgraph.fusers.cublaslt.products import FAMILIES, scaled_mm
from opsgraph.kernels import choices
from opsgraph.kernels.cublaslt import blocks
from opsgraph.ops import Linear, RMSNorm, SwiGLU
from opsgraph.quantizers import (
    BlockQuantizer,
    MXQuantizer,
    NVFP4Quantizer,
    Quantizer,
    RowQuantizer,
    TensorQuantizer,
)
from opsgraph.testing import check_fuser

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


@pytest.fixture(autouse=True)
def on_the_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "gpu" in request.keywords:
        return
    monkeypatch.setattr(cublaslt, "chip", lambda: 0)
    everywhere = backend.Backend("cublaslt", "the same calls")
    monkeypatch.setitem(backend._BACKENDS, "cublaslt", everywhere)


@pytest.mark.parametrize("rows", [0, 1, 32, 37])
@pytest.mark.parametrize("kind", [TensorQuantizer, RowQuantizer])
def test_products(kind: type[TensorQuantizer], rows: int) -> None:
    if kind is RowQuantizer and torch.__version__ < "2.12":
        pytest.skip("on the CPU this PyTorch takes scales of whole tensors only")
    torch.manual_seed(0)
    x, weight, dy = torch.randn(rows, 64), torch.randn(48, 64), torch.randn(rows, 48)
    qx, qw, qdy = kind(E4M3)(x), kind(E4M3)(weight), kind(E5M2)(dy)
    for a, b in ((qx.row, qw.row), (qdy.row, qw.col), (qdy.col, qx.col)):
        expected = a.dequantize() @ b.dequantize().t()
        torch.testing.assert_close(scaled_mm(a, b, torch.float32), expected)
    bias = torch.randn(48)
    found = scaled_mm(qx.row, qw.row, torch.float32, True, bias)
    torch.testing.assert_close(found, qx.row.dequantize() @ qw.row.dequantize().t() + bias)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_library_gets_an_aligned_bias(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever multiplies: its kernels read several values of a bias at once."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    x, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((32, 64), (48, 64), (48,)))
    quantizer = TensorQuantizer(E4M3)
    a, b = (quantizer(t.to(device)).row for t in (x, weight))
    expected = scaled_mm(a, b, dtype, True, bias.to(device))
    multiply, seen = torch._scaled_mm, []

    def watched(*args: object, bias: Tensor, **options: object) -> Tensor:
        seen.append(bias.data_ptr() % 16 == 0 and bias.is_contiguous())
        return multiply(*args, bias=bias, **options)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    inside, apart = torch.zeros(49, dtype=dtype, device=device), torch.zeros(96, dtype=dtype)
    for view in (inside[1:], apart.to(device)[::2]):
        view.copy_(bias)
        assert torch.equal(scaled_mm(a, b, dtype, True, view), expected)
    assert all(seen)
    assert seen or device == "cuda"  # there, opsgraph's own call


@pytest.mark.parametrize("name", ["ScaledLinear", "ScaledLinearBackward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fusers(name: str, dtype: torch.dtype) -> None:
    (fuser,) = [f for f in registered() if f.name == name]
    assert check_fuser(fuser, dtype) > 0


def test_a_whole_block_takes_what_was_quantized() -> None:
    native = mlp(backends=("cublaslt", "reference"))
    reference = og.Sequential(*native, backends=("reference",))
    recipe = RECIPES["current"]
    with og.autocast(recipe=recipe):
        plan = native.plan()
    names = [step.name for step in (*plan.forward, *plan.backward)]
    assert names.count("ScaledLinear") == names.count("ScaledLinearBackward") == 2
    assert "BasicLinear" not in names
    for one, other in zip(
        results(native, recipe, example()), results(reference, recipe, example()), strict=True
    ):
        assert float((one - other).norm()) <= 6e-2 * float(other.norm())


@pytest.mark.parametrize("name", ["current", "delayed"])
def test_a_scale_is_inverted_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for each of the two or three products that read it."""
    monkeypatch.setenv("OPSGRAPH_REPLAY", "0")  # a recorder sees every op, too
    module = og.Sequential(Linear(64, 64, bias=False), backends=("cublaslt", "reference"))
    recipe = RECIPES[name]
    x = example(dtype=torch.float32)
    results(module, recipe, x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        results(module, recipe, x)
    counts = {entry.key: entry.count for entry in profile.key_averages()}
    assert counts["aten::_scaled_mm"] == 2  # and a weight gradient, emulated off the GPU
    assert counts["aten::reciprocal"] == 3  # of x, the weight and the gradient


def test_main_grad() -> None:
    layers = [Linear(64, 32, accumulate_into_main_grad=True) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = example(dtype=torch.float32)
    for layer, order in zip(layers, (("cublaslt", "reference"), ("reference",)), strict=True):
        layer.weight.main_grad = torch.ones(32, 64)
        with og.autocast(recipe=RECIPES["current"]):
            og.Sequential(layer, backends=order)(x).square().sum().backward()
    torch.testing.assert_close(layers[0].weight.main_grad, layers[1].weight.main_grad)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mx", "mxe4m3 by mxe4m3 is emulated: units for it are those of sm_100"),
        ("blocks", "e4m3b by e4m3b is emulated: units for it are those of sm_90"),
        ("nvfp4", "nvfp4 by nvfp4 is emulated: units for it are those of sm_100"),
        ("custom", "mxe4m3 by mxe4m3 is emulated: units for it are those of sm_100"),
        ("high precision", "it takes quantized values, and these are not"),
        ("rows", "FP8, a scale per row: it writes bfloat16, not torch.float32"),
    ],
)
def test_refusals_say_why(name: str, reason: str) -> None:
    module = mlp(torch.float32)
    with og.autocast(recipe=RECIPES[name]):
        assert reason in str(module.plan())


@pytest.mark.parametrize(
    ("chip", "cuda", "refused"),
    [
        (8, "13.0", ["e4m3b", "mxe4m3", "nvfp4"]),
        (9, "12.8", ["e4m3b", "mxe4m3", "nvfp4"]),
        (9, "12.9", ["mxe4m3", "nvfp4"]),
        (10, "13.0", ["e4m3b"]),
        (12, "13.0", ["e4m3b", "mxe4m3", "nvfp4"]),
    ],
)
def test_what_a_chip_has(
    chip: int, cuda: str, refused: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cublaslt, "chip", lambda: chip)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(F, "scaled_mm", None, raising=False)  # it is there, as in 2.9 it is not
    assert [f.formats[0] for f in FAMILIES if f.why_not() is not None] == refused
    monkeypatch.delattr(F, "scaled_mm")
    everything = ["e4m3b", "mxe4m3", "nvfp4"]
    assert [f.formats[0] for f in FAMILIES if f.why_not() is not None] == everything


def test_blocks_want_whole_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cublaslt, "chip", lambda: 9)
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(F, "scaled_mm", None, raising=False)  # not there in PyTorch 2.9
    with og.autocast(recipe=RECIPES["blocks"]):
        plan = str(mlp(backends=("cublaslt", "reference")).plan())
        assert "FP8, blocks of 128: in_features 64 is not a multiple of 128" in plan
        whole = og.Sequential(Linear(256, 128, dtype=torch.bfloat16))
        steps = whole.plan()
    names = [step.name for step in (*steps.forward, *steps.backward)]
    assert {"ScaledLinear", "ScaledLinearBackward"} <= set(names)
    assert [step.name for step in steps.forward] == ["QuantizeCPU", "ScaledLinear"]


def test_e5m2_by_e5m2_is_refused() -> None:
    recipe = og.recipe.Float8CurrentScaling(fp8_format=og.recipe.Format.E5M2)
    with og.autocast(recipe=recipe):
        assert "no unit multiplies E5M2 by E5M2" in str(mlp().plan())


NATIVE: dict[str, tuple[Quantizer, Quantizer, Quantizer]] = {
    "tensor": (TensorQuantizer(E4M3), TensorQuantizer(E4M3), TensorQuantizer(E5M2)),
    "rows": (RowQuantizer(E4M3), RowQuantizer(E4M3), RowQuantizer(E4M3)),
    "blocks": (BlockQuantizer(E4M3), BlockQuantizer(E4M3, 128), BlockQuantizer(E4M3)),
    "f32 blocks": (
        BlockQuantizer(E4M3, power_of_two=False),
        BlockQuantizer(E4M3, 128, power_of_two=False),
        BlockQuantizer(E4M3, power_of_two=False),
    ),
    "mx": (MXQuantizer(), MXQuantizer(), MXQuantizer(E5M2)),
    "nvfp4": (NVFP4Quantizer(hadamard=True), NVFP4Quantizer(16), NVFP4Quantizer(hadamard=True)),
    "nvfp4 rows": (NVFP4Quantizer(), NVFP4Quantizer(), NVFP4Quantizer(stochastic=True)),
}
"""Quantizers of an activation, a weight and a gradient."""


def varied(rows: int, cols: int) -> Tensor:
    """Values whose size changes from block to block, so that a scale out of place shows."""
    x = torch.randn(rows, cols, device="cuda")
    down, across = torch.arange(rows, device="cuda"), torch.arange(cols, device="cuda")
    return x * torch.exp2((down[:, None] * 5 // 16 + across // 16 * 3) % 7 - 3.0)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0, 1, 16, 130, 2048])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", NATIVE)
def test_the_library_multiplies_what_copies_stand_for(
    name: str, dtype: torch.dtype, rows: int
) -> None:
    """Within 2^-10 of the magnitudes, the tensor cores' own short sums, and one rounding."""
    quantizers = NATIVE[name]
    family = next(f for f in FAMILIES if quantizers[0].storage.name in f.formats)
    reason = backend.backends()["cublaslt"].why_not() or family.why_not()
    if reason is not None:
        pytest.skip(reason)
    if dtype not in family.dtypes:
        pytest.skip(f"{family.about} does not write {dtype}")
    torch.manual_seed(rows)
    shapes = (rows, 640), (384, 640), (rows, 384)
    x, weight, dy = (q(varied(*shape)) for q, shape in zip(quantizers, shapes, strict=True))
    for a, b in ((x.row, weight.row), (dy.row, weight.col), (dy.col, x.col)):
        assert a is not None
        assert b is not None
        found = scaled_mm(a, b, dtype)
        left, right = a.dequantize().double(), b.dequantize().double()
        exact, size = left @ right.t(), left.abs() @ right.abs().t()
        assert found.dtype == dtype
        assert found.shape == exact.shape
        step = torch.finfo(dtype).eps
        allowed = step * (exact.abs() + torch.finfo(dtype).tiny) + 2.0**-10 * size
        assert ((found.double() - exact).abs() <= allowed).all()


@pytest.mark.gpu
@pytest.mark.parametrize("backends", [("cublaslt", "reference"), None])
@pytest.mark.parametrize("accumulates", [False, True])
@pytest.mark.parametrize("name", ["current", "rows", "blocks", "mx", "nvfp4 plain"])
def test_a_block_by_the_library_is_the_emulated_one(
    name: str, accumulates: bool, backends: tuple[str, ...] | None
) -> None:
    """Quantized by the reference, and by whatever goes before it."""
    recipe = RECIPES[name]
    if name == "rows":
        recipe = og.recipe.Float8CurrentScaling(og.recipe.Format.E4M3, row_wise=True)
    formats = recipe.quantizer("activation").storage.name
    family = next(f for f in FAMILIES if formats in f.formats)
    reason = backend.backends()["cublaslt"].why_not() or family.why_not()
    if reason is not None:
        pytest.skip(reason)
    place = {"device": "cuda", "dtype": torch.bfloat16}
    native = og.Sequential(
        RMSNorm(256), Linear(256, 512, accumulate_into_main_grad=accumulates), SwiGLU(),
        Linear(256, 128, bias=False), backends=backends, **place,
    )  # fmt: skip
    with og.autocast(recipe=recipe):
        names = [step.name for step in (*native.plan().forward, *native.plan().backward)]
    assert names.count("ScaledLinear") == 2
    assert "BasicLinear" not in names
    emulated = og.Sequential(*native, backends=("reference",))
    torch.manual_seed(1)
    x, dy = torch.randn(130, 256, **place), torch.randn(130, 128, **place)
    found = []
    for module in (native, emulated):
        native.zero_grad()
        leaf = x.clone().requires_grad_()
        native[1].weight.main_grad = torch.ones(512, 256, device="cuda")
        with og.autocast(recipe=recipe):
            y = module(leaf)
        y.backward(dy)
        grads = [p.grad for p in native.parameters() if p.grad is not None]
        found.append([y.detach(), leaf.grad, native[1].weight.main_grad, *grads])
    # Where a norm rounds a value to its other neighbour in bf16, FP4 may go a quarter further.
    allowed = 0.2 if backends is None and name.startswith("nvfp4") else 6e-2
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) <= allowed * float(other.norm())


@pytest.mark.gpu
def test_a_linear_layer_by_the_product_of_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and input gradient, in steps that are replayed too."""
    family = next(f for f in FAMILIES if "e4m3b" in f.formats)
    reason = backend.backends()["cublaslt"].why_not() or family.why_not()
    reason = reason or pytest.importorskip("opsgraph.kernels.triton.pairs").none_on(
        torch.device("cuda")
    )
    if reason is not None:
        pytest.skip(reason)
    kept = choices.Choices("blocks", lambda: ("a chip",), lambda runs: [*runs][-1], files=list)
    monkeypatch.setattr(blocks, "_choices", lambda device: kept)
    monkeypatch.setattr(blocks, "_chosen", {})
    monkeypatch.setattr(blocks, "SMALL", 0)
    place = {"device": "cuda", "dtype": torch.bfloat16}
    native = og.Sequential(Linear(1152, 384, **place))
    emulated = og.Sequential(*native, backends=("reference",))
    torch.manual_seed(1)
    x, dy = torch.randn(130, 1152, **place), torch.randn(130, 384, **place)

    def step(module: og.Sequential) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        with og.autocast(recipe=RECIPES["blocks"]):
            y = module(leaf)
        y.backward(dy)
        assert leaf.grad is not None
        return y.detach(), leaf.grad

    expected = step(emulated)
    for _ in range(4):
        for one, other in zip(step(native), expected, strict=True):
            assert float((one - other).norm()) <= 2e-2 * float(other.norm())
    assert [*blocks._chosen.values()] == [blocks.TRITON] * 2
