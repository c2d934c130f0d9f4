"""Matrix products that hide the exchanges beside them.

Backend `overlap` runs on any device. Forward, and in a backward without a weight gradient, exchange
and product are cut into pieces of rows, see `kernels.exchange.pieces`. Otherwise the input of a
column-parallel linear is gathered again while its input gradient is computed, and that gradient
travels while the weight gradient is; so a rank keeps its own rows alone.

Backend `symmetric` is for GPUs of one node joined by NVLink. Its fusers do the same over symmetric
memory, where the linear asks for them: by names of LayerNormMLP's arguments in
`Linear(overlap=...)`, each fuser's `flag`, or by `Linear(symmetric_ar_type=...)`. Of these names
ub_bulk_dgrad and ub_bulk_wgrad are what GatherLinearBackward does unasked: gather behind the input
gradient, scatter behind the weight gradient.

A Tee may stand between the exchange and the linear: the gathered value is then handed out, and the
gradient that arrives there is added before the exchange.
"""

from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..base.errors import OpError
from ..fuser import Fuser, register
from ..kernels.exchange import collectives, pieces
from ..kernels.lazy import Lazy
from ..op import Op, Spec
from ..ops import AllGather, AllReduce, AllReduceGrad, BasicLinear, Bias, ReduceScatter, Tee
from ..ops.main_grad import weight_gradient

symmetric, gemm = Lazy("exchange.symmetric"), Lazy("cublaslt.gemm")


def _verify_rows(x: Tensor, group_size: int) -> None:
    """Raises OpError for rows that cannot be scattered."""
    if x.shape[0] % group_size:
        raise OpError("ReduceScatter", f"{x.shape[0]} rows", f"a multiple of {group_size} ranks")


def _dgrad(dy: Tensor, weight: Tensor, also: Tensor | None) -> Tensor:
    """The gradient of a linear's input, and of what else reads it."""
    dx: Tensor = gemm.matmul(dy, weight, None, also)
    return dx


def _wgrad(fc: Any, dy: Tensor, x: Tensor, weight: Tensor) -> Tensor | None:
    """The gradient of a linear's weight, or that into its main_grad."""
    return weight_gradient(fc, lambda dy, x: gemm.matmul(dy.t(), x), dy, x, weight)


class _Exchange(Fuser):
    """An exchange in pieces. The pattern has it under `exchange`, and the linear under `fc`."""

    backend = "overlap"
    kernels: ClassVar[Any] = pieces

    def reject(self, exchange: Any, fc: Any, x: Spec) -> str | None:
        return "its group has one rank" if exchange.group_size == 1 else None


class _Symmetric(_Exchange):
    """An exchange over symmetric memory, where the linear has `flag` in its `overlap`."""

    backend, kernels = "symmetric", symmetric
    dtypes: ClassVar[Any] = (torch.float32, torch.float16, torch.bfloat16)
    flag: ClassVar[str | None] = None

    def reject(self, exchange: Any, fc: Any, x: Spec) -> str | None:
        if self.flag and self.flag not in getattr(fc, "overlap", ()):
            return f"it takes {self.flag}, which is off"
        if not collectives.on_one_node(exchange.group_size):
            here = collectives.gpus_here()
            return f"its group of {exchange.group_size} ranks is more than the {here} of this node"
        return super().reject(exchange, fc, x)


class GatherLinear(_Exchange):
    """All-gather, linear and bias: a piece is multiplied while the next one is gathered."""

    pattern = dict(exchange=AllGather, fc=BasicLinear, bias=Bias | None)
    saves = ("fc_x",)

    def fwd(
        self, x: Tensor, exchange_group: str, exchange_group_size: int, fc_weight: Tensor,
        bias_bias: Tensor | None, want: Collection[str],
    ) -> Any:  # fmt: skip
        group = exchange_group, exchange_group_size
        y, whole = self.kernels.gather_matmul(x, fc_weight.t(), bias_bias, *group, "fc_x" in want)
        return y, (whole,)


