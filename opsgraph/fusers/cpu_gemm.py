"""Fusers for the CPU with matrix products inside, each in the layout measured to be fastest.

In the backward a weight gradient may want its operands stored by columns. The passes between the
products write them so as they make them; the longer a fuser, the more of its operands it makes.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..fuser import Fuser, register
from ..op import Op
from ..ops import Add, BasicLinear, Bias, LayerNorm, RMSNorm, Tee
from ..spec import Spec
from .cpu import Activation, reject_dtype, shape_of
from .lazy import Lazy

gemm = Lazy("cpu.gemm")
norms = Lazy("cpu.norms")
activations = Lazy("cpu.activations")
memory = Lazy("cpu.memory")


def _wgrad(fc: Any, dy: Tensor, x: Tensor, stored: Tensor) -> Tensor | None:
    """The op's own where it goes into main_grad: that multiplies operands as they are stored."""
    if fc.accumulate_into_main_grad:
        return fc.wgrad(dy, x, stored)  # type: ignore[no-any-return]
    return gemm.wgrad(dy, x)  # type: ignore[no-any-return]


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

    def bwd(
        self, dy: Tensor, tee_d: Tensor | None, fc: Any, fc_x: Tensor, fc_weight: Tensor,
        fc_weight_stored: Tensor, want: tuple[str, ...],
    ) -> Any:  # fmt: skip
        dx = dweight = None
        if "fc_weight" in want:
            dweight = _wgrad(fc, dy, fc_x, fc_weight_stored)
        if "x" in want:
            dx = gemm.dgrad(dy, fc_weight, tee_d)
        return dx, (dweight,)


class _Passes(Fuser):
    """What the fusers with a C++ pass inside share."""

    backend = "cpu"

    def reject(self, x: Spec) -> str | None:
        return reject_dtype(x)


@cache
def _activation_wants(want: tuple[str, ...], first: bool, second: bool) -> tuple[Any, bool, bool]:
    """What the activation's pass gives by rows, and whether dpre and y are wanted by columns."""
    names = {"x"} if {"x", "norm_weight", "norm_bias"} & {*want} else set()
    names |= {"bias"} if "bias_bias" in want else set()
    if "fc1_weight" in want and not first:
        names.add("x")
    if "fc2_weight" in want and not second:
        names.add("y")
    return frozenset(names), "fc1_weight" in want and first, "fc2_weight" in want and second


class Middle(NamedTuple):
    """What the backward of [bias,] activation, linear leaves."""

    dpre: Tensor | None
    operand: Tensor | None
    """dpre for the weight gradient of the linear before, stored as that wants it."""
    dbias: Tensor | None
    dweight: Tensor | None


def _activation_backward(
    dy: Tensor, act: Op, pre: Tensor, bias: Tensor | None, fc: Any, weight: Tensor, stored: Tensor,
    want: tuple[str, ...], first: bool = False,
) -> Middle:  # fmt: skip
    """One pass between the products of the linear after the activation.

    first: whether the linear before, if its weight gradient is wanted, wants dpre by columns.
    """
    second = gemm.wgrad_copies(dy, *weight.shape)[1]
    names, dpre_by_columns, y_by_columns = _activation_wants(want, first, second)
    rows = pre.shape[0]
    dpre_t = memory.empty((pre.shape[1], rows), pre.dtype) if dpre_by_columns else None
    y_t = memory.empty((weight.shape[1], rows), pre.dtype) if y_by_columns else None
    dtype = torch.float32 if bias is None else bias.dtype
    dpre, y, dbias = activations.activation_backward(
        gemm.dgrad(dy, weight), pre, *shape_of(act), names, dtype, dpre_t, y_t
    )
    y = y if y_t is None else y_t.t()
    dweight = None if y is None else _wgrad(fc, dy, y, stored)
    return Middle(dpre, dpre if dpre_t is None else dpre_t.t(), dbias, dweight)


@register
class ActivationProductBackward(_Passes):
    """Backward of [bias,] activation and linear: one pass between the linear's two products.

    It computes the linear's input again, stored as the weight gradient wants it.
    """

    pattern = dict(bias=Bias | None, act=Activation, fc2=BasicLinear)

    def bwd(
        self, dy: Tensor, bias: Op | None, act: Op, act_x: Tensor, bias_bias: Tensor | None,
        fc2: Any, fc2_weight: Tensor, fc2_weight_stored: Tensor, want: tuple[str, ...],
    ) -> Any:  # fmt: skip
        dpre, _, dbias, dweight = _activation_backward(
            dy, act, act_x, bias_bias, fc2, fc2_weight, fc2_weight_stored, want
        )
        return dpre, (dweight,) if bias is None else (dbias, dweight)


