"""The update of delayed scaling in one launch has the bits of the formulas."""

import pytest
import torch
from delayed_kernels import UPDATES, check_noting, check_update

from opsgraph.kernels.triton.delayed import raise_to, updating


@pytest.mark.sampled(30)
@pytest.mark.parametrize("is_reduced", UPDATES["is_reduced"])
@pytest.mark.parametrize("names", UPDATES["names"])
@pytest.mark.parametrize(("margin", "algorithm"), UPDATES["margin", "algorithm"])
@pytest.mark.parametrize("length", UPDATES["length"])
def test_bits(
    length: int, margin: float, algorithm: str, names: tuple[str, ...], is_reduced: bool,
    device: str,
) -> None:  # fmt: skip
    check_update(updating, length, margin, algorithm, names, is_reduced, device)


@pytest.mark.parametrize("count", [1, 5, 1024, 2500, 20000])
def test_amaxes_in_parts(count: int, device: str) -> None:
    """The largest counts, or a NaN wherever it is; one that is alone may stand beside them."""
    held = torch.tensor([-1.0, -1.0, 5.0], device=device)
    first, broken = (torch.rand(count, generator=torch.Generator().manual_seed(1)) for _ in "12")
    broken[count // 2] = torch.nan
    alone, seen = torch.tensor(0.25), held.unbind()
    raise_to([*seen, seen[0]], [t.to(device) for t in (first, broken, first, alone)])
    largest = max(float(first.max()), 0.25)
    expected = torch.tensor([largest, torch.nan, 5.0])
    torch.testing.assert_close(held.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", [1, 2, 8, 11])
def test_amaxes_that_are_noted(count: int, device: str) -> None:
    check_noting(raise_to, count, device)
