"""Fusers over the grouped Triton GEMMs: one launch for all groups, no wait for the split sizes."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ...fuser import register
from ...kernels.lazy import Lazy
from ...kernels.reference import wide
from ...ops import GroupedLinear
from ...ops.activations import Activation, GatedActivation, Params
from ...ops.grouped import into_main_grads
from ...ops.scaled import ScaledGatedActivation
from .passes import ActivationFuser, Triton, activations
from .products import Paired, pairs

grouped = Lazy("triton.grouped")


def _bias_gradient(dy: Tensor, bias: Tensor | None, groups: Any) -> Tensor | None:
    """Sums of each group's rows, as a product with ones: no atomics."""
    if bias is None:
        return None
    ones = dy.new_ones(dy.shape[0], 1)
    return grouped.grouped_wgrad(dy, ones, groups).squeeze(-1).to(bias.dtype)  # type: ignore[no-any-return]


def _weight_gradients(fc: Any, dy: Tensor, x: Tensor, groups: Any, stored: Tensor) -> Tensor | None:
    """Those of all groups, or, before they are rounded, into main_grad."""
    if not fc.accumulate_into_main_grad and fc.reads_transposed:
        return grouped.grouped_wgrad(x, dy, groups).transpose(1, 2)  # type: ignore[no-any-return]
    if not fc.accumulate_into_main_grad:
        return grouped.grouped_wgrad(dy, x, groups)  # type: ignore[no-any-return]
    sums = grouped.grouped_wgrad(dy, x, groups, torch.float32)
    return into_main_grads(fc, sums, stored)