@register
class MLPProductBackward(_Passes):
    """Backward of linear, [bias,] activation, linear: four products around one pass.

    The pass writes what both weight gradients want, among it the pre-activation's gradient stored
    by columns, which no step of its own could hand to the next.
    """

    pattern = dict(fc1=BasicLinear, bias=Bias | None, act=Activation, fc2=BasicLinear)

    def bwd(
        self, dy: Tensor, fc1: Any, fc1_x: Tensor, fc1_weight: Tensor, fc1_weight_stored: Tensor,
        bias: Op | None, bias_bias: Tensor | None, act: Op, act_x: Tensor,
        fc2: Any, fc2_weight: Tensor, fc2_weight_stored: Tensor, want: tuple[str, ...],
    ) -> Any:  # fmt: skip
        first = gemm.wgrad_copies(dy, *fc1_weight.shape)[0]
        dpre, operand, dbias, dweight2 = _activation_backward(
            dy, act, act_x, bias_bias, fc2, fc2_weight, fc2_weight_stored, want, first
        )
        dx = dweight1 = None
        if "fc1_weight" in want:
            dweight1 = _wgrad(fc1, operand, fc1_x, fc1_weight_stored)  # type: ignore[arg-type]
        del operand
        if "x" in want:
            dx = gemm.dgrad(dpre, fc1_weight)
        return dx, (dweight1, dweight2) if bias is None else (dweight1, dbias, dweight2)


@cache
def _norm_wants(want: tuple[str, ...], by_columns: bool) -> tuple[Any, bool]:
    """What the norm's pass gives, and whether it writes y by columns."""
    weighs = "fc1_weight" in want
    given = {"x": "x", "norm_weight": "weight", "norm_bias": "bias"}
    names = {given[name] for name in want if name in given}
    return frozenset(names | ({"y"} if weighs and not by_columns else set())), weighs and by_columns


def _norm_backward(
    dy: Any, operand: Any, norm: Callable[..., Any], x: Tensor, fc: Any, weight: Tensor,
    stored: Tensor, want: tuple[str, ...],
) -> tuple[Any, ...]:  # fmt: skip
    """dx, the norm's gradients and the weight's: the norm's pass between the linear's products.

    dy and operand, which is dy as the weight gradient wants it, are None where nothing needs them.
    norm: the norm's backward, for `(dy, want, y_t)`.
    """
    names, by_columns = _norm_wants(want, gemm.wgrad_copies(x, *weight.shape)[1])
    y_t = memory.empty((x.shape[1], x.shape[0]), x.dtype) if by_columns else None
    # Where no gradient goes through the norm its pass only makes y, whatever dy is.
    gradient = gemm.dgrad(dy, weight) if names - {"y"} else x
    *found, y = norm(gradient, want=names, y_t=y_t)
    del gradient
    y = y if y_t is None else y_t.t()
    return *found, None if y is None else _wgrad(fc, operand, y, stored)


def _rmsnorm(
    x: Tensor, rstd: Tensor, weight: Tensor | None, zero_centered: bool, dother: Tensor | None
) -> Callable[..., Any]:
    backward: Callable[..., Any] = norms.rmsnorm_backward
    return partial(
        backward, x=x, rstd=rstd, weight=weight, zero_centered=zero_centered, dother=dother
    )


@register
class RMSNormProductBackward(_Passes):
    """Backward of RMSNorm and the linear after it, whose input is made again on the way."""

    pattern = dict(tee=Tee | None, norm=RMSNorm, fc1=BasicLinear)

    def bwd(
        self, dy: Tensor, tee_d: Tensor | None, norm_x: Tensor, norm_rstd: Tensor,
        norm_weight: Tensor | None, norm_zero_centered_gamma: bool, fc1: Any, fc1_weight: Tensor,
        fc1_weight_stored: Tensor, want: tuple[str, ...],
    ) -> Any:  # fmt: skip
        norm = _rmsnorm(norm_x, norm_rstd, norm_weight, norm_zero_centered_gamma, tee_d)
        dx, *found = _norm_backward(dy, dy, norm, norm_x, fc1, fc1_weight, fc1_weight_stored, want)
        return dx, tuple(found)


