"""Kernels that take bf16 two values to a word give the bits of those that take one at a time.

Those are held to the reference: `test_triton_quantize.py`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from kernel_checks import INTERPRETING, bits, normal
from torch import Tensor

from opsgraph.kernels.formats import E4M3, E5M2, Format
from opsgraph.kernels.triton import quantize as quantizing
from opsgraph.kernels.triton import quantize_backward
from opsgraph.kernels.triton.quantize import activation_quantize, quantize
from opsgraph.kernels.triton.quantize_backward import activation_backward_quantize
from opsgraph.kernels.triton.quantize_norms import norm_quantize, norm_quantize_again

HALF, BOTH = torch.bfloat16, ("row", "col")
BLOCKS = [Format("blocks", dtype, 0.0, True) for dtype in (E4M3, E5M2)]
SQUARES = [Format("square", E4M3, 0.0, True), Format("square", E5M2), Format("square", E4M3, 1e-4)]


def special(rows: int, width: int, device: str, seed: int) -> Tensor:
    """Rows of zeros, infinities, NaNs, subnormal and huge values, and columns of zeros."""
    x = normal(rows, width, dtype=torch.float32, device=device, seed=seed)
    x[1::7] = 0.0
    x[2::14, width // 2] = float("-inf")
    x[3::14, width // 3] = float("nan")
    x[4::7] *= 2.0**-124
    x[5::7] *= 2.0**118
    x[:, ::5] = 0.0
    return known(x.to(HALF))


def known(x: Tensor) -> Tensor:
    """Without subnormal values, where Triton's interpreter has others (as of 3.9)."""
    return torch.where(x.abs() < 2.0**-126, 0.0, x) if INTERPRETING else x


