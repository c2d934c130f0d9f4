"""Matrix products that hide the collectives beside them, on any device and torch.distributed.

Forward, and where no weight gradient is wanted, collective and product are cut into pieces of rows,
see `kernels.overlap`. In the backward the input of a column-parallel linear is gathered again while
its input gradient is computed, and that gradient travels while the weight gradient is; so a rank
keeps its own rows alone. Each has its twin over symmetric memory, which `symmetric.py` holds.

A Tee may stand between the collective and the linear: the gathered value is then handed out, and
the gradient that arrives there is added before the collective.
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..errors import OpError
from ..fuser import Fuser, register
from ..kernels.exchange import collectives
from ..kernels.exchange import pieces as overlap
from ..op import Op
from ..ops import AllGather, AllReduce, AllReduceGrad, BasicLinear, Bias, ReduceScatter, Tee


def alone(exchange: Any) -> str | None:
    """Why there is nothing to hide, or None."""
    return "its group has one rank" if exchange.group_size == 1 else None


def verify_rows(x: Tensor, group_size: int) -> None:
    """Raises OpError for rows that cannot be scattered."""
    if x.shape[0] % group_size:
        raise OpError("ReduceScatter", f"{x.shape[0]} rows", f"a multiple of {group_size} ranks")


def dgrad(dy: Tensor, weight: Tensor, also: Tensor | None) -> Tensor:
    """The gradient of a linear's input, and of what else reads it."""
    return dy @ weight if also is None else torch.addmm(also, dy, weight)


@register
class GatherLinear(Fuser):
    """All-gather, linear and bias: a piece is multiplied while the next one is gathered."""

    backend, pattern = "overlap", dict(gather=AllGather, fc=BasicLinear, bias=Bias | None)
    saves = ("fc_x",)

    def reject(self, gather: Op) -> str | None:
        return alone(gather)

    def fwd(
        self, x: Tensor, gather_group: str, gather_group_size: int, fc_weight: Tensor,
        bias_bias: Tensor | None, want: Collection[str],
    ) -> Any:  # fmt: skip
        group = gather_group, gather_group_size
        y, whole = overlap.gather_matmul(x, fc_weight.t(), bias_bias, *group, "fc_x" in want)
        return y, (whole,)


@register
class GatherLinearBackward(Fuser):
    """Backward of all-gather and linear, from this rank's own rows of the input.

    They are gathered behind the input gradient, which is scattered behind the weight gradient.
    """

    backend, pattern = "overlap", dict(gather=AllGather, tee=Tee | None, fc=BasicLinear)

    def reject(self, gather: Op) -> str | None:
        return alone(gather)

    def bwd(
        self, dy: Tensor, x: Tensor, gather_group: str, gather_group_size: int,
        tee_d: Tensor | None, fc: Any, fc_weight: Tensor, fc_weight_stored: Tensor,
        want: Collection[str],
    ) -> Any:  # fmt: skip
        group = gather_group, gather_group_size
        verify_rows(dy, gather_group_size)
        if "fc_weight" not in want:
            if tee_d is None:
                return overlap.matmul_scatter(dy, fc_weight, *group), (None,)
            return collectives.reduce_scatter(dgrad(dy, fc_weight, tee_d), *group), (None,)
        arriving, leaving = collectives.start_all_gather(x, *group), None
        if "x" in want:
            leaving = collectives.start_reduce_scatter(dgrad(dy, fc_weight, tee_d), *group)
        dweight = fc.wgrad(dy, collectives.wait(arriving), fc_weight_stored)
        return None if leaving is None else collectives.wait(leaving), (dweight,)


@register
class LinearReduceBackward(Fuser):
    """Backward of a linear that takes all of the input: dx is summed behind the weight gradient."""

    backend, pattern = "overlap", dict(reduce=AllReduceGrad, tee=Tee | None, fc=BasicLinear)

    def reject(self, reduce: Op) -> str | None:
        return alone(reduce)

    def bwd(
        self, dy: Tensor, reduce_group: str, tee_d: Tensor | None, fc: Any, fc_x: Tensor,
        fc_weight: Tensor, fc_weight_stored: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        if "fc_weight" not in want and tee_d is None:
            return overlap.matmul_all_reduce(dy, fc_weight, reduce_group), (None,)
        leaving = dweight = None
        if "x" in want:
            dx = dgrad(dy, fc_weight, tee_d)
            leaving = overlap.start_all_reduce_in_place(dx, reduce_group)
        if "fc_weight" in want:
            dweight = fc.wgrad(dy, fc_x, fc_weight_stored)
        return None if leaving is None else collectives.wait(leaving), (dweight,)


@register
class LinearScatter(Fuser):
    """Linear and reduce-scatter: a piece is scattered while the next one is multiplied.

    Backward: a piece of dy is multiplied while the next one is gathered; the weight gradient
    follows when all of dy is there.
    """

    backend, pattern = "overlap", dict(fc=BasicLinear, scatter=ReduceScatter)

    def reject(self, scatter: Op) -> str | None:
        return alone(scatter)

    def fwd(self, x: Tensor, fc_weight: Tensor, scatter_group: str, scatter_group_size: int) -> Any:
        verify_rows(x, scatter_group_size)
        group = scatter_group, scatter_group_size
        return overlap.matmul_scatter(x, fc_weight.t(), *group), ()

    def bwd(
        self, dy: Tensor, fc: Any, fc_x: Tensor, fc_weight: Tensor, fc_weight_stored: Tensor,
        scatter_group: str, scatter_group_size: int, want: Collection[str],
    ) -> Any:  # fmt: skip
        group, weighs = (scatter_group, scatter_group_size), "fc_weight" in want
        dx = None
        if "x" in want:
            dx, whole = overlap.gather_matmul(dy, fc_weight, None, *group, weighs)
        else:
            whole = collectives.all_gather(dy, *group)
        return dx, (None if whole is None else fc.wgrad(whole, fc_x, fc_weight_stored),)


@register
class LinearAllReduce(Fuser):
    """Linear and all-reduce: a piece is summed over ranks while the next one is multiplied."""

    backend, pattern = "overlap", dict(fc=BasicLinear, reduce=AllReduce)

    def reject(self, reduce: Op) -> str | None:
        return alone(reduce)

    def fwd(self, x: Tensor, fc_weight: Tensor, reduce_group: str) -> Any:
        return overlap.matmul_all_reduce(x, fc_weight.t(), reduce_group), ()
