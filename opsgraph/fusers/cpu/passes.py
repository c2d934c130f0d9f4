"""Fusers over the C++ kernels for the CPU: norms with their residuals, activations with biases."""

from typing import Any

import torch
from torch import Tensor

from ...fuser import Fuser, register
from ...kernels.lazy import Lazy
from ...ops import Bias
from ...ops.activations import Activation, Function, GatedActivation
from ..norms import NormForward, NormGradients
from ..scales import ScaleForward, ScaleGradients, WeightedAddForward, WeightedAddGradients
from ..xielu import XIELUFuser

norms = Lazy("cpu.norms")
scales, xielu = Lazy("cpu.scales"), Lazy("cpu.xielu")
activations = Lazy("cpu.activations")

Want = tuple[str, ...]


class CPU(Fuser):
    """What all fusers over the C++ kernels share."""

    backend, dtypes = "cpu", (torch.float32, torch.bfloat16)


@register
class NormKernel(CPU, NormForward):
    """[Residual add and] norm, each row read from memory once; hands out the sum."""

    kernels = norms


@register
class NormBackward(CPU, NormGradients):
    """Backward of a norm, with the residual's gradient added to dx where there is one."""

    kernels = norms


@register
class ScaleKernel(CPU, ScaleForward):
    """A scale for each column [and residual add] in one pass."""

    kernels = scales


@register
class ScaleBackward(CPU, ScaleGradients):
    """Both gradients of a scale for each column, in one pass."""

    kernels = scales


@register
class WeightedAddKernel(CPU, WeightedAddForward):
    """A sum with another value times a factor for each column, in one pass."""

    kernels = scales


@register
class WeightedAddBackward(CPU, WeightedAddGradients):
    """Its three gradients, in one pass."""

    kernels = scales


@register
class XIELUKernel(CPU, XIELUFuser):
    """xIELU, and its three gradients, each in one pass."""

    kernels = xielu


@register
class ActivationKernel(CPU):
    """[Bias and] activation in one pass; hands out the sum. Backward with the bias's sums."""

    pattern, saves = dict(bias=Bias | None, act=Activation | GatedActivation), ("act_x",)
    wants = dict(bias_bias="bias")

    def fwd(self, x: Tensor, bias_bias: Tensor | None, act_function: Function, want: Want) -> Any:
        kept = "act_x" in want
        y, pre = activations.activation_forward(x, *act_function, bias_bias, kept)
        return y, (pre,)

    def bwd(
        self, dy: Tensor, act_x: Tensor, act_function: Function, bias_bias: Tensor | None,
        want: Want,
    ) -> Any:  # fmt: skip
        dtype = torch.float32 if bias_bias is None else bias_bias.dtype
        dx, _, dbias = activations.activation_backward(dy, act_x, *act_function, want, dtype)
        return dx, (dbias,)
