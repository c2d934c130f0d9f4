"""What cuBLASLt is given for blocks of scales: layouts against the manuals' formulas, in numpy.

`manual` reads operands as cuBLAS documents them, has PyTorch's call check shapes and strides, and
multiplies in fp64; it shares nothing with the code that lays them out.
"""

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import opsgraph as og
from opsgraph.fusers.cublaslt import products
from opsgraph.fusers.cublaslt.products import scaled_mm
from opsgraph.kernels.cublaslt import scaled_mm as operands
from opsgraph.kernels.cublaslt.scaled_mm import tiles
from opsgraph.kernels.formats import Format, inverse_shape
from opsgraph.op import Spec
from opsgraph.quantizers import BlockQuantizer, MXQuantizer, NVFP4Quantizer, Quantizer

call = getattr(F, "scaled_mm", None)  # new in PyTorch 2.10, as its enums are
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
PAIRS: dict[str, tuple[Quantizer, Quantizer]] = {
    "blocks": (BlockQuantizer(E4M3), BlockQuantizer(E4M3)),
    "blocks by squares": (BlockQuantizer(E4M3), BlockQuantizer(E4M3, 128)),
    "squares by blocks": (BlockQuantizer(E4M3, 128), BlockQuantizer(E4M3, power_of_two=False)),
    "mx": (MXQuantizer(), MXQuantizer(E5M2)),
    "nvfp4": (NVFP4Quantizer(), NVFP4Quantizer(hadamard=True)),
    "nvfp4 squares": (NVFP4Quantizer(), NVFP4Quantizer(16)),
}


