"""Fusers for the CPU with matrix products inside, each in the layout measured to be fastest.

In the backward a linear's input is made again for its weight gradient, which comes first: so that
input is dead when the data gradient is there, and few large tensors live at the same time. Small
tensors are made in one pass instead.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...fuser import Fuser, register
from ...kernels.lazy import Lazy
from ...ops import Add, BasicLinear, Bias, LayerNorm, RMSNorm, Tee
from ...ops.activations import Activation, Function, GatedActivation
from .passes import CPU

gemm = Lazy("cpu.gemm")
norms = Lazy("cpu.norms")
activations = Lazy("cpu.activations")
memory = Lazy("cpu.memory")
launch = Lazy("cpu.launch")

ROWS = 1024
"""Rows of a gradient between a product and the pass after it that are there at the same time: the
library packs the weight once for each such block."""
PARTS, COLUMNS = 2, 1024
"""How many parts an activation is computed again in, if each has at least `COLUMNS` columns."""


@register
class LinearProduct(Fuser):
    """`x @ weight.T (+ bias) (+ other)`, the sums inside the product where that is faster."""

    backend, pattern = "cpu", dict(fc=BasicLinear, bias=Bias | None, add=Add | None)

    def fwd(
        self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor | None, add_other: Tensor | None
    ) -> Any:
        return gemm.linear(x, fc_weight, bias_bias, add_other), ()


@register
class LinearProductBackward(Fuser):
    """Data and weight gradients of a linear, and the sum where its input is also handed out."""

    backend, pattern = "cpu", dict(tee=Tee | None, fc=BasicLinear)

    def wgrad(self, dy: Tensor, fc_x: Tensor) -> Any:
        return gemm.wgrad(dy, fc_x)

    def dgrad(self, dy: Tensor, fc_weight: Tensor, tee_d: Tensor | None) -> Any:
        return gemm.dgrad(dy, fc_weight, tee_d)


def _one_pass(x: Tensor) -> bool:
    """Whether memory does not matter, so that one pass makes all that it can."""
    return x.nbytes < memory.LEAST  # type: ignore[no-any-return]


def _activated_wgrad(
    fc: Any, dy: Tensor, function: Function, pre: Tensor, stored: Tensor
) -> Tensor | None:
    """The weight gradient of the linear after an activation, which is computed again."""
    if fc.accumulate_into_main_grad:
        y = activations.activation_forward(pre, *function)[0]
        return fc.wgrad(dy, y, stored)  # type: ignore[no-any-return]
    turned = fc.reads_transposed
    return fc.weigh(_wgrad_in_parts, dy, function, pre, stored.shape, turned)  # type: ignore[no-any-return]


def _wgrad_in_parts(
    dy: Tensor, function: Function, pre: Tensor, shape: torch.Size, turned: bool
) -> Tensor:
    """`dy.T @ function(pre)`, some columns of that at a time.

    They are stored as the product wants them, and are never there as a whole. turned: whether the
    result is stored by columns.
    """
    rows, (width, depth) = pre.shape[0], shape
    forward = partial(activations.activation_forward, pre, *function)
    unit, parts = function[-1] or 64, min(PARTS, max(1, depth // COLUMNS))
    step = -(-depth // (parts * unit)) * unit
    dweight: Tensor = memory.empty((depth, width) if turned else (width, depth), dy.dtype)
    for k in range(0, depth, step):
        part = slice(k, min(k + step, depth))
        size = part.stop - k
        if turned:
            gemm.wgrad(forward(columns=part)[0], dy, out=dweight[part])
            continue
        transposes = gemm.wgrad_transposes_x(pre, width, size, into=True)
        y_t = memory.empty((size, rows), pre.dtype) if transposes else None
        gemm.wgrad(dy, forward(y_t=y_t, columns=part)[0], out=dweight[:, part])
        del y_t
    return dweight.t() if turned else dweight


def _activation_backward(
    dy: Tensor, function: Function, pre: Tensor, weight: Tensor, names: frozenset[str],
    dtype: torch.dtype, dpre: Tensor,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dpre and dbias: the linear's data gradient and the activation's pass, some rows at a time.

    A block's gradient is still in the cache when the pass reads it, and is never there as a whole.
    dpre: gets the gradient; it may be pre.
    """
    backward = activations.activation_backward
    rows, width = pre.shape[0], weight.shape[1]
    inside = pre is not dpre and pre.shape[1] == width
    dbias = torch.zeros(pre.shape[1], device="cpu") if "bias" in names else None
    for k in range(0, rows, ROWS):
        part = slice(k, k + ROWS)
        # A plain activation's gradient takes the place of the one that it is made of.
        gradient = gemm.dgrad(dy[part], weight, out=dpre[part] if inside else None)
        sums = backward(gradient, pre[part], *function, names, out=dpre[part])[2]
        del gradient
        if dbias is not None:
            dbias += sums
    return dpre if "x" in names else None, None if dbias is None else dbias.to(dtype)


