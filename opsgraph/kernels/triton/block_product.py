"""A product of FP8 with scales of blocks by two groups of warps: what it takes, how to call it.

`block_product_kernels` has the kernel, which is for Hopper.
"""

from torch import Tensor

from ..configs import Config, configured
from ..formats import BLOCKS
from ..lazy import Lazy
from . import pairs, persistent
from .launch import ceil_div, launch, multiprocessors, on_device_of

kernels = Lazy("triton.block_product_kernels")

STEPS = (8, 4)
"""How many steps stand without a jump: as many as divide a product's, or the last."""


def why_not(out: Tensor, a: Tensor, b: Tensor, a_scale: Tensor) -> str | None:
    """Why there is no product of these, or None. See `block_product`."""
    if reason := pairs.none_on(a.device):
        return reason
    if out.element_size() != 2:
        return "it writes 16 bits"
    for operand in (out, a, b, a_scale):
        if operand.size(1) * operand.element_size() % 16 or operand.data_ptr() % 16:
            return "a row does not begin at a multiple of 16 bytes"
        if not operand.is_contiguous():
            return "rows are not adjacent"
        if not 0 < operand.size(0) < 2**31 - 2**16:
            return "descriptors count rows in 31 bits"
    return None


def _options(depth: int, columns: int) -> tuple[Config, ...]:
    """Configurations, the usual one first."""
    return tuple(persistent.PAIR | {"GROUP": group} for group in (8, 4, 16))


def block_product(
    out: Tensor, a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, bias: Tensor | None
) -> None:
    """`out = a @ b.T (+ bias)`, with sums in fp32.

    a: FP8 `[rows, depth]`; b: FP8 `[columns, depth]`. a_scale: fp32 `[blocks of depth, rows or
    more]`, what 1 x 128 values of a are multiplied with; b_scale: fp32 `[blocks of columns, blocks
    of depth or more]`, for 128 x 128 of b. bias: `[columns]`.
    """
    (rows, depth), columns = a.shape, b.size(0)
    blocks, programs = ceil_div(depth, BLOCKS["blocks"]), multiprocessors(a.device)
    steps = next((count for count in STEPS if blocks % count == 0), STEPS[-1])
    options = configured("block_product", (depth, columns), _options)
    with on_device_of(a):
        launch(
            kernels.block_product_kernel, (programs,), a, b, a_scale, b_scale, bias, out, rows,
            columns, depth, a_scale.size(1), b_scale.size(1), UNROLL=steps, PROGRAMS=programs,
            **options,
        )  # fmt: skip
