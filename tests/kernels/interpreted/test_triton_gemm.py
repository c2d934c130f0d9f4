"""The Triton GEMMs with activations in their epilogue, and grouped ones, against fp64 formulas."""

import itertools
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from kernel_checks import DTYPES, INTERPRETING, close, laid_out, normal, twice
from test_triton_activations import activation64
from torch import Tensor

from opsgraph.kernels import configs
from opsgraph.kernels.triton import gemm, persistent
from opsgraph.kernels.triton.activations import activation_forward
from opsgraph.kernels.triton.functions import KINDS
from opsgraph.kernels.triton.gemm import linear_activation, linear_activation_backward
from opsgraph.kernels.triton.grouped import (
    grouped_dgrad,
    grouped_linear,
    grouped_wgrad,
    groups_of,
)

GATED = {kind for kind, row in KINDS.items() if row.GATED}


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes, quick to interpret, then have many tiles, and parts of one at the ends."""
    tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "GROUP": 2, "num_warps": 4}
    if INTERPRETING:
        monkeypatch.setattr(gemm, "config", lambda *args: tile | {"num_stages": 2})
        monkeypatch.setattr(persistent, "TILE", 16)
        monkeypatch.setattr(persistent, "DEPTH", 16)
        few = {"BLOCK_N": 32, "PARTS": 2, "GROUP": 2, "num_warps": 8, "num_stages": 2}
        monkeypatch.setattr(persistent, "rows_options", lambda *_: [few | {"FLATTEN": True}])
        monkeypatch.setattr(persistent, "weights_options", lambda *_: [few])
        configs._chosen.clear()


class Case(NamedTuple):
    kind: str
    rows: int
    depth: int
    width: int  # on each side of the gate
    dtype: torch.dtype
    params: tuple[float, ...] = ()
    bias: torch.dtype | None = None
    x_layout: str = "contiguous"
    weight_layout: str = "contiguous"


def covering_cases() -> list[Case]:
    """Every kind with every dtype; shapes, layouts and the bias take turns at coprime periods."""
    shapes = [(1, 1, 1), (40, 48, 32), (5, 16, 12), (33, 17, 40), (3, 100, 9)]
    if not INTERPRETING:
        shapes += [(1025, 431, 300), (3000, 1024, 1000), (70, 4096, 100), (130, 2050, 1100)]
    layouts = ["contiguous", "strided", "offset", "transposed", "expanded", "scalar"]
    cases = []
    for n, (kind, dtype) in enumerate(product(sorted(KINDS), DTYPES)):
        for i in (n,) if INTERPRETING else range(n, n + len(shapes), 2):
            bias = (None, dtype, torch.float32)[i // 2 % 3]
            shape = shapes[i % len(shapes)]
            cases.append(Case(kind, *shape, dtype, (), bias, layouts[i % 6], layouts[i // 3 % 4]))
    cases += [
        Case("clamped_swiglu", 5, 20, 17, torch.float32, (0.5, 2.0, 0.25)),
        Case("clamped_swiglu", 5, 20, 17, torch.bfloat16, (1.0, 1.0, 0.0), torch.float32),
    ]
    return cases


def name(case: Case) -> str:
    return "-".join(str(part).removeprefix("torch.") for part in case)


def weight(rows: int, columns: int, dtype: torch.dtype, device: str, seed: int = 3) -> Tensor:
    return normal(rows, columns, dtype=dtype, device=device, seed=seed) / columns**0.5


def double(*tensors: Tensor) -> list[Tensor]:
    return [t.cpu().double() for t in tensors]


def check_forward(case: Case, device: str) -> tuple[Tensor, Tensor]:
    """Checks and returns the output and the pre-activation."""
    total = case.width * 2 if case.kind in GATED else case.width
    x = laid_out(normal(case.rows, case.depth, dtype=case.dtype, device=device), case.x_layout)
    w = laid_out(weight(total, case.depth, case.dtype, device), case.weight_layout)
    bias = normal(total, dtype=case.bias, device=device, seed=1) if case.bias else None
    args = x, w, bias, case.kind, case.params
    y, pre = twice(linear_activation, *args, want=("pre",))
    x64, w64 = double(x, w)
    close(pre, x64 @ w64.T + (0 if bias is None else double(bias)[0]), x64.abs() @ w64.T.abs())
    close(y, activation64(double(pre)[0], case.kind, case.params))
    if case.dtype != torch.float32 or INTERPRETING:
        unfused = activation_forward(pre, case.kind, case.params)
        assert torch.equal(y, unfused), "the epilogue is not the activation, bit for bit"
    alone, nothing = linear_activation(*args)
    assert nothing is None
    assert torch.equal(alone, y)
    return y, pre


def check_backward(case: Case, y: Tensor, pre: Tensor, device: str) -> None:
    dy = normal(case.rows, case.depth, dtype=case.dtype, device=device, seed=2)
    dy = laid_out(dy, case.x_layout)
    w = laid_out(weight(case.depth, case.width, case.dtype, device), case.weight_layout)
    args = dy, w, pre, case.kind, case.params
    dpre, again, dbias = twice(linear_activation_backward, *args, want=("x", "y", "bias"))
    pre64, dy64, w64 = double(pre, dy, w)
    y64 = activation64(pre64.requires_grad_(), case.kind, case.params)
    (dpre64,) = torch.autograd.grad(y64, pre64, dy64 @ w64)
    # The slope is a difference of terms as large as the value; the product is a sum of terms.
    terms = (dy64.abs() @ w64.abs()).amax() * (1 + pre64.detach().abs().amax() ** 2)
    close(dpre, dpre64, terms)
    close(dbias, dpre64.sum(0), dpre64.abs().sum(0).amax() + terms)
    if case.dtype != torch.float32 or INTERPRETING:
        assert torch.equal(again, y), "the backward's activation is not the forward's"
    else:
        close(again, y64.detach())


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.sampled(22)
@pytest.mark.parametrize("case", covering_cases(), ids=name)
def test_forward_and_backward(case: Case, device: str) -> None:
    check_backward(case, *check_forward(case, device), device)


@pytest.mark.parametrize(("rows", "dtype"), [(9, torch.bfloat16), (130, torch.float16)])
def test_tiles_that_are_used(rows: int, dtype: torch.dtype, device: str) -> None:
    case = Case("swiglu", rows, 70, 33, dtype, (), dtype)
    check_backward(case, *check_forward(case, device), device)


SUBSETS = [(), ("x",), ("y",), ("bias",), ("x", "y"), ("y", "bias"), ("x", "bias")]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.sampled(7)
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("want", SUBSETS, ids="+".join)
def test_backward_computes_what_is_wanted(want: tuple[str, ...], kind: str, device: str) -> None:
    pre = normal(20, 34, dtype=torch.float16, device=device)
    width = 17 if kind in GATED else 34
    dy = normal(20, 24, dtype=torch.float16, device=device, seed=1)
    w = weight(24, width, torch.float16, device)
    whole = linear_activation_backward(
        dy, w, pre, kind, want=("x", "y", "bias"), bias_dtype=torch.float32
    )
    got = linear_activation_backward(dy, w, pre, kind, want=want, bias_dtype=torch.float32)
    for key, one, other in zip(("x", "y", "bias"), got, whole, strict=True):
        assert (one is None) == (key not in want)
        assert one is None or one.dtype == (torch.float32 if key == "bias" else pre.dtype)
        if one is not None and key == "bias":  # a compiler adds up a tile as it lays it out
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-5)
        else:
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize("sizes", [(0, 8, 6), (3, 0, 6), (3, 8, 0)], ids=str)
def test_empty(kind: str, sizes: tuple[int, int, int], device: str) -> None:
    rows, depth, width = sizes
    total = width * 2 if kind in GATED else width
    x, w = torch.ones(rows, depth, device=device), torch.ones(total, depth, device=device)
    bias = torch.ones(total, device=device)
    y, pre = linear_activation(x, w, bias, kind, want=("pre",))
    assert torch.equal(pre, torch.ones(rows, total, device=device) * (1 + depth))
    assert torch.equal(y, activation_forward(pre, kind))
    w = torch.ones(depth, width, device=device)
    dpre, again, dbias = linear_activation_backward(x, w, pre, kind, want=("x", "y", "bias"))
    assert (dpre.shape, again.shape) == (pre.shape, y.shape)
    assert torch.equal(dbias, torch.zeros(total, device=device))
    assert not dpre.any()


def test_nan_reaches_its_own_row_alone(device: str) -> None:
    x = torch.ones(20, 17, device=device)
    x[2, 5] = float("nan")
    y, _ = linear_activation(x, torch.ones(10, 17, device=device), None, "swiglu")
    assert torch.equal(y.isnan().all(1).nonzero().flatten().cpu(), torch.tensor([2]))
    assert y.isnan().sum() == 5


def test_errors(device: str) -> None:
    x, w = torch.ones(2, 8, device=device), torch.ones(7, 8, device=device)
    with pytest.raises(ValueError, match=r"swiglu halves its input's width, which is odd: 7"):
        linear_activation(x, w, None, "swiglu")
    with pytest.raises(ValueError, match=r"linear_activation got shapes \[2, 8\] and \[8, 7\]"):
        linear_activation(x, w.t(), None, "gelu")
    with pytest.raises(ValueError, match=r"got torch.float32 on .* and torch.float16 on"):
        linear_activation(x, w.half(), None, "gelu")
    with pytest.raises(ValueError, match=r"bias \[8\], expected \[7\]"):
        linear_activation(x, w, x[0], "gelu")
    with pytest.raises(ValueError, match=r"pre-activation \[2, 8\], expected \[2, 16\]"):
        linear_activation_backward(x, torch.ones(8, 8, device=device), x, "swiglu")


@pytest.mark.parametrize("fp32", ["ieee", "tf32"])
def test_precision_follows_torch(fp32: str) -> None:
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    settings.fp32_precision = fp32
    try:
        assert gemm.precision(torch.float32) == fp32
        assert gemm.precision(torch.float16) == "ieee"
    finally:
        settings.fp32_precision = before


@pytest.mark.parametrize("room", [99 * 1024, 163 * 1024, 227 * 1024])
def test_tiles_fit_in_shared_memory(room: int) -> None:
    for rows, columns, depth, size in product((16, 64, 128), (64, 9000), (64, 9000), (2, 4)):
        got = gemm.config(rows, columns, depth, size, size == 2, room)
        held = (got["BLOCK_M"] + got["BLOCK_N"]) * got["BLOCK_K"] * size * got["num_stages"]
        assert held <= room
        assert got["num_stages"] >= 2


class Groups(NamedTuple):
    sizes: tuple[int, ...]
    beyond: int  # rows that no group has
    depth: int
    width: int
    dtype: torch.dtype
    offsets: torch.dtype = torch.int64
    bias: bool = True
    layout: str = "contiguous"


GROUPS = [
    Groups((3, 0, 20, 1), 2, 20, 33, torch.float32),
    Groups((3, 0, 20, 1), 0, 33, 20, torch.bfloat16, torch.int32, False, "strided"),
    Groups((0, 0), 5, 16, 24, torch.float16),
    Groups((0, 17, 0, 0, 16), 40, 100, 7, torch.float16, torch.int32, True, "offset"),
    Groups((5,), 0, 1, 1, torch.float32, torch.int32, True, "transposed"),
    Groups((16, 16, 32), 0, 32, 64, torch.bfloat16, torch.int64, True, "expanded"),
    Groups((3, 0, 20, 16), 5, 48, 64, torch.bfloat16),
    Groups((0, 17, 0, 0, 16), 40, 104, 72, torch.float16, torch.int32, False, "strided"),
]
if not INTERPRETING:
    GROUPS += [
        Groups((1000, 0, 3, 129, 2000), 300, 1000, 520, torch.bfloat16),
        Groups((1000, 0, 3, 129, 2000), 300, 1024, 520, torch.bfloat16, bias=False),
        Groups((0, 300, 128, 70), 0, 512, 768, torch.float16, torch.int32),
        Groups((0, 0, 513), 7, 8, 8, torch.bfloat16),
        Groups((1, 2, 3, 0), 1, 4096, 2050, torch.float16),
        Groups((300, 200), 0, 431, 300, torch.float32),
        Groups((64, 65, 63, 127, 129, 0, 0), 0, 2048, 1000, torch.bfloat16),
        Groups((5000, 4000, 3), 11, 448, 2048, torch.bfloat16),  # several tiles of each program
    ]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("pairs", [False] if INTERPRETING else [False, True])
@pytest.mark.parametrize("case", GROUPS, ids=str)
def test_grouped(case: Groups, pairs: bool, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """pairs: whether two groups of warps take tiles in turn, which the interpreter cannot run."""
    monkeypatch.setattr(persistent, "paired", lambda: pairs)
    rows, count = sum(case.sizes) + case.beyond, len(case.sizes)
    make: dict[str, Any] = {"dtype": case.dtype, "device": device}
    x = laid_out(normal(rows, case.depth, **make), case.layout)
    dy = laid_out(normal(rows, case.width, **make, seed=1), case.layout)
    weights = normal(count, case.width, case.depth, **make, seed=2) / case.depth**0.5
    bias = normal(count, case.width, **make, seed=3) if case.bias else None
    offsets = torch.tensor([0, *case.sizes]).cumsum(0).to(device, case.offsets)
    y = twice(grouped_linear, x, weights, bias, offsets)
    dx = twice(grouped_dgrad, dy, weights, offsets)
    dweights = twice(grouped_wgrad, dy, x, offsets)
    x64, dy64, weights64 = double(x, dy, weights)
    starts = [0, *offsets.tolist()]
    assert dweights.shape == weights.shape
    for g in range(count):
        own = slice(starts[g + 1], starts[g + 1] + case.sizes[g])
        expected = x64[own] @ weights64[g].T
        close(y[own], expected if bias is None else expected + double(bias[g])[0], 10.0)
        close(dx[own], dy64[own] @ weights64[g], 10.0)
        close(dweights[g], dy64[own].T @ x64[own], 10.0 * case.sizes[g])
    assert not y[sum(case.sizes) :].any()
    assert not dx[sum(case.sizes) :].any()
    by_columns = weights.mT.contiguous().mT  # TransposedGroupedLinear's, read as they are stored
    tolerance = {"rtol": 0.05, "atol": 0.05} if case.dtype != torch.float32 else {}
    torch.testing.assert_close(grouped_linear(x, by_columns, bias, offsets), y, **tolerance)
    torch.testing.assert_close(grouped_dgrad(dy, by_columns, offsets), dx, **tolerance)


@pytest.mark.parametrize("sizes", [(3, 0, 40, 1, 0), (0, 0), (200,), (5, 1000, 2)])
@pytest.mark.parametrize("by_sizes", [True, False])
def test_schedules(sizes: tuple[int, ...], by_sizes: bool, device: str) -> None:
    """Every tile once; sizes and offsets that go past the rows are cut."""
    rows, tile = 210, persistent.TILE
    ends = torch.tensor([0, *sizes]).cumsum(0)
    given = torch.tensor(sizes) if by_sizes else ends
    at = persistent.schedule(given.to(device), rows, by_sizes)
    plan = at.plan.tolist()
    cut = ends.clamp(max=rows).tolist()
    assert plan[: len(cut)] == cut
    expected = [
        [group, first, end]
        for group, (start, end) in enumerate(itertools.pairwise(cut))
        for first in range(start, end, tile)
    ]
    count = plan[len(cut)]
    table = at.plan[len(cut) + 1 :].reshape(-1, 3)
    assert count == len(expected) <= len(table)
    assert table[:count].tolist() == expected


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_groups_of_sizes(dtype: torch.dtype, device: str) -> None:
    """The schedule serves persistent products and those that there are none of; sums in fp32."""
    sizes, make = torch.tensor([40, 0, 3, 17]), {"dtype": dtype, "device": device}
    x, dy = normal(64, 48, **make), normal(64, 32, **make, seed=1)
    weights = normal(4, 32, 48, **make, seed=2)
    groups = groups_of(sizes.to(device), x)
    offsets = torch.tensor([0, 40, 40, 43, 60], device=device)
    assert isinstance(groups, persistent.Schedule)
    assert torch.equal(
        grouped_linear(x, weights, None, groups), grouped_linear(x, weights, None, offsets)
    )
    assert torch.equal(grouped_dgrad(dy, weights, groups), grouped_dgrad(dy, weights, offsets))
    ones = x.new_ones(64, 1)
    assert torch.equal(grouped_wgrad(dy, ones, groups), grouped_wgrad(dy, ones, offsets))
    sums = grouped_wgrad(dy, x, groups, torch.float32)
    close(sums[0], double(dy)[0][:40].T @ double(x)[0][:40], 400.0)


def test_what_has_no_persistent_product() -> None:
    make: dict[str, Any] = {"dtype": torch.float16, "device": "meta"}
    x, weights = torch.empty(64, 48, **make), torch.empty(4, 32, 48, **make)
    assert persistent.why_not(4, 64, x, weights) is None
    refused = {
        "float16 and bfloat16": (4, 64, x.float(), weights.float()),
        "so many groups": (5000, 64, x, weights),
        "multiple of 16 bytes": (4, 64, torch.empty(64, 47, **make), weights),
        "rows overlap": (4, 64, x[:1].expand(64, 48), weights),
        "in 31 bits": (4, 64, x, torch.empty(2**16, 2**15, 8, **make)),
    }
    for reason, (groups, rows, *operands) in refused.items():
        assert reason in str(persistent.why_not(groups, rows, *operands))


def test_grouped_without_rows_or_groups(device: str) -> None:
    x, weights = torch.ones(0, 8, device=device), torch.ones(2, 6, 8, device=device)
    offsets = torch.zeros(3, dtype=torch.int64, device=device)
    assert grouped_linear(x, weights, None, offsets).shape == (0, 6)
    assert torch.equal(grouped_wgrad(x[:, :6], x, offsets), torch.zeros(2, 6, 8, device=device))
    rows = torch.ones(3, 8, device=device)
    assert torch.equal(grouped_linear(rows, weights[:0], None, offsets[:1]), rows[:, :6] * 0)
    assert grouped_wgrad(rows, rows, offsets[:1]).shape == (0, 8, 8)


def test_grouped_offsets_past_the_rows_are_cut(device: str) -> None:
    """A wrong offset must not read what is not there."""
    x, weights = torch.ones(20, 8, device=device), torch.ones(2, 6, 8, device=device)
    offsets = torch.tensor([0, 4, 1000], device=device)
    right = torch.tensor([0, 4, 20], device=device)
    for function, args in (
        (grouped_linear, (x, weights, None)),
        (grouped_dgrad, (x[:, :6], weights)),
        (grouped_wgrad, (x[:, :6], x)),
    ):
        assert torch.equal(function(*args, offsets), function(*args, right))


def test_grouped_errors(device: str) -> None:
    x, weights = torch.ones(4, 8, device=device), torch.ones(2, 6, 8, device=device)
    offsets = torch.tensor([0, 1, 4], device=device)
    with pytest.raises(ValueError, match=r"grouped_linear got 2 weights, expected one for 1 gro"):
        grouped_linear(x, weights, None, offsets[:2])
    with pytest.raises(ValueError, match=r"got offsets \[3\] of torch.float32"):
        grouped_linear(x, weights, None, offsets.float())
    with pytest.raises(ValueError, match=r"expected one dtype and one device"):
        grouped_linear(x.half(), weights, None, offsets)
    with pytest.raises(ValueError, match=r"got bias \[6\], expected \[2, 6\]"):
        grouped_linear(x, weights, torch.ones(6, device=device), offsets)
    with pytest.raises(ValueError, match=r"grouped_dgrad got dy \[4, 8\], weights \[2, 6, 8\]"):
        grouped_dgrad(x, weights, offsets)
    with pytest.raises(ValueError, match=r"grouped_wgrad got 3 rows of dy and 4 of x"):
        grouped_wgrad(x[:3], x, offsets)