@register
class ActivationProductBackward(CPU):
    """Backward of [bias,] activation and linear: one pass between the linear's two products.

    It computes the linear's input again, stored as the weight gradient wants it. The gradient takes
    the place of the pre-activation if that has no other use.
    """

    pattern = dict(bias=Bias | None, act=Activation | GatedActivation, fc2=BasicLinear)
    consumes, wants = ("act_x",), dict(bias_bias="bias", fc2_weight="y")

    def bwd(
        self, dy: Tensor, act_x: list[Tensor], act_function: Function, bias_bias: Tensor | None,
        fc2: Any, fc2_weight: Tensor, fc2_weight_stored: Tensor, want: tuple[str, ...],
    ) -> Any:  # fmt: skip
        names, pre = frozenset(want), act_x.pop()
        dtype = torch.float32 if bias_bias is None else bias_bias.dtype
        dpre = dbias = dweight = None
        if _one_pass(pre):
            dpre, y, dbias = activations.activation_backward(
                gemm.dgrad(dy, fc2_weight), pre, *act_function, names, dtype
            )
            dweight = None if y is None else fc2.wgrad_by(gemm.wgrad, dy, y, fc2_weight_stored)
        else:
            free = launch.direct(pre) and memory.ours(pre) and pre.is_contiguous()
            copied = free and fc2.deferred and names != {"y"}
            if "y" in names:
                # The pass below is the same, to the bit, if a deferred product has a copy to read.
                read = memory.empty(pre.shape, pre.dtype).copy_(pre) if copied else pre
                dweight = _activated_wgrad(fc2, dy, act_function, read, fc2_weight_stored)
                del read
            if names := names - {"y"}:
                out = pre if free else memory.empty(pre.shape, pre.dtype)
                dpre, dbias = _activation_backward(
                    dy, act_function, pre, fc2_weight, names, dtype, out
                )
        return dpre, (dbias, dweight)


def _norm_backward(
    dy: Tensor, norm: Callable[..., Any], x: Tensor, fc: Any, weight: Tensor, stored: Tensor,
    want: tuple[str, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """dx, the norm's gradients and the weight's. norm: the norm's backward, for `(dy, want)`."""
    names, dweight = frozenset(want), None
    if "y" in names and not _one_pass(x):
        y = norm(x, want={"y"})[-1]  # whatever the gradient is
        if not (fc.accumulate_into_main_grad or fc.reads_transposed):
            y = gemm.for_wgrad(y, dy.shape[1])
        dweight = fc.wgrad_by(gemm.wgrad, dy, y, stored)
        del y
        names -= {"y"}
    # Where no gradient goes through the norm its pass only makes y.
    gradient = gemm.dgrad(dy, weight) if names - {"y"} else x
    written = gradient is not x and gradient.dtype == x.dtype
    *gradients, y = norm(gradient, want=names, out=gradient if written else None)
    del gradient
    return *gradients, dweight if y is None else fc.wgrad_by(gemm.wgrad, dy, y, stored)


@register
class NormProductBackward(CPU):
    """Backward of a norm and the linear after it, whose input is made again on the way."""

    pattern = dict(tee=Tee | None, norm=RMSNorm | LayerNorm, fc1=BasicLinear)
    wants = dict(norm_weight="weight", norm_bias="bias", fc1_weight="y")

    def bwd(
        self, dy: Tensor, tee_d: Tensor | None, norm_x: Tensor, norm_mean: Tensor | None,
        norm_rstd: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
        norm_zero_centered_gamma: int, norm_normalized_dtype: str | None, fc1: Any,
        fc1_weight: Tensor, fc1_weight_stored: Tensor, want: tuple[str, ...],
    ) -> Any:  # fmt: skip
        norm = partial(
            norms.norm_backward, x=norm_x, mean=norm_mean, rstd=norm_rstd, weight=norm_weight,
            bias=norm_bias, zero_centered=norm_zero_centered_gamma, dother=tee_d,
            normalized_dtype=norm_normalized_dtype,
        )  # fmt: skip
        dx, *gradients = _norm_backward(dy, norm, norm_x, fc1, fc1_weight, fc1_weight_stored, want)
        return dx, tuple(gradients)