def tensors(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [t for part in result if part is not None for t in tensors(part)]


def assert_same(found: Tensor, expected: Tensor) -> None:
    """The same bits, but for sums of rows, which larger tiles add in another order."""
    if found.dim() == 1 and found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    else:
        assert torch.equal(bits(found), bits(expected))


def compare(
    run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch, taken: Callable[[Any, Any], bool]
) -> None:
    """taken: whether a launch, of a kernel with constants, takes pairs."""
    launched: list[bool] = []
    for module in (quantizing, quantize_backward):
        original = module.launch

        def launch(kernel: Any, *rest: Any, original: Any = original, **constants: Any) -> None:
            launched.append(taken(kernel, constants))
            original(kernel, *rest, **constants)

        monkeypatch.setattr(module, "launch", launch)
    found = tensors(run())
    assert any(launched)
    launched.clear()
    for module in (quantizing, quantize_backward):
        monkeypatch.setattr(module, "in_pairs", lambda x: False)
    expected = tensors(run())
    assert not any(launched)
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("given", [None, 0.37])
@pytest.mark.parametrize(("kind", "rows", "width"), [("swiglu", 80, 68), ("gelu", 16, 136)])
def test_gradients_with_one_scale(
    kind: str, rows: int, width: int, given: float | None, device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    x = special(rows, width * (2 if kind == "swiglu" else 1), device, 1)
    dy = special(rows, width, device, 2).flip(0)
    scale = None if given is None else torch.tensor(given, device=device)
    run = partial(
        activation_backward_quantize, dy, x, kind, Format("tensor", E5M2), scale=scale,
        want=(*BOTH, "amax"), y_to=Format("tensor"), y_scale=scale, y_want=("col", "amax"),
        dbias=torch.float32,
    )  # fmt: skip
    compare(run, monkeypatch, lambda kernel, constants: constants.get("PAIRS", False))
    monkeypatch.undo()
    columns = partial(run, want=("col",), y_want=(), dbias=None)
    compare(columns, monkeypatch, lambda kernel, constants: constants.get("PAIRS", False))


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("kind", "rows", "width", "y_want"),
    [("swiglu", 144, 128, ("col",)), ("gelu", 16, 200, BOTH), ("swiglu", 16, 128, ())],
)
def test_gradients_in_blocks(
    kind: str, rows: int, width: int, y_want: tuple[str, ...], device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    x = special(rows, width * (2 if kind == "swiglu" else 1), device, 5)
    dy = special(rows, width, device, 6).flip(0)
    run = partial(
        activation_backward_quantize, dy, x, kind, BLOCKS[1], want=BOTH, y_to=BLOCKS[0],
        y_want=y_want, dbias=torch.float32,
    )  # fmt: skip
    compare(run, monkeypatch, lambda kernel, constants: constants.get("PAIRS", False))
    monkeypatch.undo()
    if width % 128 == 0:
        rows_alone = partial(run, want=("row",), y_want=(), dbias=None)
        compare(rows_alone, monkeypatch, lambda kernel, constants: constants.get("PAIRS", False))


@pytest.mark.parametrize("to", SQUARES, ids=str)
def test_squares(to: Format, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = special(144, 256, device, 7)
    x[:128, 128:] = 0.0
    x[128:] = normal(16, 256, dtype=HALF, device=device, seed=8)
    for want in (BOTH, ("row",), ("col",)):
        kernel = quantizing.pairs_kernel
        run = partial(quantize, x, to, None, want)
        compare(run, monkeypatch, lambda launched, constants, kernel=kernel: launched is kernel)
        monkeypatch.undo()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("to", BLOCKS, ids=lambda to: str(to.dtype)[-4:])
@pytest.mark.parametrize(("rows", "width"), [(144, 256), (16, 128)])
def test_blocks(
    rows: int, width: int, to: Format, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = special(rows, width, device, 3), normal(width, dtype=HALF, device=device)
    gated = special(rows, 2 * width, device, 4)
    *_, rstd, _ = norm_quantize(x, weight, None, 1e-5, to, want=("rstd",))
    assert rstd is not None
    for run in (
        partial(quantize, x, to, None, BOTH),
        partial(quantize, x, to, None, ("col",)),
        partial(norm_quantize_again, x, None, rstd, weight, None, to, 0, None, ("col",)),
        partial(activation_quantize, gated, "swiglu", to, want=BOTH),
    ):
        kernel = quantizing.pairs_kernel
        compare(run, monkeypatch, lambda launched, constants, kernel=kernel: launched is kernel)
        monkeypatch.undo()


def test_scales_of_blocks_at_every_exponent(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1.75 is where a power of two ends; a column has one value that is not zero."""
    exponent = torch.arange(256, dtype=torch.int32)[:, None] << 7
    values = (exponent | torch.tensor([0, 1, 95, 96, 97, 127])).to(torch.int16).view(HALF)
    x = torch.zeros(256, 768, dtype=HALF, device=device)
    x[5], x[133] = known(values.to(device).view(2, 768))
    for to in BLOCKS:
        run = partial(quantize, x, to, None, ("col",))
        kernel = quantizing.pairs_kernel
        compare(run, monkeypatch, lambda launched, constants, kernel=kernel: launched is kernel)
        monkeypatch.undo()


@pytest.mark.parametrize("in_pairs", [True, False])
def test_inverses_of_powers_of_two(
    in_pairs: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For scales from 2^-120 to 2^127, whose inverse is subnormal."""
    if not in_pairs:
        monkeypatch.setattr(quantizing, "in_pairs", lambda x: False)
    x = torch.ones(256, 256, device=device)
    x[:128] *= torch.exp2(torch.arange(-126.0, 130.0, device=device).clamp(max=127))
    x[128:] *= torch.exp2(torch.arange(-126.0, 2.0, device=device))[:, None]
    copies = quantize(x.to(HALF), BLOCKS[0], None, BOTH)
    for copy in (copies.row, copies.col):
        assert copy is not None
        _, scale, inverse = copy
        assert torch.equal(bits(inverse.flatten(1)), bits(scale.t().reciprocal()))