@register
class RMSNormMLPBackward(_Passes):
    """Backward of RMSNorm, linear, [bias,] activation, linear: four products around two passes."""

    pattern = dict(
        tee=Tee | None, norm=RMSNorm, fc1=BasicLinear, bias=Bias | None, act=Activation,
        fc2=BasicLinear,
    )  # fmt: skip

    def bwd(
        self, dy: Tensor, tee_d: Tensor | None, norm_x: Tensor, norm_rstd: Tensor,
        norm_weight: Tensor | None, norm_zero_centered_gamma: bool, fc1: Any, fc1_weight: Tensor,
        fc1_weight_stored: Tensor, bias: Op | None, bias_bias: Tensor | None, act: Op,
        act_x: Tensor, fc2: Any, fc2_weight: Tensor, fc2_weight_stored: Tensor,
        want: tuple[str, ...],
    ) -> Any:  # fmt: skip
        first = gemm.wgrad_copies(dy, *fc1_weight.shape)[0]
        dpre, operand, dbias, dweight2 = _activation_backward(
            dy, act, act_x, bias_bias, fc2, fc2_weight, fc2_weight_stored, want, first
        )
        norm = _rmsnorm(norm_x, norm_rstd, norm_weight, norm_zero_centered_gamma, tee_d)
        dx, *found = _norm_backward(
            dpre, operand, norm, norm_x, fc1, fc1_weight, fc1_weight_stored, want
        )  # fmt: skip
        return dx, (*found, dweight2) if bias is None else (*found, dbias, dweight2)


def _layernorm(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None,
    zero_centered: bool, dother: Tensor | None,
) -> Callable[..., Any]:  # fmt: skip
    backward: Callable[..., Any] = norms.layernorm_backward
    return partial(
        backward, x=x, mean=mean, rstd=rstd, weight=weight, bias=bias,
        zero_centered=zero_centered, dother=dother,
    )  # fmt: skip


@register
class LayerNormProductBackward(_Passes):
    """Backward of LayerNorm and the linear after it, whose input is made again on the way."""

    pattern = dict(tee=Tee | None, norm=LayerNorm, fc1=BasicLinear)

    def bwd(
        self, dy: Tensor, tee_d: Tensor | None, norm_x: Tensor, norm_mean: Tensor,
        norm_rstd: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
        norm_zero_centered_gamma: bool, fc1: Any, fc1_weight: Tensor, fc1_weight_stored: Tensor,
        want: tuple[str, ...],
    ) -> Any:  # fmt: skip
        norm = _layernorm(
            norm_x, norm_mean, norm_rstd, norm_weight, norm_bias, norm_zero_centered_gamma, tee_d
        )
        dx, *found = _norm_backward(dy, dy, norm, norm_x, fc1, fc1_weight, fc1_weight_stored, want)
        return dx, tuple(found)


@register
class LayerNormMLPBackward(_Passes):
    """Backward of LayerNorm, linear, [bias,] activation, linear: four products, two passes."""

    pattern = dict(
        tee=Tee | None, norm=LayerNorm, fc1=BasicLinear, bias=Bias | None, act=Activation,
        fc2=BasicLinear,
    )  # fmt: skip

    def bwd(
        self, dy: Tensor, tee_d: Tensor | None, norm_x: Tensor, norm_mean: Tensor,
        norm_rstd: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
        norm_zero_centered_gamma: bool, fc1: Any, fc1_weight: Tensor, fc1_weight_stored: Tensor,
        bias: Op | None, bias_bias: Tensor | None, act: Op, act_x: Tensor, fc2: Any,
        fc2_weight: Tensor, fc2_weight_stored: Tensor, want: tuple[str, ...],
    ) -> Any:  # fmt: skip
        first = gemm.wgrad_copies(dy, *fc1_weight.shape)[0]
        dpre, operand, dbias, dweight2 = _activation_backward(
            dy, act, act_x, bias_bias, fc2, fc2_weight, fc2_weight_stored, want, first
        )
        norm = _layernorm(
            norm_x, norm_mean, norm_rstd, norm_weight, norm_bias, norm_zero_centered_gamma, tee_d
        )
        dx, *found = _norm_backward(
            dpre, operand, norm, norm_x, fc1, fc1_weight, fc1_weight_stored, want
        )  # fmt: skip
        return dx, (*found, dweight2) if bias is None else (*found, dbias, dweight2)
