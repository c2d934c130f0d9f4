"""The CPU's C++ quantizers against the oracle in numpy and the reference formulas, bit for bit."""

import math

import numpy as np
import pytest
import quantize_oracle as oracle
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from opsgraph.kernels.cpu import activations, build
from opsgraph.kernels.cpu.quantize import SCALINGS, activation_quantize, quantize
from opsgraph.kernels.formats import E4M3, E5M2, Format
from opsgraph.kernels.reference import quantize as reference

REASON = build.reason("quantize")
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

DTYPES = (torch.float32, torch.bfloat16)
SMALL = {E4M3: oracle.E4M3, E5M2: oracle.E5M2}
BLOCKS = {"rows": (1, 0), "blocks": (1, 128), "square": (128, 128), "tensor": (0, 0)}
"""Height and width of a scale's block; 0 for all there is."""
SHAPES = ((1, 1), (3, 5), (37, 130), (130, 37), (128, 512), (129, 513), (300, 700), (1, 1100))
each_format = pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_scaling = pytest.mark.parametrize("scaling", SCALINGS)


def values(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Magnitudes over the whole range, zeros, subnormals, infinities, NaNs."""
    x = torch.randn(rows, cols) * torch.exp2(torch.randint(-30, 30, (rows, cols)).float())
    x[rows // 2 :: 7] = 0.0
    x[:, cols // 3 :: 11] = -0.0
    x[rows // 3 :: 13] *= 2.0**-130
    x[rows // 4 :: 17, ::5] = math.inf
    x[rows // 5 :: 19, 1::6] = -math.nan
    return x.to(dtype)


def same(found: Tensor, expected: Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert found.is_contiguous()
    found, expected = found.flatten().view(torch.uint8), expected.contiguous().flatten()
    wrong = found != expected.view(torch.uint8)
    assert not wrong.any(), f"{int(wrong.sum())} bytes of {wrong.numel()} differ"


def by_oracle(x: Tensor, to: Format) -> tuple[Tensor, Tensor]:
    given, small = x.float().numpy(), SMALL[to.dtype]
    if to.scaling == "mx":
        codes, grid = oracle.mxfp8(given, small)
        scale = torch.from_numpy(grid.astype(np.uint8))
    else:
        height, width = BLOCKS[to.scaling]
        height, width = height or x.shape[0], width or x.shape[1]
        codes, grid = oracle.scaled(given, small, height, width, to.eps, to.power_of_two)
        scale = torch.from_numpy(np.ascontiguousarray(grid)).float()
        scale = scale.reshape(()) if to.scaling == "tensor" else scale
    return torch.from_numpy(np.ascontiguousarray(codes)).view(torch.uint8).view(to.dtype), scale


def by_reference(x: Tensor, to: Format) -> tuple[Tensor, Tensor]:
    if to.scaling == "mx":
        return reference.quantize_mxfp8(x, to.dtype)
    options = to.dtype, to.eps, to.power_of_two
    if to.scaling in ("blocks", "square"):
        height = 1 if to.scaling == "blocks" else 128
        return reference.quantize_blocks(x, to.dtype, height, *options[1:])
    whole = reference.quantize_tensor if to.scaling == "tensor" else reference.quantize_rows
    return whole(x, *options)


def check(x: Tensor, to: Format, expect=by_reference) -> None:
    amax, names = reference.amax_of(x), ("amax",) if to.scaling == "tensor" else ()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found = quantize(x, to, None, ("row", "col", *names))
        for copy, source in ((found.row, x), (found.col, x.t())):
            data, scale = expect(source, to)
            same(copy[0], data)
            same(copy[1], scale)
        if names:
            same(found.amax, torch.where(amax.isnan(), math.nan, amax))
            same(found.inverse, found.row[1].reciprocal())


@pytest.mark.sampled(24)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@each_scaling
@each_format
@each_dtype
def test_bits_of_the_reference(dtype, fp8, scaling, shape) -> None:
    for eps, power in ((0.0, False), (1e-3, True)):
        check(values(*shape, dtype), Format(scaling, fp8, eps, power))
        check(torch.randn(shape).to(dtype), Format(scaling, fp8, eps, power))


@each_scaling
@each_format
@each_dtype
def test_bits_of_the_oracle(dtype, fp8, scaling) -> None:
    for power in (False, True):
        check(values(37, 70, dtype), Format(scaling, fp8, 0.0, power), by_oracle)


@each_format
def test_every_bf16_number(fp8) -> None:
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).view(256, 256)
    one = torch.ones(())
    found = quantize(x, Format("tensor", fp8), one, ("row", "col"))
    limit = 448.0 if fp8 == E4M3 else 57344.0
    cast = x.float().clamp(-limit, limit).masked_fill(x.isinf(), math.nan)
    cast = cast.nan_to_num(math.nan).to(fp8)
    same(found.row[0], cast)
    same(found.col[0], cast.t())
    wide = quantize(x.float(), Format("tensor", fp8), one).row
    same(wide[0], cast)


@each_format
@each_dtype
@pytest.mark.sampled(8)
@pytest.mark.parametrize("number", [0.0, math.inf, math.nan, 2.0**-149, 2.0**-130, 3e38])
def test_blocks_of_one_number(number, dtype, fp8) -> None:
    for scaling in SCALINGS:
        x = torch.randn(130, 140).to(dtype)
        x[:, :128] = number
        check(x, Format(scaling, fp8))


@each_format
def test_given_scale(fp8) -> None:
    x, scale = values(200, 600, torch.bfloat16), torch.tensor(0.37)
    found = quantize(x, Format("tensor", fp8), scale, ("row", "col", "amax"))
    expected = reference.cast(x, scale, fp8)
    same(found.row[0], expected)
    same(found.col[0], expected.t())
    assert found.row[1] is scale
    same(found.inverse, scale.reciprocal())
    assert found.amax.isnan()
    only = quantize(x[:1], Format("tensor", fp8), scale, ("amax",))
    assert only.row is None
    same(only.amax, reference.amax_of(x[:1]))


@each_scaling
@each_dtype
def test_strides_and_no_elements(dtype, scaling) -> None:
    to, base = Format(scaling), torch.randn(70, 300).to(dtype)
    for x in (base[:, 3:200], base.t(), base[:1].expand(70, 300), base[::2, ::3]):
        check(x, to)
    for shape in ((0, 16), (16, 0)):
        check(base.new_empty(shape), to)


@each_scaling
def test_one_copy_alone(scaling) -> None:
    x, to = torch.randn(140, 530), Format(scaling)
    for name, source in (("row", x), ("col", x.t())):
        found = quantize(x, to, None, (name,))
        copy, other = (found.row, found.col) if name == "row" else (found.col, found.row)
        assert other is None
        for part, expected in zip(copy, by_reference(source, to), strict=True):
            same(part, expected)


def test_fake_tensors_get_the_formulas() -> None:
    with FakeTensorMode():
        found = quantize(torch.randn(4, 64), Format("mx"), None, ("row", "col"))
        assert found.row[0].shape == (4, 64)
        assert found.col[1].shape == (64, 1)


def test_errors() -> None:
    x = torch.randn(4, 32)
    for bad, to, scale, want in (
        ("dtype", Format("tensor", torch.float16), None, ("row",)),
        ("unknown scaling", Format("columns"), None, ("row",)),
        ("takes no scale", Format("mx"), torch.ones(()), ("row",)),
        ("gives no amax", Format("rows"), None, ("amax",)),
        ("must be fp32", Format("tensor"), torch.ones(1), ("row",)),
    ):
        with pytest.raises(ValueError, match=bad):
            quantize(x, to, scale, want)
    with pytest.raises(ValueError, match=r"got dtype torch\.float16"):
        quantize(x.half(), Format("tensor"))


@pytest.mark.sampled(12)
@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("scaling", ["delayed", *SCALINGS])
@each_dtype
def test_an_activation_is_quantized_as_after_its_own_kernel(dtype, scaling, kind) -> None:
    delayed = scaling == "delayed"
    to, scale = Format("tensor" if delayed else scaling), torch.tensor(0.7) if delayed else None
    names = ("row", "col", "amax") if to.scaling == "tensor" else ("row", "col")
    for rows, width in ((3, 20), (300, 700), (129, 1024)):
        total = 2 * width if kind == "swiglu" else width
        x, bias = torch.randn(rows, total + 16).to(dtype)[:, 8 : 8 + total], torch.randn(total)
        for given in (None, bias.to(dtype)):
            y, sums = activations.activation_forward(x, kind, bias=given, pre=True)
            expected = quantize(y, to, scale, names)
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found, pre = activation_quantize(
                    x, kind, to, bias=given, pre=True, scale=scale, want=names
                )
                parts = [p for c in (found, expected) for copy in c[:2] for p in copy]
                for part, other in zip(parts[:4], parts[4:], strict=True):
                    same(part, other)
                assert (found.amax is None) == (expected.amax is None)
                assert found.amax is None or found.amax == expected.amax
                assert (pre is None) == (sums is None)
                assert pre is None or torch.equal(pre, sums)
