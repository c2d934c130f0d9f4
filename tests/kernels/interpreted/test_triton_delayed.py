"""The update of delayed scaling in one launch has the bits of the formulas."""

import pytest
from delayed_kernels import UPDATES, check_noting, check_update

from opsgraph.kernels.triton.delayed import raise_to, updating


@pytest.mark.parametrize("is_reduced", UPDATES["is_reduced"])
@pytest.mark.parametrize("names", UPDATES["names"])
@pytest.mark.parametrize(("margin", "algorithm"), UPDATES["margin", "algorithm"])
@pytest.mark.parametrize("length", UPDATES["length"])
def test_bits(
    length: int, margin: float, algorithm: str, names: tuple[str, ...], is_reduced: bool,
    device: str,
) -> None:  # fmt: skip
    check_update(updating, length, margin, algorithm, names, is_reduced, device)


@pytest.mark.parametrize("count", [1, 2, 8, 11])
def test_amaxes_that_are_noted(count: int, device: str) -> None:
    check_noting(raise_to, count, device)
