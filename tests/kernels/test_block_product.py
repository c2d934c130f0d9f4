"""Products of FP8 with scales of blocks by two groups of warps, beside fp64; what they take."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from opsgraph.kernels.formats import inverse_shape

pytest.importorskip("triton")

from opsgraph.kernels.triton import block_product as blocks
from opsgraph.kernels.triton import persistent

BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
Operands = tuple[Tensor, Tensor, Tensor, Tensor]


def operands(
    rows: int, columns: int, depth: int, dtype: torch.dtype = E4M3, device: str = "cpu"
) -> Operands:  # fmt: skip
    """a, b and what they are multiplied with; scales that fill it up are NaN."""
    a = (torch.randn(rows, depth, device=device) * 30).to(dtype)
    b = (torch.randn(columns, depth, device=device) * 30).to(E4M3)
    scales = []
    for scaling, size, there in (("blocks", rows, rows), ("square", columns, -(-depth // 128))):
        scale = torch.rand(*inverse_shape(scaling, size, depth), device=device).flatten(1) + 0.1
        scale[:, there:] = torch.nan
        scales.append(scale)
    return a, b, *scales


def exact(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor) -> Tensor:
    """In fp64."""
    (rows, depth), columns = a.shape, b.size(0)
    of_a = a_scale.double().t().repeat_interleave(128, 1)[:rows, :depth]
    of_b = b_scale.double().repeat_interleave(128, 0)[:columns]
    of_b = of_b.repeat_interleave(128, 1)[:, :depth]
    return (a.double() * of_a) @ (b.double() * of_b).t()


@pytest.mark.gpu
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("sizes", [(300, 136, 1104), (1000, 1032, 4096), (4096, 4096, 2048)])
def test_results(
    sizes: tuple[int, int, int], dtype: torch.dtype, biased: bool, seeded: None
) -> None:
    """As far from the exact ones as bf16 is, and the same bits from run to run."""
    given = operands(*sizes, dtype, "cuda")
    rows, columns, _ = sizes
    out = torch.empty(rows, columns, dtype=BF16, device="cuda")
    if reason := blocks.why_not(out, *given[:3]):
        pytest.skip(reason)
    expected, bias = exact(*given), None
    if biased:
        bias = (torch.randn(columns, device="cuda") * expected.std()).to(BF16)
        expected += bias.double()
    blocks.block_product(out, *given, bias)
    error = float((out.double() - expected).norm())
    assert error < 1.05 * float((expected.to(BF16).double() - expected).norm())
    for _ in range(20):
        again = torch.full_like(out, torch.nan)
        blocks.block_product(again, *given, bias)
        assert torch.equal(again, out)


@pytest.mark.gpu
def test_configurations_compute_the_same(monkeypatch: pytest.MonkeyPatch, seeded: None) -> None:
    given = operands(3000, 1032, 1152, device="cuda")
    out = torch.empty(3000, 1032, dtype=torch.float16, device="cuda")
    if reason := blocks.why_not(out, *given[:3]):
        pytest.skip(reason)
    found = []
    for k in range(len(blocks._options(1152, 1032))):
        monkeypatch.setattr(blocks, "configured", lambda _, key, offered, k=k: offered(*key)[k])
        blocks.block_product(out, *given, None)
        found.append(out.clone())
    for other in found[1:]:
        assert torch.equal(other, found[0])


def moved(x: Tensor) -> Tensor:
    """The same values, not at a multiple of 16 bytes."""
    return torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view_as(x)


Change = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
TAKEN: list[tuple[Change, str | None]] = [
    (lambda out, a, b, scale: (out, a, b, scale), None),
    (lambda out, a, b, scale: (out.float(), a, b, scale), "it writes 16 bits"),
    (lambda out, a, b, scale: (out[:, :132].contiguous(), a, b[:132], scale), "16 bytes"),
    (lambda out, a, b, scale: (out, a[:, :40].contiguous(), b, scale), "16 bytes"),
    (lambda out, a, b, scale: (out, moved(a), b, scale), "16 bytes"),
    (lambda out, a, b, scale: (out, a, moved(b), scale), "16 bytes"),
    (lambda out, a, b, scale: (out, a, b, moved(scale)), "16 bytes"),
    (lambda out, a, b, scale: (out, a, b, scale[:, :30]), "16 bytes"),
    (lambda out, a, b, scale: (out, a, b[:, :128], scale), "rows are not adjacent"),
    (lambda out, a, b, scale: (out[:0], a[:0], b, scale), "31 bits"),
    (lambda out, a, b, scale: (out, a[:1].expand(2**31, 256), b, scale), "not adjacent"),
]


@pytest.mark.parametrize(("change", "reason"), TAKEN)
def test_what_is_taken(
    change: Change, reason: str | None, monkeypatch: pytest.MonkeyPatch, seeded: None
) -> None:
    monkeypatch.setattr(persistent, "paired", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    given = operands(40, 136, 256)
    found = blocks.why_not(*change(torch.zeros(40, 136, dtype=BF16), *given[:3]))
    assert found == reason or (found is not None and reason is not None and reason in found)


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    out, given = torch.zeros(40, 136, dtype=BF16), operands(40, 136, 256)[:3]
    monkeypatch.setattr(persistent, "paired", lambda: False)
    assert "does not interpret" in (blocks.why_not(out, *given) or "")
    monkeypatch.setattr(persistent, "paired", lambda: True)
    monkeypatch.setattr(persistent, "chip", lambda device: 10)
    assert blocks.why_not(out, *given) == "its kernels are for sm_90"


@pytest.mark.parametrize(("depth", "steps"), [(1024, 8), (14336, 8), (1104, 4), (512, 4), (16, 4)])
def test_steps_without_a_jump(
    depth: int, steps: int, monkeypatch: pytest.MonkeyPatch, seeded: None
) -> None:
    """Eight where they divide the product's; a block that is short counts as one."""
    told = {}
    monkeypatch.setattr(blocks, "launch", lambda *given, **constants: told.update(constants))
    monkeypatch.setattr(blocks, "kernels", SimpleNamespace(block_product_kernel=None))
    out = torch.zeros(40, 136, dtype=BF16)
    blocks.block_product(out, *operands(40, 136, depth), None)
    assert told["UNROLL"] == steps
    assert told["STAGES"] == 6