@register
class GroupedLinearKernel(Triton):
    """All groups in one launch, forward and backward."""

    pattern = dict(fc=GroupedLinear)

    def fwd(
        self, x: Tensor, fc_split_sizes: Tensor, fc_weight: Tensor, fc_bias: Tensor | None
    ) -> Any:
        groups = grouped.groups_of(fc_split_sizes, x)
        return grouped.grouped_linear(x, fc_weight, fc_bias, groups), ()

    def bwd(
        self, dy: Tensor, fc: Any, fc_x: Tensor, fc_split_sizes: Tensor, fc_weight: Tensor,
        fc_bias: Tensor | None, fc_weight_stored: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        groups = grouped.groups_of(fc_split_sizes, dy)
        dx = grouped.grouped_dgrad(dy, fc_weight, groups) if "x" in want else None
        dweight = None
        if "fc_weight" in want:
            dweight = fc.weigh(_weight_gradients, fc, dy, fc_x, groups, fc_weight_stored)
        dbias = _bias_gradient(dy, fc_bias, groups) if "fc_bias" in want else None
        return dx, (None, dweight, dbias)


class ActivationGradients(ActivationFuser):
    """Backward of activation and grouped linear.

    It writes the pre-activation's gradient, and the linear's input computed again.
    """

    pattern = dict(act=Activation | GatedActivation, fc=GroupedLinear)

    def bwd(
        self, dy: Tensor, act_x: Tensor, act_kernel: str, act_params: Params, fc: Any,
        fc_split_sizes: Tensor, fc_weight: Tensor, fc_bias: Tensor | None,
        fc_weight_stored: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        groups = grouped.groups_of(fc_split_sizes, dy)
        dbias = _bias_gradient(dy, fc_bias, groups) if "fc_bias" in want else None
        dx = dweight = None
        if "x" in want:
            parts = {"x", "y"} if "fc_weight" in want else {"x"}
            dx, y = self.gradient(dy, fc_weight, act_x, act_kernel, act_params, parts, groups)
        elif "fc_weight" in want:
            y = activations.activation_forward(act_x, act_kernel, act_params)
        if "fc_weight" in want:
            dweight = fc.weigh(_weight_gradients, fc, dy, y, groups, fc_weight_stored)
        return dx, (None, dweight, dbias)

    def gradient(
        self, dy: Tensor, weight: Tensor, pre: Tensor, kernel: str, params: Params,
        parts: Collection[str], groups: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The pre-activation's gradient, and the activation again if "y" is in parts."""
        dact = grouped.grouped_dgrad(dy, weight, groups)
        dx, y, _ = activations.activation_backward(dact, pre, kernel, params, parts)
        return dx, y


@register
class GroupedPairedActivation(Paired):
    """As PairedActivation, of grouped rows."""

    pattern = dict(fc=GroupedLinear, act=Activation | GatedActivation)
    saves, wants = ("act_x",), dict(act_x="pre")

    def fwd(
        self, x: Tensor, fc_split_sizes: Tensor, fc_weight: Tensor, fc_bias: Tensor | None,
        act_kernel: str, act_params: Params, want: Collection[str],
    ) -> Any:  # fmt: skip
        groups = grouped.groups_of(fc_split_sizes, x)
        if pairs.why_not(fc_weight.size(1), x, fc_weight):
            pre = grouped.grouped_linear(x, fc_weight, fc_bias, groups)
            return activations.activation_forward(pre, act_kernel, act_params), (pre,)
        more = act_kernel, act_params, want, groups
        y, pre = pairs.activation(x, fc_weight, fc_bias, *more)
        return y, (pre,)


@register
class GroupedPairedActivationBackward(Paired, ActivationGradients):
    """As PairedActivationBackward, of grouped rows."""

    def gradient(
        self, dy: Tensor, weight: Tensor, pre: Tensor, kernel: str, params: Params,
        parts: Collection[str], groups: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The pre-activation's gradient, and the activation again if "y" is in parts."""
        if pairs.why_not(weight.size(2), dy, weight, pre):
            return super().gradient(dy, weight, pre, kernel, params, parts, groups)
        dx = torch.empty(pre.shape, dtype=pre.dtype, device=pre.device)
        return pairs.gradient(dy, weight, pre, dx, kernel, params, parts, groups)  # type: ignore


@register
class GroupedActivationBackward(ActivationGradients):
    """Backward of activation and grouped linear: one pass between the linear's two products."""


@register
class GroupedMLP(ActivationFuser):
    """Grouped linear, scaled gated activation, grouped linear: a step forward and one backward."""

    pattern = dict(fc1=GroupedLinear, act=ScaledGatedActivation, fc2=GroupedLinear)
    saves = ("act_x",)

    def fwd(
        self, x: Tensor, fc1_split_sizes: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None,
        act_kernel: str, act_params: Params, act_scales: Tensor,
        fc2_split_sizes: Tensor, fc2_weight: Tensor, fc2_bias: Tensor | None,
    ) -> Any:  # fmt: skip
        groups = grouped.groups_of(fc1_split_sizes, x)
        pre = grouped.grouped_linear(x, fc1_weight, fc1_bias, groups)
        y = activations.activation_forward(pre, act_kernel, act_params)
        scaled = (wide(y) * wide(act_scales)[:, None]).to(x.dtype)
        groups = grouped.groups_of(fc2_split_sizes, x)
        return grouped.grouped_linear(scaled, fc2_weight, fc2_bias, groups), (pre,)

    def bwd(
        self, dy: Tensor, fc1: Any, fc1_x: Tensor, fc1_split_sizes: Tensor, fc1_weight: Tensor,
        fc1_weight_stored: Tensor, fc1_bias: Tensor | None, act_x: Tensor, act_kernel: str,
        act_params: Params, act_scales: Tensor, fc2: Any, fc2_split_sizes: Tensor,
        fc2_weight: Tensor, fc2_weight_stored: Tensor, fc2_bias: Tensor | None,
        want: Collection[str],
    ) -> Any:  # fmt: skip
        groups = grouped.groups_of(fc2_split_sizes, dy)
        scales = wide(act_scales)[:, None]
        dact = grouped.grouped_dgrad(dy, fc2_weight, groups)
        dpre, y, _ = activations.activation_backward(
            (wide(dact) * scales).to(dy.dtype), act_x, act_kernel, act_params, ("x", "y")
        )
        dweight2 = dscales = None
        if "fc2_weight" in want:
            scaled = (wide(y) * scales).to(dy.dtype)
            dweight2 = fc2.weigh(_weight_gradients, fc2, dy, scaled, groups, fc2_weight_stored)
        if "act_scales" in want:
            dscales = (wide(dact) * wide(y)).sum(-1).to(act_scales.dtype)
        dbias2 = _bias_gradient(dy, fc2_bias, groups) if "fc2_bias" in want else None
        groups = grouped.groups_of(fc1_split_sizes, dy)
        dx = grouped.grouped_dgrad(dpre, fc1_weight, groups) if "x" in want else None
        dweight1 = None
        if "fc1_weight" in want:
            dweight1 = fc1.weigh(_weight_gradients, fc1, dpre, fc1_x, groups, fc1_weight_stored)
        dbias1 = _bias_gradient(dpre, fc1_bias, groups) if "fc1_bias" in want else None
        return dx, (None, dweight1, dbias1, dscales, None, dweight2, dbias2)
