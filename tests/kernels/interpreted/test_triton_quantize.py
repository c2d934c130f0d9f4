"""The quantizing kernels give the bits of the reference quantizers, of the unfused kernels' output.

The reference is itself held to an independent oracle: `test_reference_quantize.py`.
"""

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from kernel_checks import LAYOUTS, bits, laid_out, normal, twice
from torch import Tensor

from opsgraph.kernels.formats import BLOCKS, E4M3, E5M2, Copies, Format, inverse_shape
from opsgraph.kernels.reference import quantize as reference
from opsgraph.kernels.triton.activations import activation_backward, activation_forward
from opsgraph.kernels.triton.norms import norm_forward
from opsgraph.kernels.triton.quantize import activation_quantize, quantize
from opsgraph.kernels.triton.quantize_backward import activation_backward_quantize
from opsgraph.kernels.triton.quantize_norms import (
    norm_quantize,
    norm_quantize_again,
)

HALF, EPS, BOTH = torch.bfloat16, 1e-5, ("row", "col")
FORMATS = [Format(scaling) for scaling in BLOCKS]


def expected(x: Tensor, to: Format, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    if scale is not None:
        return reference.cast(x, scale, to.dtype), scale
    if to.scaling == "tensor":
        return reference.quantize_tensor(x, to.dtype, to.eps, to.power_of_two)
    if to.scaling == "rows":
        return reference.quantize_rows(x, to.dtype, to.eps, to.power_of_two)
    if to.scaling == "mx":
        return reference.quantize_mxfp8(x, to.dtype)
    height = 128 if to.scaling == "square" else 1
    return reference.quantize_blocks(x, to.dtype, height, to.eps, to.power_of_two)


def check_inverse(inverse: Tensor, scale: Tensor, scaling: str, rows: int, cols: int) -> None:
    """`1 / scale` as cuBLASLt reads it: of 1 x 128 by columns; both filled up to fours."""
    assert inverse.shape == inverse_shape(scaling, rows, cols)
    assert inverse.is_contiguous()
    lines, right = inverse.flatten(1), scale.t() if scaling == "blocks" else scale
    there = right.size(1)
    assert lines.size(1) == -(-there // 4) * 4
    assert torch.equal(bits(lines[:, :there]), bits(right.reciprocal()))
    if scaling == "square":
        assert torch.equal(lines[:, there:], torch.ones_like(lines[:, there:]))


def check(
    found: Copies, x: Tensor, to: Format, scale: Tensor | None, want: Collection[str]
) -> None:
    """found is what the reference makes of x, and holds what was wanted and no more."""
    assert [found.row is None, found.col is None] == [name not in want for name in BOTH]
    for copy, given in ((found.row, x), (found.col, x.t())):
        if copy is not None:
            if len(copy) == 3:
                check_inverse(copy[2], copy[1], to.scaling, *given.shape)
            assert (len(copy) == 3) == (to.scaling in ("blocks", "square"))
            for part, right in zip(copy[:2], expected(given, to, scale), strict=True):
                assert part.shape == right.shape
                assert part.dtype == right.dtype
                assert part.is_contiguous()
                assert torch.equal(bits(part), bits(right))
    copy = found.row or found.col
    assert found.inverse is None or to.scaling == "tensor"
    if found.inverse is not None and copy is not None:
        assert torch.equal(bits(found.inverse), bits(copy[1].reciprocal()))
    assert (found.amax is None) == ("amax" not in want)
    if found.amax is not None:
        torch.testing.assert_close(found.amax, reference.amax_of(x), rtol=0, atol=0, equal_nan=True)


def special(rows: int, width: int, dtype: torch.dtype, device: str) -> Tensor:
    """Rows of zeros, infinities, NaNs, subnormal and huge values among ordinary ones."""
    x = normal(rows, width, dtype=torch.float32, device=device, seed=width)
    x[1::7] = 0.0
    x[2::7, width // 2] = float("inf")
    x[3::7, width // 3] = float("nan")
    x[4::7] *= 2.0**-140
    x[5::7] *= 2.0**120
    return x.to(dtype)


class Case(NamedTuple):
    rows: int
    width: int
    dtype: torch.dtype
    to: Format
    want: tuple[str, ...] = BOTH
    scale: float | None = None
    layout: str = "contiguous"


def cases() -> list[Case]:
    many = [Case(130, 300, HALF, to) for to in FORMATS]
    many += [Case(13, 70, torch.float32, to._replace(dtype=E5M2)) for to in FORMATS]
    many += [Case(1, 1, torch.float16, to) for to in FORMATS]
    many += [Case(32, 160, torch.float16, to, (want,)) for to in FORMATS for want in BOTH]
    many += [
        Case(9, 130, HALF, Format(scaling, E4M3, 1e-2, True))
        for scaling in ("tensor", "rows", "blocks", "square")
    ]
    scales = [2.0**-126, 0.37, 3e38]
    many += [
        Case(9, 1100, HALF, Format("tensor", dtype), (*BOTH, "amax"), scale)
        for scale in scales
        for dtype in (E4M3, E5M2)
    ]
    many += [
        Case(16, 40, HALF, Format("tensor"), want, scale)
        for want in (("amax",), ("row", "amax"), ())
        for scale in (None, 0.5)
    ]
    many += [Case(6, 48, HALF, to, layout=layout) for to in FORMATS[:1] for layout in LAYOUTS[1:]]
    return many


def name(case: Case) -> str:
    to = f"{case.to.scaling}-{str(case.to.dtype)[-4:]}"
    return f"{case.rows}-{case.width}-{case.dtype}-{to}-{'+'.join(case.want)}-{case.layout}"


@pytest.mark.sampled(14)
@pytest.mark.parametrize("case", cases(), ids=name)
def test_quantize(case: Case, device: str) -> None:
    x = laid_out(special(case.rows, case.width, case.dtype, device), case.layout)
    scale = None if case.scale is None else torch.tensor(case.scale, device=device)
    check(twice(quantize, x, case.to, scale, case.want), x, case.to, scale, case.want)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_cast_of_every_bfloat16(dtype: torch.dtype, device: str) -> None:
    x = torch.arange(65536, device=device).to(torch.int32).to(torch.int16).view(HALF).view(64, 1024)
    for value in (1.0, 0.37, 2.0**100):
        scale = torch.tensor(value, device=device)
        check(quantize(x, Format("tensor", dtype), scale), x, Format("tensor", dtype), scale, "row")


SMALL = [(torch.float32, 5, 7), (HALF, 33, 200)]


@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("to", "given"),
    [(FORMATS[0], 0.7), *((to, None) for to in FORMATS)],
    ids=lambda value: getattr(value, "scaling", value),
)
@pytest.mark.parametrize(("dtype", "rows", "width"), SMALL)
def test_norms(
    dtype: torch.dtype, rows: int, width: int, to: Format, given: float | None, device: str
) -> None:
    x, other = (normal(rows, width, dtype=dtype, device=device, seed=i) for i in (1, 2))
    weight, bias = (normal(width, dtype=torch.float32, device=device, seed=i) for i in (3, 4))
    scale = None if given is None else torch.tensor(given, device=device)
    want = (*BOTH, "amax") if to.scaling == "tensor" else BOTH
    y, _, rstd, total = norm_forward(x, weight, None, EPS, True, other)
    found, no_mean, rstd_found, total_found = twice(
        norm_quantize, x, weight, None, EPS, to, True, other, False, scale, (*want, "rstd")
    )
    assert no_mean is None
    check(found, y, to, scale, want)
    assert (found.inverse is None) == (to.scaling != "tensor" or not rows)
    assert torch.equal(rstd_found, rstd)
    assert torch.equal(total_found, total)
    y, mean, rstd, _ = norm_forward(x, weight, bias, EPS, center=True)
    row, no_mean, no_rstd, no_total = norm_quantize(
        x, weight, bias, EPS, to, center=True, scale=scale, want=("row",)
    )
    check(row, y, to, scale, ("row",))
    assert (row.inverse is None) == (to.scaling != "tensor" or not rows)
    assert no_mean is no_rstd is no_total is None
    col, mean_found, rstd_found, _ = norm_quantize(
        x, weight, bias, EPS, to, center=True, scale=scale, want=("col", "mean", "rstd")
    )
    check(col, y, to, scale, ("col",))
    assert torch.equal(mean_found, mean)
    assert torch.equal(rstd_found, rstd)
    again = norm_quantize_again(x, mean, rstd, weight, bias, to, 0, scale, ("col",))
    check(again, y, to, scale, ("col",))


@pytest.mark.parametrize("scaling", ["tensor", "rows", "blocks"])
def test_wide_norms(scaling: str, device: str) -> None:
    x, other = (normal(2, 32801, dtype=HALF, device=device, seed=i) for i in (1, 2))
    to = Format(scaling)
    y, _, rstd, total = norm_forward(x, None, None, EPS, other=other)
    found, _, rstd_found, total_found = norm_quantize(x, None, None, EPS, to, other=other)
    check(found, y, to, None, ("row",))
    assert torch.equal(rstd_found, rstd)
    assert torch.equal(total_found, total)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("to", FORMATS, ids=lambda to: to.scaling)
@pytest.mark.parametrize("kind", ["gelu", "swiglu", "clamped_swiglu"])
@pytest.mark.parametrize(("dtype", "rows", "width"), SMALL)
def test_activations(
    dtype: torch.dtype, rows: int, width: int, kind: str, to: Format, device: str
) -> None:
    total = width * 2 if "glu" in kind else width
    x, bias = (normal(n, total, dtype=dtype, device=device, seed=n) for n in (rows, 1))
    y = activation_forward(x, kind, bias=bias[0])
    check(activation_quantize(x, kind, to, (), bias[0], None, BOTH), y, to, None, BOTH)
    if to.scaling == "tensor":
        scale, want = torch.tensor(3.3, device=device), ("row", "amax")
        found = twice(activation_quantize, x, kind, to, scale=scale, want=want)
        check(found, activation_forward(x, kind), to, scale, want)


BACKWARD = [to for to in FORMATS if to.scaling != "rows"]


@pytest.mark.sampled(4)
@pytest.mark.parametrize("to", BACKWARD, ids=lambda to: to.scaling)
@pytest.mark.parametrize(
    ("kind", "dtype", "rows"),
    [("gelu", HALF, 66), ("swiglu", HALF, 130), ("clamped_swiglu", torch.float32, 5)],
)
def test_activation_backward(
    kind: str, dtype: torch.dtype, rows: int, to: Format, device: str
) -> None:
    gated = "glu" in kind
    width = 7 if to.scaling == "tensor" or not gated else BLOCKS[to.scaling] * 2
    x = normal(rows, width * 2 if gated else width, dtype=dtype, device=device)
    dy = normal(rows, width, dtype=dtype, device=device, seed=1)
    dx, y, dbias = activation_backward(dy, x, kind, want=("x", "y", "bias"))
    y_to, to = to, to._replace(dtype=E5M2)
    amax = ("amax",) if to.scaling == "tensor" else ()
    for value in (None, 0.7) if amax else (None,):
        scale = None if value is None else torch.tensor(value, device=device)
        found, y_found, dbias_found = twice(
            activation_backward_quantize, dy, x, kind, to, scale=scale, want=(*BOTH, *amax),
            y_to=y_to, y_scale=scale, y_want=("col", *amax), dbias=torch.float32,
        )  # fmt: skip
        check(found, dx, to, scale, (*BOTH, *amax))
        check(y_found, y, y_to, scale, ("col", *amax))
        assert dbias_found.dtype == torch.float32
        tolerance = 1e-4 if dtype == torch.float32 else 0.5
        torch.testing.assert_close(dbias_found, dbias.float(), rtol=1e-2, atol=tolerance)
    alone = activation_backward_quantize(dy, x, kind, to, want=("row",))
    check(alone[0], dx, to, None, ("row",))
    assert alone[1:] == (Copies(None, None, None), None)


def test_an_amax_in_parts(device: str) -> None:
    """What is written is the same, and the largest part is the amax."""
    scale, to = torch.tensor(3.0, device=device), Format("tensor")

    def both(run: Callable[..., Any]) -> None:
        whole, parts = (run(want=(*BOTH, "rstd", word)) for word in ("amax", "amaxes"))
        assert (whole.amax.dim(), parts.amax.dim()) == (0, 1)
        assert torch.equal(parts.amax.amax(), whole.amax)
        for one, other in zip((*whole.row, *whole.col), (*parts.row, *parts.col), strict=True):
            assert torch.equal(bits(one), bits(other))

    for rows, width in ((1, 16), (130, 96), (3, 2500)):
        x = normal(rows, width, dtype=HALF, device=device)
        both(partial(quantize, x, to, scale))
        both(lambda want, x=x: norm_quantize(x, None, None, EPS, to, scale=scale, want=want)[0])
        both(partial(activation_quantize, x, "swiglu", to, scale=scale))
        both(lambda want, x=x: activation_backward_quantize(x, x, "gelu", to, (), scale, want)[0])


def test_bias_gradient_sums_unrounded_values(device: str) -> None:
    """In fp64, and closer than sums of dx rounded to bf16 or to FP8 could be."""
    x, dy = (normal(300, 64, dtype=HALF, device=device, seed=i) for i in (1, 2))
    *_, dbias = activation_backward_quantize(
        dy, x, "relu", Format("mx"), want=("row",), dbias=torch.float32
    )
    right = torch.where(x > 0, dy, 0.0).double().sum(0)
    torch.testing.assert_close(dbias.double(), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 16), (5, 0), (0, 0)])
@pytest.mark.parametrize("to", FORMATS, ids=lambda to: to.scaling)
def test_empty(shape: tuple[int, int], to: Format, device: str) -> None:
    x = torch.empty(shape, device=device)
    want = (*BOTH, "amax") if to.scaling == "tensor" else BOTH
    check(quantize(x, to, want=want), x, to, None, want)
    check(norm_quantize(x, None, None, EPS, to, want=want)[0], x, to, None, want)
    check(activation_quantize(x, "gelu", to, want=want), x, to, None, want)
    if to.scaling != "rows":
        dx, y, dbias = activation_backward_quantize(
            x, x, "gelu", to, want=want, y_want=want, dbias=torch.float32
        )
        check(dx, x, to, None, want)
        check(y, x, to, None, want)
        assert torch.equal(dbias, torch.zeros(shape[1], device=device))


def test_errors() -> None:
    x, scale = torch.ones(2, 40), torch.ones(())
    with pytest.raises(ValueError, match="unknown scaling 'row', expected one of tensor, rows"):
        quantize(x, Format("row"))
    with pytest.raises(ValueError, match=r"got dtype torch.float16, expected torch.float8_e4m3fn"):
        quantize(x, Format("rows", torch.float16))
    with pytest.raises(ValueError, match="'mx' takes no scale and gives no amax"):
        quantize(x, Format("mx"), scale)
    with pytest.raises(ValueError, match=r"scale must be fp32 \[\], got torch.float32 \[1\]"):
        quantize(x, Format("tensor"), scale[None])
    with pytest.raises(ValueError, match="'rows' takes no scale and gives no amax"):
        norm_quantize(x, None, None, EPS, Format("rows"), want=("amax",))
    with pytest.raises(ValueError, match="cannot be scaled by rows"):
        activation_backward_quantize(x, x, "gelu", Format("rows"))
    with pytest.raises(ValueError, match="swiglu has halves of 20 columns, expected a multiple of"):
        activation_backward_quantize(x[:, :20], x, "swiglu", Format("mx"))
    with pytest.raises(ValueError, match="unknown activation 'nothing'"):
        activation_quantize(x, "nothing", Format("mx"))


@pytest.mark.parametrize("scale", [None, 0.37])
@pytest.mark.parametrize("rows", [0, 33])
def test_the_inverse_of_a_tensors_scale_is_written(
    rows: int, scale: float | None, device: str
) -> None:
    """For scaled GEMMs: nothing need be launched for it."""
    x = normal(rows, 48, dtype=HALF, device=device)
    given = None if scale is None else torch.tensor(scale, device=device)
    found = quantize(x, Format("tensor"), given, BOTH)
    assert found.row is not None
    assert (found.inverse is None) == (rows == 0)
    if found.inverse is not None:
        assert torch.equal(bits(found.inverse), bits(found.row[1].reciprocal()))
    assert quantize(x, Format("tensor"), given, ("amax",)).inverse is None
    assert quantize(x, Format("mx"), None, BOTH).inverse is None
