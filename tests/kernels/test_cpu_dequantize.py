"""The values of FP8 copies, from C++, bit for bit the formulas' and PyTorch's."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from opsgraph.kernels.cpu import build
from opsgraph.kernels.cpu import dequantize as kernels
from opsgraph.kernels.formats import E4M3, E5M2
from opsgraph.kernels.reference import quantize as reference

REASON = build.reason("dequantize")
pytestmark = [
    pytest.mark.usefixtures("seeded"),
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
]

GRIDS = {"tensor": (0, 0), "rows": (1, 0), "blocks": (1, 128), "square": (128, 128), "mx": (1, 32)}
"""Height and width of a scale's block; 0 for all there is."""
SHAPES = ((1, 1), (3, 5), (37, 130), (130, 37), (129, 513), (300, 1100))
each_format = pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def codes(rows: int, width: int, fp8: torch.dtype) -> Tensor:
    return torch.randint(256, (rows, width), dtype=torch.uint8).view(fp8)


def same(found: Tensor, expected: Tensor) -> None:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found.isnan(), expected.isnan())
    # Zeros have signs.
    bits = {2: torch.int16, 4: torch.int32}[found.element_size()]
    found, expected = (t.masked_fill(t.isnan(), 0).contiguous() for t in (found, expected))
    assert torch.equal(found.view(bits), expected.view(bits))


@each_format
@each_dtype
def test_every_byte(dtype, fp8) -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 256).expand(40, 256)
    data = every.contiguous().view(fp8)
    same(kernels.decode(data, dtype), data.to(dtype))  # PyTorch's own conversion


@pytest.mark.sampled(40)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scaling", GRIDS)
@each_format
@each_dtype
def test_bits_of_the_formulas(dtype, fp8, scaling, shape) -> None:
    rows, width = shape
    height, side = GRIDS[scaling]
    grid = (-(-rows // (height or rows)), -(-width // (side or width)))
    data = codes(rows, width, fp8)
    if scaling == "mx":
        scale = torch.randint(256, grid, dtype=torch.uint8)
        found = [kernels.dequantize_mxfp8(data, scale, dtype)]
        expected = reference.dequantize_mxfp8(data, scale, dtype)
    else:
        power = torch.randint(-120, 120, grid).float()
        for scale in (torch.exp2(power), torch.exp2(power / 2) * torch.rand(grid)):
            scale = scale.reshape(()) if scaling == "tensor" else scale
            found = []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                found.append(kernels.dequantize(data, scale, dtype))
            expected = reference.dequantize(data, scale, dtype)
            for made in found:
                same(made, expected)
        exact = torch.exp2(power).reshape(scale.shape)
        found = [kernels.dequantize(data, exact, dtype, exact=True)]
        expected = reference.dequantize(data, exact, dtype, exact=True)
    for made in found:
        same(made, expected)


@each_dtype
def test_a_transposed_copy_is_read_as_it_is_stored(dtype) -> None:
    data, squares, one = codes(300, 400, E4M3), torch.rand(3, 4) + 0.1, torch.tensor(0.3)
    for found, expected in (
        (kernels.decode(data.t(), dtype), reference.decode(data, dtype)),
        (kernels.dequantize(data.t(), one, dtype), reference.dequantize(data, one, dtype)),
        (
            kernels.dequantize(data.t(), squares.t(), dtype),
            reference.dequantize(data, squares, dtype),
        ),
    ):
        same(found, expected.t())
        assert found.t().is_contiguous()


@each_dtype
def test_factors(dtype) -> None:
    data = codes(300, 700, E4M3)
    for factor in (torch.tensor(0.3), torch.rand(300, 1)):
        expected = (reference.decode(data) * factor).to(dtype)
        same(kernels.decode(data, dtype, factor), expected)
        if not factor.dim():
            same(kernels.decode(data.t(), dtype, factor), expected.t())


@each_dtype
def test_strides_and_no_elements(dtype) -> None:
    base = codes(140, 400, E5M2)
    for data in (base[:, 3:200], base[::2], base[::2, ::3], base[:0], base[:, :0], base[:, 3:4]):
        scale = torch.rand(data.size(0), 1) + 0.1
        same(kernels.decode(data, dtype), reference.decode(data, dtype))
        same(kernels.dequantize(data, scale, dtype), reference.dequantize(data, scale, dtype))
        same(
            kernels.dequantize(data.t(), torch.full((data.size(1), 1), 0.3), dtype),
            reference.dequantize(data.t(), torch.full((data.size(1), 1), 0.3), dtype),
        )


def test_what_the_kernel_does_not_read_is_the_formulas() -> None:
    data, scale = codes(4, 64, E4M3), torch.ones(4, 1)
    for dtype in (torch.float64, torch.float16):
        same_wide = kernels.dequantize(data, scale, dtype)
        assert torch.equal(same_wide.nan_to_num(), reference.decode(data, dtype).nan_to_num())
    with FakeTensorMode():
        assert kernels.decode(torch.empty(4, 64, dtype=E4M3), torch.bfloat16).shape == (4, 64)
        grid = torch.empty(4, 2, dtype=torch.uint8)
        assert kernels.dequantize_mxfp8(torch.empty(4, 64, dtype=E4M3), grid).shape == (4, 64)
