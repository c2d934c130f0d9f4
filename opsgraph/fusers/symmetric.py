"""The twins of `overlap.py` over symmetric memory, for GPUs of one node joined by NVLink.

They are taken where the linear asks for them: by names of LayerNormMLP's arguments in
`Linear(overlap=...)`, and by `Linear(symmetric_ar_type=...)`.

| fuser | asked for by |
|---|---|
| SymmetricGatherLinear | ub_overlap_ag |
| SymmetricGatherLinearBackward | ub_overlap_rs_dgrad |
| SymmetricLinearScatter | ub_overlap_rs |
| SymmetricLinearScatterBackward | ub_overlap_ag |
| SymmetricLinearAllReduce | symmetric_ar_type |

ub_bulk_dgrad and ub_bulk_wgrad are what `overlap.GatherLinearBackward` does unasked: gather behind
the input gradient, scatter behind the weight gradient.
"""

import os
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ..fuser import Fuser, register
from ..kernels.exchange import collectives
from ..op import Op, Spec
from ..ops import AllGather, AllReduce, BasicLinear, Bias, ReduceScatter, Tee
from .lazy import Lazy
from .overlap import alone, verify_rows

symmetric = Lazy("exchange.symmetric")


def refusal(exchange: Any, x: Spec) -> str | None:
    """Why symmetric memory cannot serve an exchange, or None."""
    here = max(torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if exchange.group_size > here:
        return f"its group of {exchange.group_size} ranks is more than the {here} of this node"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes fp32, fp16 and bf16, not {x.dtype}"
    return alone(exchange)


def asked(fc: Op, flag: str) -> str | None:
    """Why it is refused where the linear does not ask for it, or None."""
    return None if flag in getattr(fc, "overlap", ()) else f"it takes {flag}, which is off"


@register
class SymmetricGatherLinear(Fuser):
    """All-gather, linear and bias: each rank's rows are multiplied as they arrive."""

    backend, pattern = "symmetric", dict(gather=AllGather, fc=BasicLinear, bias=Bias | None)
    saves = ("fc_x",)

    def reject(self, gather: Op, fc: Op, x: Spec) -> str | None:
        return asked(fc, "ub_overlap_ag") or refusal(gather, x)

    def fwd(
        self, x: Tensor, gather_group: str, fc_weight: Tensor, bias_bias: Tensor | None,
        want: Collection[str],
    ) -> Any:  # fmt: skip
        y, whole = symmetric.gather_matmul(x, fc_weight.t(), gather_group, "fc_x" in want)
        return y if bias_bias is None else y.add_(bias_bias), (whole,)


@register
class SymmetricGatherLinearBackward(Fuser):
    """Backward of all-gather and linear: pieces of the input gradient leave as they are made.

    Meanwhile the input is gathered again, for the weight gradient that follows.
    """

    backend, pattern = "symmetric", dict(gather=AllGather, tee=Tee | None, fc=BasicLinear)

    def reject(self, gather: Op, tee: Op | None, fc: Op, x: Spec) -> str | None:
        if tee is not None and "ub_overlap_rs_dgrad" in getattr(fc, "overlap", ()):
            return "the gradient that arrives at the Tee is added before the exchange"
        return asked(fc, "ub_overlap_rs_dgrad") or refusal(gather, x)

    def bwd(
        self, dy: Tensor, x: Tensor, gather_group: str, gather_group_size: int, fc: Any,
        fc_weight: Tensor, fc_weight_stored: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        verify_rows(dy, gather_group_size)
        arriving = dx = dweight = None
        if "fc_weight" in want:
            arriving = collectives.start_all_gather(x, gather_group, gather_group_size)
        if "x" in want:
            dx = symmetric.matmul_scatter(dy, fc_weight, gather_group)
        if arriving is not None:
            dweight = fc.wgrad(dy, collectives.wait(arriving), fc_weight_stored)
        return dx, (dweight,)


@register
class SymmetricLinearScatter(Fuser):
    """Linear and reduce-scatter: each rank's rows leave as soon as they are multiplied."""

    backend, pattern = "symmetric", dict(fc=BasicLinear, scatter=ReduceScatter)

    def reject(self, fc: Op, scatter: Op, x: Spec) -> str | None:
        return asked(fc, "ub_overlap_rs") or refusal(scatter, x)

    def fwd(self, x: Tensor, fc_weight: Tensor, scatter_group: str, scatter_group_size: int) -> Any:
        verify_rows(x, scatter_group_size)
        return symmetric.matmul_scatter(x, fc_weight.t(), scatter_group), ()


@register
class SymmetricLinearScatterBackward(Fuser):
    """Backward of linear and reduce-scatter: each rank's rows of dy are multiplied as they come."""

    backend, pattern = "symmetric", dict(fc=BasicLinear, scatter=ReduceScatter)

    def reject(self, fc: Op, scatter: Op, x: Spec) -> str | None:
        return asked(fc, "ub_overlap_ag") or refusal(scatter, x)

    def bwd(
        self, dy: Tensor, fc: Any, fc_x: Tensor, fc_weight: Tensor, fc_weight_stored: Tensor,
        scatter_group: str, scatter_group_size: int, want: Collection[str],
    ) -> Any:  # fmt: skip
        weighs = "fc_weight" in want
        if "x" in want:
            dx, whole = symmetric.gather_matmul(dy, fc_weight, scatter_group, weighs)
        else:
            dx, whole = None, collectives.all_gather(dy, scatter_group, scatter_group_size)
        return dx, (fc.wgrad(whole, fc_x, fc_weight_stored) if weighs else None,)


@register
class SymmetricLinearAllReduce(Fuser):
    """Linear and all-reduce: the product is written where the other GPUs read and add it."""

    backend, pattern = "symmetric", dict(fc=BasicLinear, reduce=AllReduce)

    def reject(self, fc: Any, reduce: Op, x: Spec) -> str | None:
        how = getattr(fc, "symmetric_ar_type", None)
        if how is None:
            return "it takes symmetric_ar_type, which is None"
        if x.dtype not in (torch.float32, torch.bfloat16):
            return f"its kernel takes fp32 and bf16, not {x.dtype}"
        if fc.local_out_features * x.dtype.itemsize % 4:
            return f"its kernel takes rows of whole 4 bytes, not {fc.local_out_features} {x.dtype}"
        if how == "multimem_all_reduce" and not symmetric.has_multicast(x.device):
            return "multimem_all_reduce takes multicast, which this GPU's links have not"
        return refusal(reduce, x)

    def fwd(self, x: Tensor, fc: Any, fc_weight: Tensor, reduce_group: str) -> Any:
        how = fc.symmetric_ar_type
        return symmetric.matmul_all_reduce(x, fc_weight.t(), reduce_group, how), ()
