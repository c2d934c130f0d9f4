"""Products with an activation beside them by two groups of warps: what they take, how to call them.

`ping_pong_activation` and `ping_pong_gradient` have the kernels, which are for Hopper.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..configs import Config, configured
from ..lazy import Lazy
from . import persistent
from .functions import constants
from .launch import ceil_div, launch, multiprocessors, on_device_of, packed
from .persistent import Schedule

forward, backward = Lazy("triton.ping_pong_activation"), Lazy("triton.ping_pong_gradient")

TILES = 4
"""For each multiprocessor: products of as many or fewer are not taken."""
LEAST = 256
"""The shortest rows: of shorter ones a Triton GEMM with an epilogue is faster."""
HALF = 64
"""Columns that are stored at once."""


def none_on(device: torch.device) -> str | None:
    """Why there are no kernels in which groups of warps do different things, or None."""
    if not persistent.paired():
        return "its kernels are Gluon's, which Triton does not interpret"
    if torch.version.hip or persistent.chip(device) != 9:
        return "its kernels are for sm_90"
    return None


def none_for(device: torch.device, depth: int, width: int) -> str | None:
    """Why there is no such kernel for a product of that depth, and width columns of y, or None."""
    if reason := none_on(device):
        return reason
    if depth < LEAST:
        return f"it is taken from a depth of {LEAST} on"
    if width % HALF or depth % persistent.DEPTH:
        return f"the width is no multiple of {HALF}, or the depth none of {persistent.DEPTH}"
    return None


def why_not(columns: int, x: Tensor, weights: Tensor, *others: Tensor) -> str | None:
    """Why operands that `none_for` has nothing against are not taken, or None.

    columns: of the product.
    """
    tile = persistent.TILE
    if ceil_div(x.size(0), tile) * ceil_div(columns, tile) <= TILES * multiprocessors(x.device):
        return "there are too few tiles to take turns"
    if not weights.is_contiguous():
        return "the weights are not adjacent"
    groups = weights.size(0) if weights.dim() == 3 else 1
    return persistent.why_not(groups, x.size(0), x, weights, *others)


def _options(depth: int, width: int, stages: int) -> tuple[Config, ...]:
    """Configurations, the usual one first."""
    usual = persistent.PAIR | {"STAGES": stages}
    return usual, usual | {"GROUP": 4}, usual | {"GROUP": 16}


def _constants(x: Tensor, at: Schedule | None, flags: dict[str, Any]) -> dict[str, Any]:
    return {
        **flags, "COUNT": 0 if at is None else at.groups, "PROGRAMS": multiprocessors(x.device),
        "BLOCK_M": persistent.TILE, "BLOCK_K": persistent.DEPTH,
    }  # fmt: skip


def activation(
    x: Tensor, weights: Tensor, bias: Tensor | None, kind: str, params: tuple[float, ...] = (),
    want: Collection[str] = (), at: Schedule | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`y = f(pre)`, `pre = x @ weights.T + bias`, as `gemm.linear_activation`, or of groups.

    x: `[rows, depth]`; weights: `[columns of pre, depth]` and bias `[columns of pre]`, or, with a
    schedule at of groups, one each for every group. Returns (y, pre), pre if "pre" is in want.
    """
    flags = constants(kind, params)
    rows, depth, total = x.size(0), x.size(1), weights.size(-2)
    width = total // 2 if flags["GATED"] else total
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    pre = torch.empty(rows, total, dtype=x.dtype, device=x.device) if "pre" in want else None
    common = _constants(x, at, flags) | configured("pair_activation", (depth, width, 6), _options)
    with on_device_of(x):
        launch(
            forward.ping_pong_activation_kernel, (common["PROGRAMS"],), x, weights, packed(bias),
            y, pre, None if at is None else at.plan, rows, depth, width, x.stride(0) // 8, **common,
        )  # fmt: skip
    return y, pre


def gradient(
    dy: Tensor, weights: Tensor, pre: Tensor, dpre: Tensor, kind: str,
    params: tuple[float, ...] = (), want: Collection[str] = (), at: Schedule | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`dpre = f'(pre) * (dy @ weights)`, as `gemm.linear_activation_backward`, or of groups.

    dy: `[rows, depth]`; weights: `[depth, width]`, or one for each group of a schedule at; pre:
    `[rows, columns of pre]`; dpre: like pre, contiguous, where the gradient goes, and may be pre.
    Returns (dpre, y): y is f(pre) if "y" is in want.
    """
    flags = constants(kind, params)
    rows, depth, width = dy.size(0), dy.size(1), weights.size(-1)
    y = torch.empty(rows, width, dtype=pre.dtype, device=pre.device) if "y" in want else None
    common = _constants(dy, at, flags) | configured("pair_gradient", (depth, width, 5), _options)
    with on_device_of(dy):
        launch(
            backward.ping_pong_gradient_kernel, (common["PROGRAMS"],), dy, weights, pre, dpre, y,
            None if at is None else at.plan, rows, depth, width, dy.stride(0) // 8,
            pre.stride(0) // 8, **common,
        )  # fmt: skip
    return dpre, y
