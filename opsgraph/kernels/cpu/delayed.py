"""Delayed scaling's own kernels in C++: the update of many states, and the noting of amaxes."""

from collections.abc import Sequence

from torch import Tensor

from ...guards.launching import launching
from ..reference.quantize import new_scales
from .launch import Kernel, address

PAIRS = 8
"""Amaxes that one call of the kernel notes."""
_update = Kernel("opsgraph_delayed_update", "5q 3d 3P", "delayed")
_raise = Kernel("opsgraph_raise", f"q {2 * PAIRS}P", "delayed")


def delayed_update(
    table: Tensor, length: int, limits: tuple[float, float], margin: float, latest: bool,
    updates: Sequence[str], reduced: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`kernels.triton.delayed.delayed_update`, of states on the CPU."""
    states, forward = table.size(0), "amax_forward" in updates
    fixed = new_scales(states * (1 + forward), table.device)

    def update(table: Tensor, fixed: Tensor, reduced: Tensor | None = None) -> None:
        _update(
            states, length, forward, "amax_backward" in updates, latest, *limits, 2.0**-margin,
            table.data_ptr(), address(reduced), fixed.data_ptr(),
        )  # fmt: skip

    key = "update", table.device, states, length, limits, margin, latest, *updates
    given = [table, fixed] if reduced is None else [table, fixed, reduced]
    launching.run((*key, len(given)), update, given)
    return fixed


def raise_to(seen: Sequence[Tensor], amaxes: Sequence[Tensor]) -> None:
    """Write the larger of both, or a NaN, to each of `seen`, fp32 `[]`, one after the other."""
    for first in range(0, len(seen), PAIRS):
        some, others = seen[first : first + PAIRS], amaxes[first : first + PAIRS]
        nothing = [0] * (PAIRS - len(some))
        both = ([each.data_ptr() for each in side] + nothing for side in (some, others))
        _raise(len(some), *(address for side in both for address in side))