class SymmetricGatherLinear(_Symmetric, GatherLinear):
    """All-gather, linear and bias: each rank's rows are multiplied as they arrive."""

    flag = "ub_overlap_ag"


class GatherLinearBackward(_Exchange):
    """Backward of all-gather and linear, from this rank's own rows of the input.

    They are gathered behind the input gradient, which is scattered behind the weight gradient.
    """

    pattern = dict(exchange=AllGather, tee=Tee | None, fc=BasicLinear)
    recomputes = True

    def scatter(
        self, dy: Tensor, weight: Tensor, tee_d: Tensor | None, group: tuple[str, int], weighs: bool
    ) -> collectives.Pending | Tensor:
        """The input gradient, perhaps on its way. weighs: a weight gradient follows."""
        if tee_d is None and not weighs:
            return pieces.matmul_scatter(dy, weight, *group)
        return collectives.start_reduce_scatter(_dgrad(dy, weight, tee_d), *group)

    def bwd(
        self, dy: Tensor, x: Tensor, exchange_group: str, exchange_group_size: int,
        tee_d: Tensor | None, fc: Any, fc_weight: Tensor, fc_weight_stored: Tensor,
        want: Collection[str],
    ) -> Any:  # fmt: skip
        group, weighs = (exchange_group, exchange_group_size), "fc_weight" in want
        _verify_rows(dy, exchange_group_size)
        arriving = collectives.start_all_gather(x, *group) if weighs else None
        dx = self.scatter(dy, fc_weight, tee_d, group, weighs) if "x" in want else None
        dweight = None
        if arriving is not None:
            dweight = _wgrad(fc, dy, collectives.wait(arriving), fc_weight_stored)
        return collectives.wait(dx) if isinstance(dx, collectives.Pending) else dx, (dweight,)


