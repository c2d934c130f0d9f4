"""What only a GPU can show: offsets past 2^31, and tensors that are not on the current device."""

from collections.abc import Callable

import pytest
import torch
from kernel_checks import bits, close, normal
from test_triton_activations import activation64
from test_triton_norms import EPS, norm64
from torch import Tensor

from opsgraph.kernels.formats import E4M3, NVFP4, Format
from opsgraph.kernels.reference import quantize as reference
from opsgraph.kernels.reference.dropout import keep_mask
from opsgraph.kernels.reference.nvfp4 import quantize_nvfp4
from opsgraph.kernels.triton.activations import activation_backward, activation_forward
from opsgraph.kernels.triton.dropout import dropout
from opsgraph.kernels.triton.norms import (
    norm_backward,
    norm_forward,
)
from opsgraph.kernels.triton.quantize import quantize
from opsgraph.kernels.triton.quantize_backward import activation_backward_quantize

pytestmark = pytest.mark.gpu
HALF = torch.bfloat16


def rows_past_2_31(width: int) -> Tensor:
    """Zeros, but for the last three rows, whose elements all lie past 2^31."""
    x = torch.zeros(2**31 // width + 4, width, dtype=HALF, device="cuda")
    x[-3:] = normal(3, width, dtype=HALF, device="cuda")
    return x


def stride_past_2_31(width: int) -> Tensor:
    """Two rows 2^31 elements apart."""
    buffer = torch.empty(2**31 + 8 + width, dtype=HALF, device="cuda")
    x = buffer.as_strided((2, width), (2**31 + 8, 1))
    x.copy_(normal(2, width, dtype=HALF, device="cuda"))
    return x


@pytest.mark.slow
@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize(
    ("make", "width"),
    [(rows_past_2_31, 4096), (rows_past_2_31, 40960), (stride_past_2_31, 1000)],
)
def test_norm_offsets(make: Callable[[int], Tensor], width: int) -> None:
    x = make(width)
    y, _, rstd, _ = norm_forward(x, None, None, EPS)
    x64 = x[-2:].cpu().double().requires_grad_()
    y64 = norm64(x64, None, None, False, False)
    close(y[-2:], y64.detach())
    del y
    dx, _, _ = norm_backward(x, x, None, rstd, None, want=("x",))
    (dx64,) = torch.autograd.grad(y64, x64, x64.detach())
    close(dx[-2:], dx64, x64.detach())


@pytest.mark.slow
@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize(("make", "width"), [(rows_past_2_31, 8192), (stride_past_2_31, 1000)])
def test_activation_and_dropout_offsets(make: Callable[[int], Tensor], width: int) -> None:
    x = make(width)
    y = activation_forward(x, "swiglu")
    x64 = x[-2:].cpu().double().requires_grad_()
    y64 = activation64(x64, "swiglu", ())
    close(y[-2:], y64.detach())
    dx, _, _ = activation_backward(y, x, "swiglu")
    (dx64,) = torch.autograd.grad(y64, x64, y[-2:].cpu().double())
    close(dx[-2:], dx64)
    del dx, y
    seed = torch.tensor(9, device="cuda")
    ones = torch.ones((), dtype=HALF, device="cuda").expand_as(x) if x.is_contiguous() else x
    dropped = dropout(ones.contiguous() if x.is_contiguous() else x, seed, 0.5)
    if not x.is_contiguous():
        keep = keep_mask(seed, *x.shape, 0.5)
        assert torch.equal(dropped, torch.where(keep, x * 2, 0.0))
        return
    share = dropped[-1000:].double().mean().item() / 2
    assert abs(share - 0.5) < 4 * 0.5 / (1000 * width) ** 0.5


@pytest.mark.slow
@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("make", [rows_past_2_31, stride_past_2_31])
@pytest.mark.parametrize("scaling", ["tensor", "mx"])
def test_quantize_offsets(make: Callable[[int], Tensor], scaling: str) -> None:
    """The last rows of either copy, and of the gradient of relu, which is 0 elsewhere too."""
    x, to = make(4096), Format(scaling)
    scale = torch.ones((), device="cuda") if scaling == "tensor" else None
    last = x[-2:]
    for value, found in (
        (last, quantize(x, to, scale, ("row",)).row),
        (
            last.where(last > 0, 0),
            activation_backward_quantize(x, x, "relu", to, scale=scale)[0].row,
        ),
    ):
        expected = reference.quantize_mxfp8(value)[0]
        if scale is not None:
            expected = reference.cast(value, scale, E4M3)
        assert found is not None
        assert torch.equal(bits(found[0][-2:]), bits(expected))
    if scale is not None:
        col = quantize(x, to, scale, ("col",)).col
        assert col is not None
        expected = reference.cast(last.t(), scale, E4M3)
        assert torch.equal(bits(col[0][:, -2:]), bits(expected))


@pytest.mark.slow
@pytest.mark.usefixtures("unpoisoned")
@pytest.mark.parametrize("make", [rows_past_2_31, stride_past_2_31])
def test_nvfp4_offsets(make: Callable[[int], Tensor]) -> None:
    """The last rows, of the tensor and of the gradient of relu, with the amax of all rows."""
    x, to = make(4096), NVFP4()
    last = x[-2:]
    for value, found in (
        (last, quantize(x, to).row),
        (last.where(last > 0, 0), activation_backward_quantize(x, x, "relu", to)[0].row),
    ):
        assert found is not None
        data, scale, amax = found
        expected, expected_scale = quantize_nvfp4(value, amax)
        assert torch.equal(data[-2:].flatten(1), expected)
        assert torch.equal(bits(scale[-2:]), bits(expected_scale))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_device_that_is_not_the_current_one() -> None:
    results = []
    for index in (0, 1):
        x = normal(300, 1000, dtype=HALF, device=f"cuda:{index}")
        weight, seed = x[0].clone(), torch.tensor(1, device=x.device)
        y, mean, rstd, _ = norm_forward(x, weight, weight, EPS, center=True)
        gradients = norm_backward(x, x, mean, rstd, weight)
        z = activation_forward(x, "swiglu")
        activation = activation_backward(z, x, "swiglu", want=("x", "y", "bias"))
        outputs = (y, *gradients, z, *activation, dropout(x, seed, 0.5))
        assert all(t.device == x.device for t in outputs)
        results.append([t.cpu() for t in outputs])
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
