"""Fusers over the Triton kernels: norms with their residuals, activations, dropout, sums."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ...fuser import Fuser, register
from ...kernels.lazy import Lazy
from ...kernels.reference.activations import form_of
from ...ops import Add, Bias, Dropout, Tee
from ...ops.activations import Activation, Function, GatedActivation
from ..norms import NormForward, NormGradients
from ..scales import ScaleForward, ScaleGradients, WeightedAddForward, WeightedAddGradients
from ..xielu import XIELUFuser

norms = Lazy("triton.norms")
scales, xielu = Lazy("triton.scales"), Lazy("triton.xielu")
activations, functions = Lazy("triton.activations"), Lazy("triton.functions")
dropouts = Lazy("triton.dropout")
sums = Lazy("triton.sums")


class Triton(Fuser):
    """What all fusers over Triton kernels share."""

    backend, dtypes = "triton", (torch.float32, torch.float16, torch.bfloat16)


@register
class NormKernel(Triton, NormForward):
    """[Residual add and] norm, each row read once, statistics in registers; hands out the sum."""

    kernels = norms


@register
class NormBackward(Triton, NormGradients):
    """Backward of a norm, with the residual's gradient added to dx where there is one."""

    kernels = norms


@register
class ScaleKernel(Triton, ScaleForward):
    """A scale for each column [and residual add] in one pass."""

    kernels = scales


@register
class ScaleBackward(Triton, ScaleGradients):
    """Both gradients of a scale for each column, in one pass."""

    kernels = scales


@register
class WeightedAddKernel(Triton, WeightedAddForward):
    """A sum with another value times a factor for each column, in one pass."""

    kernels = scales


@register
class WeightedAddBackward(Triton, WeightedAddGradients):
    """Its three gradients, in one pass."""

    kernels = scales


@register
class XIELUKernel(Triton, XIELUFuser):
    """xIELU, and its three gradients, each in one pass."""

    kernels = xielu


class ActivationFuser(Triton):
    """What all fusers with an activation refuse."""

    interleaved = False
    """Whether gate and value may alternate."""

    def reject(self, act: Any) -> str | None:
        """Why the kernels cannot compute an activation, or None."""
        if form_of(act.kernel).name not in functions.KINDS:
            return f"its kernel has no {act.kernel}"
        if act.function[2] is not None and not self.interleaved:
            return "its kernel takes halves, not interleaved gate and value"
        return None


@register
class ActivationKernel(ActivationFuser):
    """An activation, plain or gated."""

    pattern = dict(act=Activation | GatedActivation)
    interleaved = True

    def fwd(self, x: Tensor, act_function: Function) -> Any:
        kind, params, interleave = act_function
        return activations.activation_forward(x, kind, params, interleave=interleave), ()


@register
class ActivationBackward(ActivationFuser):
    """Backward of [bias and] activation, with the bias's sums."""

    pattern = dict(bias=Bias | None, act=Activation | GatedActivation)
    wants = dict(bias_bias="bias")
    interleaved = True

    def bwd(
        self, dy: Tensor, act_x: Tensor, act_function: Function, bias_bias: Tensor | None,
        want: Collection[str],
    ) -> Any:  # fmt: skip
        dtype = None if bias_bias is None else bias_bias.dtype
        kind, params, interleave = act_function
        dx, _, dbias = activations.activation_backward(
            dy, act_x, kind, params, want, dtype, interleave=interleave
        )
        return dx, (dbias,)


@register
class DropoutKernel(Triton):
    """[Bias,] dropout [and residual add] in one pass; the backward is the same mask."""

    pattern = dict(bias=Bias | None, drop=Dropout, add=Add | None)
    saves = ("drop_seed",)

    def fwd(
        self, x: Tensor, bias_bias: Tensor | None, drop_p: float, add_other: Tensor | None
    ) -> Any:
        seed = torch.randint(2**62, (), dtype=torch.int64, device=x.device)
        return dropouts.dropout(x, seed, drop_p, add_other, bias_bias), (seed,)


@register
class DropoutBackward(Triton):
    """Backward of dropout: the mask made again from the seed."""

    pattern = dict(drop=Dropout)

    def bwd(self, dy: Tensor, drop_seed: Tensor, drop_p: float) -> Any:
        return dropouts.dropout(dy, drop_seed, drop_p), ()


class Alone(Triton):
    """What nothing else takes along; replays know its kernel, unlike the op's own function."""

    priority = -1


@register
class BiasKernel(Alone):
    """Bias [and residual add] in one pass."""

    pattern, promotes = dict(bias=Bias, add=Add | None), True

    def fwd(self, x: Tensor, bias_bias: Tensor, add_other: Tensor | None) -> Any:
        return sums.add(x, add_other, bias_bias), ()


@register
class BiasBackward(Alone):
    """The bias's gradient, summed in a fixed order."""

    pattern = dict(bias=Bias)

    def wgrad(self, dy: Tensor, bias_bias: Tensor) -> Any:
        return sums.sum_rows(dy, bias_bias.dtype)

    def dgrad(self, dy: Tensor) -> Any:
        return dy


@register
class AddKernel(Alone):
    """A residual add."""

    pattern, promotes = dict(add=Add), True

    def fwd(self, x: Tensor, add_other: Tensor) -> Any:
        return sums.add(x, add_other), ()


@register
class TeeBackward(Alone):
    """The sum of the gradients of a value that two read."""

    pattern = dict(tee=Tee)

    def bwd(self, dy: Tensor, tee_d: Tensor) -> Any:
        return sums.add(dy, tee_d), ()