class GatheredLinearBackward(GatherLinearBackward):
    """Backward of all-gather and linear, from the gathered input, which the forward has kept.

    The input gradient is scattered behind the weight gradient.
    """

    recomputes = False

    def bwd(  # type: ignore[override]
        self, dy: Tensor, exchange_group: str, exchange_group_size: int, tee_d: Tensor | None,
        fc: Any, fc_x: Tensor, fc_weight: Tensor, fc_weight_stored: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        group, weighs = (exchange_group, exchange_group_size), "fc_weight" in want
        _verify_rows(dy, exchange_group_size)
        dx = self.scatter(dy, fc_weight, tee_d, group, weighs) if "x" in want else None
        dweight = _wgrad(fc, dy, fc_x, fc_weight_stored) if weighs else None
        return collectives.wait(dx) if isinstance(dx, collectives.Pending) else dx, (dweight,)


class SymmetricGatherLinearBackward(_Symmetric, GatherLinearBackward):
    """Backward of all-gather and linear: pieces of the input gradient leave as they are made.

    Meanwhile the input is gathered again, for the weight gradient that follows.
    """

    flag = "ub_overlap_rs_dgrad"

    def reject(  # type: ignore[override]
        self, exchange: Any, tee: Op | None, fc: Any, x: Spec
    ) -> str | None:
        if tee is not None and self.flag in getattr(fc, "overlap", ()):
            return "the gradient that arrives at the Tee is added before the exchange"
        return super().reject(exchange, fc, x)

    def scatter(self, dy: Tensor, weight: Tensor, _: Any, group: Any, weighs: bool) -> Tensor:
        dx: Tensor = symmetric.matmul_scatter(dy, weight, *group)
        return dx


class LinearReduceBackward(_Exchange):
    """Backward of a linear that takes all of the input: dx is summed behind the weight gradient."""

    pattern = dict(exchange=AllReduceGrad, tee=Tee | None, fc=BasicLinear)

    def bwd(
        self, dy: Tensor, exchange_group: str, tee_d: Tensor | None, fc: Any, fc_x: Tensor,
        fc_weight: Tensor, fc_weight_stored: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        if "fc_weight" not in want and tee_d is None:
            return pieces.matmul_all_reduce(dy, fc_weight, exchange_group), (None,)
        leaving = dweight = None
        if "x" in want:
            dx = _dgrad(dy, fc_weight, tee_d)
            leaving = pieces.start_all_reduce_in_place(dx, exchange_group)
        if "fc_weight" in want:
            dweight = _wgrad(fc, dy, fc_x, fc_weight_stored)
        return None if leaving is None else collectives.wait(leaving), (dweight,)


class LinearScatter(_Exchange):
    """Linear and reduce-scatter: a piece is scattered while the next one is multiplied.

    Backward: a piece of dy is multiplied while the next one is gathered; the weight gradient
    follows when all of dy is there.
    """

    pattern = dict(fc=BasicLinear, exchange=ReduceScatter)

    def fwd(
        self, x: Tensor, fc_weight: Tensor, exchange_group: str, exchange_group_size: int
    ) -> Any:
        _verify_rows(x, exchange_group_size)
        group = exchange_group, exchange_group_size
        return self.kernels.matmul_scatter(x, fc_weight.t(), *group), ()

    def bwd(
        self, dy: Tensor, fc: Any, fc_x: Tensor, fc_weight: Tensor, fc_weight_stored: Tensor,
        exchange_group: str, exchange_group_size: int, want: Collection[str],
    ) -> Any:  # fmt: skip
        group, weighs = (exchange_group, exchange_group_size), "fc_weight" in want
        dx = None
        if "x" in want:
            dx, whole = self.kernels.gather_matmul(dy, fc_weight, None, *group, weighs)
        else:
            whole = collectives.all_gather(dy, *group)
        return dx, (_wgrad(fc, whole, fc_x, fc_weight_stored) if weighs else None,)


class SymmetricLinearScatter(_Symmetric, LinearScatter):
    """Linear and reduce-scatter: each rank's rows leave as soon as they are multiplied."""

    flag, bwd = "ub_overlap_rs", None  # type: ignore[assignment]


class SymmetricLinearScatterBackward(_Symmetric, LinearScatter):
    """Backward of linear and reduce-scatter: each rank's rows of dy are multiplied as they come."""

    flag, fwd = "ub_overlap_ag", None  # type: ignore[assignment]


class LinearAllReduce(_Exchange):
    """Linear and all-reduce: a piece is summed over ranks while the next one is multiplied."""

    pattern = dict(fc=BasicLinear, exchange=AllReduce)

    def fwd(self, x: Tensor, fc_weight: Tensor, exchange_group: str) -> Any:
        return pieces.matmul_all_reduce(x, fc_weight.t(), exchange_group), ()


class SymmetricLinearAllReduce(_Symmetric):
    """Linear and all-reduce: the product is written where the other GPUs read and add it."""

    pattern = dict(fc=BasicLinear, exchange=AllReduce)
    dtypes = (torch.float32, torch.bfloat16)

    def reject(self, exchange: Any, fc: Any, x: Spec) -> str | None:
        how = getattr(fc, "symmetric_ar_type", None)
        if how is None:
            return "it takes symmetric_ar_type, which is None"
        if fc.local_out_features * x.dtype.itemsize % 4:
            return f"its kernel takes rows of whole 4 bytes, not {fc.local_out_features} {x.dtype}"
        if how == "multimem_all_reduce" and not symmetric.has_multicast(x.device):
            return "multimem_all_reduce takes multicast, which this GPU's links have not"
        return super().reject(exchange, fc, x)

    def fwd(self, x: Tensor, fc: Any, fc_weight: Tensor, exchange_group: str) -> Any:
        how = fc.symmetric_ar_type
        return symmetric.matmul_all_reduce(x, fc_weight.t(), exchange_group, how), ()


for fuser in (
    GatherLinear, GatherLinearBackward, GatheredLinearBackward, LinearReduceBackward,
    LinearScatter, LinearAllReduce,
    SymmetricGatherLinear, SymmetricGatherLinearBackward, SymmetricLinearScatter,
    SymmetricLinearScatterBackward, SymmetricLinearAllReduce,
):  # fmt: skip
    register(fuser)