def tiled(flat: np.ndarray, rows: int, cols: int) -> np.ndarray:
    """Entry (r, c) of scales in tiles of 128 x 4, as the manual gives its place."""
    across = -(-cols // 4)
    assert flat.size == -(-rows // 128) * across * 512
    found = np.empty((rows, cols), flat.dtype)
    for r in range(rows):
        for c in range(cols):
            tile = (r // 128) * across + c // 4
            found[r, c] = flat[tile * 512 + (r % 32) * 16 + ((r % 128) // 32) * 4 + c % 4]
    return found


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (32, 4), (128, 4), (130, 9), (300, 3)])
def test_tiles(rows: int, cols: int) -> None:
    torch.manual_seed(rows)
    scale = torch.randint(0, 255, (rows, cols), dtype=torch.uint8)
    assert np.array_equal(tiled(tiles(scale).numpy(), rows, cols), scale.numpy())


def _values(data: Tensor, scales: list[Tensor], scalings: Any, swizzles: Any) -> np.ndarray:
    """An operand `[rows, depth]`, in fp64."""
    assert data.is_contiguous()
    rows, scale = data.shape[0], scales[0]
    kind = F.ScalingType(scalings[0])
    if kind == F.ScalingType.BlockWise1x16:
        assert data.dtype == torch.float4_e2m1fn_x2
        code = data.view(torch.uint8).numpy()
        value = E2M1[np.stack((code & 15, code >> 4), 2).reshape(rows, -1)]
        assert F.ScalingType(scalings[1]) == F.ScalingType.TensorWise
        assert scales[1].dtype == torch.float32
        assert scales[1].numel() == 1
        value = value * scales[1].item()
    else:
        value = data.double().numpy()
    depth = value.shape[1]
    if kind in (F.ScalingType.BlockWise1x16, F.ScalingType.BlockWise1x32):
        assert F.SwizzleType(swizzles[0]) == F.SwizzleType.SWIZZLE_32_4_4
        assert scale.is_contiguous()
        block = 16 if kind == F.ScalingType.BlockWise1x16 else 32
        grid = tiled(scale.view(torch.uint8).numpy(), rows, depth // block)
        assert depth % 32 == 0
        assert scale.dtype == (E4M3 if block == 16 else torch.float8_e8m0fnu)
        factor = torch.from_numpy(grid).view(scale.dtype).float().double().numpy()
        return value * factor.repeat(block, 1)
    assert depth % 128 == 0
    assert scale.dtype == torch.float32
    across = depth // 128
    if kind == F.ScalingType.BlockWise1x128:
        assert scale.shape == (rows, across)
        assert scale.stride() == (1, rows) or across == 1
        assert rows % 4 == 0  # of what lies between two columns, 16 bytes
        return value * scale.double().numpy().repeat(128, 1)
    assert kind == F.ScalingType.BlockWise128x128
    filled = -(-across // 4) * 4
    assert scale.shape == (filled, -(-rows // 128))
    assert scale.stride() == (1, filled)
    grid = scale.t()[:, :across].double().numpy()
    return value * grid.repeat(128, 0)[:rows].repeat(128, 1)


def meta(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def manual(
    a: Tensor, b: Tensor, scale_a: Any, scaling_a: Any, scale_b: Any, scaling_b: Any,
    swizzle_a: Any, swizzle_b: Any, output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    assert b.size(1) % 16 == 0
    assert call is not None
    seen = call(
        meta(a), meta(b), [meta(s) for s in scale_a], scaling_a, [meta(s) for s in scale_b],
        scaling_b, swizzle_a, swizzle_b, output_dtype=output_dtype,
    )  # fmt: skip
    assert seen.shape == (a.size(0), b.size(1))
    left = _values(a, scale_a, scaling_a, swizzle_a)
    right = _values(b.t(), scale_b, scaling_b, swizzle_b)
    return torch.from_numpy(left @ right.T).to(output_dtype)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call as the manual says."""
    if call is None:
        pytest.skip("this PyTorch has no torch.nn.functional.scaled_mm")
    monkeypatch.setattr(F, "scaled_mm", manual)


@pytest.mark.parametrize("depth", [384, 512])
@pytest.mark.parametrize("rows", [1, 130, 256])
@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.usefixtures("library")
def test_operands(name: str, rows: int, depth: int) -> None:
    """Three products of a layer; rows are contracted over in the last, and fill no block."""
    torch.manual_seed(rows)
    first, second = PAIRS[name]
    x, weight = torch.randn(rows, depth), torch.randn(256, depth)
    cases = [(first(x).row, second(weight).row), (first(weight).row, second(weight).row)]
    if name != "squares by blocks":
        cases.append((first(x).row, second(weight.t().contiguous()).col))
    if not (first.shared or second.shared):
        cases.append((first(torch.randn(rows, 256)).col, second(x).col))
    for a, b in cases:
        assert a is not None
        assert b is not None
        found = scaled_mm(a, b, torch.float32)
        expected = a.dequantize(torch.float64) @ b.dequantize(torch.float64).t()
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


WITHOUT = """
import torch
import torch.nn.functional as F

for name in ("scaled_mm", "ScalingType", "SwizzleType"):
    if hasattr(F, name):
        delattr(F, name)
from opsgraph.fusers.cublaslt import products as cublaslt
from opsgraph.quantizers import RowQuantizer, TensorQuantizer

calls = []
torch._scaled_mm = lambda a, b, *scales, **options: calls.append(a.shape) or a.new_zeros(())
for quantizer in (TensorQuantizer(torch.float8_e4m3fn), RowQuantizer(torch.float8_e4m3fn)):
    copy = quantizer(torch.randn(16, 24)).row
    cublaslt.scaled_mm(copy, copy, torch.bfloat16)
assert calls == [(16, 32), (16, 32)], calls
cublaslt.chip = lambda: 10
torch.version.cuda = "13.0"
reasons = {family.about: family.why_not() for family in cublaslt.FAMILIES}
assert reasons["FP8, a scale per row"] is None, reasons
assert "torch 2.10" in reasons["NVFP4"], reasons
"""


def test_products_with_scales_of_tensors_and_rows_take_no_scaled_mm() -> None:
    """PyTorch 2.9 has neither that function nor its enums, and blocks of scales are emulated."""
    subprocess.run([sys.executable, "-c", WITHOUT], check=True)


@pytest.mark.parametrize("height", [1, 128])
@pytest.mark.parametrize("rows", [1, 130, 256])
def test_inverses_of_blocks_are_parts_of_copies_where_products_read_them(
    rows: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA; a product then has nothing to lay out, but rows that it fills up."""
    monkeypatch.setattr(BlockQuantizer, "inverts_on", lambda self, device: True)
    quantizer, x = BlockQuantizer(E4M3, height), torch.randn(rows, 640)
    value, spec = quantizer(x), Spec((rows, 640), x.dtype, x.device)
    parts = {name: quantizer.parts(value, name) for name in ("row", "col")}
    for name, made in parts.items():
        assert [part.shape for part in made] == [s.shape for s in quantizer.part_specs(spec, name)]
    again = quantizer.load(x.dtype, **parts)
    monkeypatch.setattr(operands, "inverse_of", None)
    for copy, right in ((again.row, x), (again.col, x.t())):
        assert copy is not None
        torch.testing.assert_close(copy.dequantize(), right, rtol=0.07, atol=0.07)
        data, scale, _ = products._factors(copy, 4)
        lines = copy.scale if height > 1 else copy.scale.t()
        filled = 4 if height == 1 else 1
        assert data.size(0) == -(-right.size(0) // filled) * filled
        assert torch.equal(scale[:, : lines.size(1)], lines.reciprocal())
        assert torch.equal(scale[:, lines.size(1) :], torch.ones_like(scale[:, lines.size(1) :]))


@pytest.mark.parametrize("height", [1, 128])
@pytest.mark.parametrize("rows, cols", [(0, 130), (130, 0), (0, 0)])
def test_inverses_of_blocks_of_nothing_have_the_shape_of_others(
    rows: int, cols: int, height: int
) -> None:
    quantizer = BlockQuantizer(E4M3, height)
    copy = quantizer(torch.randn(rows, cols)).row
    assert copy is not None
    assert isinstance(to := quantizer.format, Format)
    assert quantizer.inverted(copy.scale).shape == inverse_shape(to.scaling, rows, cols)


def test_no_rows_under_blocks_whose_inverses_are_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, but for weights, whose two copies have the same parts elsewhere."""
    monkeypatch.setattr(BlockQuantizer, "inverts_on", lambda self, device: not self.shared)
    module = og.Sequential(og.ops.Linear(32, 16), backends=("reference",))
    x = torch.randn(0, 32, requires_grad=True)
    with og.autocast(recipe=og.recipe.Float8BlockScaling()):
        y = module(x)
    y.sum().backward()
    assert (y.shape, x.grad.shape if x.grad is not None else None) == ((0, 16), (0, 32))
    assert torch.equal(module[0].weight.grad, torch.zeros(16, 32))


def test_plans_of_blocks_with_inverses_as_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same values, of an input that is saved quantized."""
    x, recipe = torch.randn(12, 256), og.recipe.Float8BlockScaling()
    found = []
    for inverts, backends in ((False, ("reference",)), (True, ("aten", "reference"))):  # two plans
        monkeypatch.setattr(
            BlockQuantizer, "inverts_on", lambda self, _, inverts=inverts: inverts > self.shared
        )
        torch.manual_seed(0)
        module = og.Sequential(
            og.ops.Linear(256, 128), og.ops.Linear(128, 256), backends=backends
        )  # fmt: skip
        with og.autocast(recipe=recipe):
            y, plan = module(x), module.plan(training=True)
        assert ("xq0_2" in plan.backward_source) == inverts
        gradients = torch.autograd.grad(y, [*module.parameters()], torch.ones_like(y))
        found.append([y, *gradients])
    assert all(map(torch.equal, *found))
