"""The update of delayed scaling in C++ has the bits of the formulas."""

import pytest
from delayed_kernels import UPDATES, check_noting, check_update

from opsgraph.kernels.cpu import build
from opsgraph.kernels.cpu.delayed import raise_to, updating

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason="no C++ compiler")


@pytest.mark.parametrize("names", UPDATES["names"])
@pytest.mark.parametrize(("margin", "algorithm"), UPDATES["margin", "algorithm"])
@pytest.mark.parametrize("length", UPDATES["length"][:4])
def test_bits(length: int, margin: float, algorithm: str, names: tuple[str, ...]) -> None:
    for is_reduced in UPDATES["is_reduced"]:
        check_update(updating, length, margin, algorithm, names, is_reduced, "cpu")


@pytest.mark.parametrize("count", [1, 2, 8, 11])
def test_amaxes_that_are_noted(count: int) -> None:
    check_noting(raise_to, count, "cpu")
