"""Delayed scaling's own kernels: the update of many states, and the noting of amaxes."""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from ...guards.launching import Launch, launching
from ..reference.quantize import FP32_MAX
from .launch import launch, on_device_of

MOST = 1024
"""Slots of a history that a program has at a time."""


@triton.jit
def _floats(address):
    return tl.load(address).to(tl.pointer_type(tl.float32))


@triton.jit(do_not_specialize=["length"])
def delayed_update_kernel(
    table, reduced, fixed, length, forward_max, backward_max, factor,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, LATEST: tl.constexpr, LARGEST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A column of a state: activation, weight or gradient.

    All threads have read an amax or a slot before one of them writes there: hence the barrier.
    """
    state, column = tl.program_id(0) // 3, tl.program_id(0) % 3
    row = table + state * 4
    scale = _floats(row) + column
    result = tl.load(scale)
    if FORWARD:
        tl.store(fixed + (tl.num_programs(0) + tl.program_id(0)) * 4, result)
    if (FORWARD and column < 2) or (BACKWARD and column == 2):
        amaxes = _floats(row + 1 + column // 2) + column % 2
        if reduced is None:
            amax = tl.load(amaxes)
        elif column == 2:
            amax = tl.load(reduced + state)
        else:
            first = tl.num_programs(0) // 3 if BACKWARD else 0
            amax = tl.load(reduced + first + state * 2 + column)
        if not (amax < 0):  # of a NaN this is True
            history = _floats(row + 3) + column
            slot = tl.arange(0, BLOCK)
            largest = tl.zeros([BLOCK], tl.float32)
            broken = tl.zeros([BLOCK], tl.int32)
            for start in tl.range(0, length, BLOCK):
                here = start + slot
                later = tl.load(history + (here + 1) * 3, here + 1 < length, other=0.0)
                is_nan = later != later
                largest = tl.maximum(largest, tl.where(is_nan, 0.0, later))
                broken = broken | is_nan.to(tl.int32)
                moved = tl.where(here + 1 == length, amax, later)
                tl.debug_barrier()
                tl.store(history + here * 3, tl.where(here == 0, 0.0, moved), here < length)
            top = amax
            usable = (amax > 0) & (amax < float("inf"))
            if not LATEST:
                top = tl.max(largest, 0)
                top = tl.where(amax > top, amax, top)
                usable = (amax == amax) & (tl.max(broken, 0) == 0)
                usable = usable & (top > 0) & (top < float("inf"))
            new = tl.div_rn(tl.where(column == 2, backward_max, forward_max), top) * factor
            result = tl.where(usable, tl.minimum(new, LARGEST), result)
            tl.store(scale, result)
        tl.store(amaxes, -1.0)
    tl.store(fixed + (state * 3 + column) * 4, result)


def updating(
    table: Tensor, length: int, limits: tuple[float, float], margin: float, latest: bool,
    updates: Sequence[str], reduced: bool = False,
) -> Launch:  # fmt: skip
    """What does `reference.quantize.delayed_update` on the buffers of states.

    It is launched on the table and on where all scales are to be (`new_scales`), and, if reduced,
    on where the amaxes are, fp32, all of updates one after the other. table: int64 `[states, 4]`,
    the addresses of each state's scale `[3]`, amax_forward `[2]`, amax_backward `[1]` and
    amax_history `[length, 3]`, fp32 and contiguous, on the table's device. What updates names,
    "amax_forward" or "amax_backward", becomes history and scales, by limits for each, and is -1
    afterwards; an amax below 0 changes nothing. latest: whether scales come from the latest amax
    alone. After "amax_forward" the scales of before follow.
    """
    states, block = table.size(0), min(MOST, 1 << (length - 1).bit_length())
    options = dict(
        FORWARD="amax_forward" in updates, BACKWARD="amax_backward" in updates, LATEST=latest,
        LARGEST=FP32_MAX, BLOCK=block, num_warps=max(1, min(4, block // 256)),
    )  # fmt: skip

    def update(table: Tensor, fixed: Tensor, amaxes: Tensor | None = None) -> None:
        with on_device_of(table):
            launch(
                delayed_update_kernel, (3 * states,),
                table, amaxes, fixed, length, *limits, 2.0**-margin, **options,
            )  # fmt: skip

    key = "update", table.device, states, length, limits, margin, latest, *updates, reduced
    return launching.by(key, update)


PAIRS, PARTS, RAISED = 8, 16, 1024
"""Amaxes that one launch notes, programs for each, and how many values one has at a time."""


@triton.jit
def _raise(seen, amaxes, number, part, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """An amax is not negative: its bits are in the order of the numbers, with a NaN above them."""
    count = number // 16
    if part * BLOCK < count:
        slot = part * BLOCK + tl.arange(0, BLOCK)
        largest = tl.full([BLOCK], -1.0, tl.float32)
        broken = tl.zeros([BLOCK], tl.int32)
        for start in tl.range(0, count - part * BLOCK, PARTS * BLOCK):
            value = tl.load(amaxes + start + slot, start + slot < count, other=-1.0)
            broken = broken | (value != value).to(tl.int32)
            largest = tl.maximum(largest, value)
        bits = tl.max(largest, 0).to(tl.int32, bitcast=True)
        bits = tl.where(tl.max(broken, 0) > 0, 0x7FC00000, bits)
        tl.atomic_max(seen.to(tl.pointer_type(tl.int32), bitcast=True), bits, sem="relaxed")


@triton.jit(
    do_not_specialize=[f"n{k}" for k in range(PAIRS)],
    do_not_specialize_on_alignment=[*range(2 * PAIRS)],
)
def raise_kernel(
    s0, s1, s2, s3, s4, s5, s6, s7, a0, a1, a2, a3, a4, a5, a6, a7,
    n0, n1, n2, n3, n4, n5, n6, n7, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The amaxes of each of `seen` are at an address, as many as a 16th of n; 0 for none."""
    pair, part = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    seen, amaxes = (s0, s1, s2, s3, s4, s5, s6, s7), (a0, a1, a2, a3, a4, a5, a6, a7)
    numbers = n0, n1, n2, n3, n4, n5, n6, n7
    for k in tl.static_range(len(numbers)):
        if pair == k:
            _raise(seen[k], amaxes[k], numbers[k], part, PARTS, BLOCK)


def raise_to(seen: Sequence[Tensor], amaxes: Sequence[Tensor]) -> None:
    """Write the larger of both, or a NaN, to each of `seen`, fp32 `[]`, one after the other.

    amaxes: fp32 `[]`, or `[n]`, of which the largest counts.
    """
    for first in range(0, len(seen), PAIRS):
        some, others = seen[first : first + PAIRS], amaxes[first : first + PAIRS]
        key = "raise", some[0].device, len(some), *map(Tensor.numel, others)
        launching.by(key, _raise_some, anywhere=True)(*some, *others)


def _raise_some(*tensors: Tensor) -> None:
    count = len(tensors) // 2
    both = ([*side, *[side[0]] * (PAIRS - count)] for side in (tensors[:count], tensors[count:]))
    # All of a kind for which Triton compiles one kernel: replays need it when they are recorded.
    counts = *map(Tensor.numel, tensors[count:]), *[0] * (PAIRS - count)
    numbers = [16 * number + 2 for number in counts]
    with on_device_of(tensors[0]):
        launch(
            raise_kernel, (PAIRS * PARTS,), *(each for side in both for each in side), *numbers,
            PARTS=PARTS, BLOCK=RAISED, num_warps=4,
        )  # fmt: skip
