"""Products by cublasLt's own interface, on a GPU, beside fp64."""

import pytest
import torch
from torch import Tensor

from opsgraph.kernels.cublaslt import gemm, scaled_mm
from opsgraph.kernels.cublaslt import library as lt
from opsgraph.kernels.cublaslt import product as products
from opsgraph.kernels.cublaslt.product import product
from opsgraph.kernels.formats import FOUR
from opsgraph.kernels.reference import quantize as reference

pytestmark = pytest.mark.gpu

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest expected value."""
    return float((got.double() - expected).abs().max() / expected.abs().max())


def matrix(rows: int, cols: int, by_columns: bool, dtype: torch.dtype = BF16) -> Tensor:
    """A random matrix on the GPU."""
    sizes = (cols, rows) if by_columns else (rows, cols)
    made = torch.randn(sizes, device="cuda", dtype=dtype)
    return made.t() if by_columns else made


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("sizes", [(256, 512, 384), (37, 1000, 72), (37, 33, 21), (1, 64, 5)])
@pytest.mark.parametrize("layouts", [(False, True), (False, False), (True, False), (True, True)])
def test_matmul(
    dtype: torch.dtype, sizes: tuple[int, int, int], layouts: tuple[bool, bool]
) -> None:
    m, n, k = sizes
    a, b = matrix(m, k, layouts[0], dtype), matrix(k, n, layouts[1], dtype)
    bias, other = torch.randn(n, device="cuda", dtype=dtype), matrix(m, n, False, dtype)
    exact = a.double() @ b.double()
    assert error(gemm.matmul(a, b), exact) < 0.01
    assert error(gemm.matmul(a, b, bias), exact + bias.double()) < 0.01
    assert error(gemm.matmul(a, b, bias, other), exact + bias.double() + other.double()) < 0.01
    assert error(gemm.matmul(a, b, None, other, 0.5), exact / 2 + other.double()) < 0.01
    epilogue = torch.nn.functional.gelu(exact + bias.double(), approximate="tanh")
    assert error(gemm.matmul(a, b, bias, activation="gelu"), epilogue) < 0.01
    main = torch.randn(m, n, device="cuda")
    before = main.double()
    gemm.multiply_into(main, a, b, True)
    assert error(main, before + exact) < 1e-3
    gemm.multiply_into(main, a, b, False)
    assert error(main, exact) < 1e-3


def test_operands_of_odd_addresses_and_strides() -> None:
    wide = torch.randn(64, 130, device="cuda", dtype=BF16)
    a, b = wide[:, 1:97], torch.randn(96, 40, device="cuda", dtype=BF16)
    assert error(gemm.matmul(a, b), a.double() @ b.double()) < 0.01
    spread = torch.randn(64, 96, 2, device="cuda", dtype=BF16)[:, :, 0]
    assert error(gemm.matmul(spread, b), spread.double() @ b.double()) < 0.01
    assert gemm.matmul(a[:0], b).shape == (0, 40)


def quantized(x: Tensor, scaling: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """FP8 data and scale by rows, and what they stand for."""
    if scaling in ("tensor", "rows"):
        make = reference.quantize_tensor if scaling == "tensor" else reference.quantize_rows
        data, scale = make(x, dtype)
        return data, scale, data.double() / scale.double()
    down = 128 if scaling == "square" else 1
    data, scale = reference.quantize_blocks(x, dtype, down)
    values = data.double()
    whole = scale.double().repeat_interleave(128, 1)[:, : x.size(1)]
    return data, scale, values / whole.repeat_interleave(down, 0)[: x.size(0)]


def factors(data: Tensor, scale: Tensor, scaling: str, first: bool) -> scaled_mm.Factors:
    """What the product takes."""
    if scaling == "tensor":
        return scaled_mm.of_tensor(data, scale.reciprocal())
    if scaling == "rows":
        return scaled_mm.of_rows(data, scale)
    if scaling == "blocks":
        return scaled_mm.of_blocks(data, scale, None, FOUR if first else 1)
    return scaled_mm.of_squares(data, scale, None)


KINDS = [("tensor", "tensor"), ("rows", "rows"), ("blocks", "blocks"), ("blocks", "square"),
         ("square", "blocks")]  # fmt: skip


@pytest.mark.parametrize("scalings", KINDS)
@pytest.mark.parametrize("sizes", [(256, 512, 1024), (256, 512, 400), (40, 256, 384)])
@pytest.mark.parametrize("first", [E4M3, E5M2])
def test_fp8(scalings: tuple[str, str], sizes: tuple[int, int, int], first: torch.dtype) -> None:
    m, n, k = sizes
    a, b = torch.randn(m, k, device="cuda"), torch.randn(n, k, device="cuda")
    a[0] *= 1e3
    given = quantized(a, scalings[0], first), quantized(b, scalings[1], E4M3)
    exact = given[0][2] @ given[1][2].t()
    left, right = (
        factors(data, scale, scaling, not place)
        for place, ((data, scale, _), scaling) in enumerate(zip(given, scalings, strict=True))
    )
    bias = torch.randn(n, device="cuda", dtype=BF16)
    got = scaled_mm.fp8(left, right, m, BF16, False, bias)
    assert error(got, exact + bias.double()) < 0.01
    assert error(scaled_mm.fp8(left, right, m, FP32, False, None), exact) < 1e-3


def test_results_are_repeatable_on_other_streams_and_in_graphs() -> None:
    a, b = matrix(512, 16384, False), matrix(16384, 512, True)  # an algorithm may split the depth
    out = torch.empty(512, 512, device="cuda", dtype=BF16)
    expected = product(out, a, b).clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(product(torch.empty_like(out), a, b), expected)
    graph = torch.cuda.CUDAGraph()
    again = torch.empty_like(out)
    with torch.cuda.graph(graph):
        product(again, a, b)
    again.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(again, expected)


def test_a_class_that_is_new_while_a_graph_is_captured() -> None:
    a, b = matrix(104, 4096, False), matrix(4096, 4104, True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = gemm.matmul(a, b)
    graph.replay()
    torch.cuda.synchronize()
    assert error(out, a.double() @ b.double()) < 0.01


def test_a_product_that_the_library_lacks_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **named: object) -> None:
        raise lt.CublasError("no algorithm")

    monkeypatch.setattr(gemm, "product", refuse)
    gemm.warn.cache_clear()
    a, b = matrix(64, 32, False), matrix(32, 48, True)
    with pytest.warns(UserWarning, match="PyTorch multiplies where it can: no algorithm"):
        got = gemm.matmul(a, b)
    assert torch.equal(got, a @ b)


def test_algorithms_are_checked_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the library names pass; a name of other bytes does not, and is measured anew."""
    monkeypatch.setattr(products, "_products", {})
    monkeypatch.setattr(products, "SMALL", 0)
    a, b = matrix(512, 256, False), matrix(256, 384, True)
    out = torch.empty(512, 384, device="cuda", dtype=BF16)
    product(out, a, b)
    (made,) = products._products.values()
    assert len(made.algorithms) > 1
    for algorithm in made.algorithms:
        again = lt.Algorithm.of(algorithm.name)
        assert made.checked(again) is again
    with pytest.raises(lt.CublasError):
        made.checked(lt.Algorithm.of(f"0 {'ff' * 64}"))
    out.zero_()
    product(out, a, b)
    assert error(out, a.double() @ b.double()) < 0.01
