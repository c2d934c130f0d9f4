"""Delayed scaling's own kernels in C++: the update of many states, and the noting of amaxes."""

from collections.abc import Sequence

from torch import Tensor

from ...guards.launching import Launch, launching
from .launch import Kernel, address

PAIRS = 8
"""Amaxes that one call of the kernel notes."""
_update = Kernel("opsgraph_delayed_update", "5q 3d 3P", "delayed")
_raise = Kernel("opsgraph_raise", f"q {2 * PAIRS}P", "delayed")


def updating(
    table: Tensor, length: int, limits: tuple[float, float], margin: float, latest: bool,
    updates: Sequence[str], reduced: bool = False,
) -> Launch:  # fmt: skip
    """`kernels.triton.delayed.updating`, of states on the CPU."""
    states, factor = table.size(0), 2.0**-margin
    forward, backward = (f"amax_{way}" in updates for way in ("forward", "backward"))

    def update(table: Tensor, fixed: Tensor, amaxes: Tensor | None = None) -> None:
        _update(
            states, length, forward, backward, latest, *limits, factor,
            table.data_ptr(), address(amaxes), fixed.data_ptr(),
        )  # fmt: skip

    key = "update", table.device, states, length, limits, margin, latest, *updates, reduced
    return launching.by(key, update)


def raise_to(seen: Sequence[Tensor], amaxes: Sequence[Tensor]) -> None:
    """Write the larger of both, or a NaN, to each of `seen`, fp32 `[]`, one after the other."""
    for first in range(0, len(seen), PAIRS):
        some, others = seen[first : first + PAIRS], amaxes[first : first + PAIRS]
        nothing = [0] * (PAIRS - len(some))
        both = ([each.data_ptr() for each in side] + nothing for side in (some, others))
        _raise(len(some), *(address for side in both for address in side))
