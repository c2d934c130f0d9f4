"""GroupedLinear on the CPU: each group's product in the layout measured to be fastest."""

from collections.abc import Collection
from typing import Any

from torch import Tensor

from ...fuser import Fuser, register
from ...kernels.lazy import Lazy
from ...ops import GroupedLinear
from ...ops.grouped import _pieces, bias_gradients, products, weight_gradients

gemm = Lazy("cpu.gemm")


@register
class GroupedProduct(Fuser):
    """A product for each group that has rows."""

    backend, pattern = "cpu", dict(fc=GroupedLinear)

    def fwd(
        self, x: Tensor, fc_split_sizes: Tensor, fc_weight: Tensor, fc_bias: Tensor | None
    ) -> Any:
        return products(gemm.linear, x, fc_split_sizes, fc_weight, fc_bias), ()

    def bwd(
        self, dy: Tensor, fc: Any, fc_x: Tensor, fc_split_sizes: Tensor, fc_weight: Tensor,
        fc_bias: Tensor | None, fc_weight_stored: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        dx = dweight = dbias = None
        grads = _pieces(dy, fc_split_sizes)
        if "x" in want:
            dx = dy.new_empty(dy.shape[0], fc_weight.shape[2])
            parts = _pieces(dx, fc_split_sizes)
            for grad, weight, part in zip(grads, fc_weight, parts, strict=True):
                gemm.dgrad(grad, weight, out=part)
        if "fc_weight" in want:
            pairs = [*zip(grads, _pieces(fc_x, fc_split_sizes), strict=True)]
            dweight = fc.weigh(weight_gradients, fc, gemm.wgrad, pairs, fc_weight_stored)
        if "fc_bias" in want and fc_bias is not None:
            dbias = bias_gradients(grads, fc_bias)
        return dx, (None, dweight, dbias)
