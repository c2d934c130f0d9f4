"""Fusers over the C++ kernels for the CPU: norms with their residuals, activations with biases."""

from typing import Any

import torch
from torch import Tensor

from ...backend import Backend, add_backend
from ...fuser import Fuser, register
from ...ops import Add, Bias, LayerNorm, RMSNorm, Tee
from ...ops.activations import Activation, Function, GatedActivation
from ..lazy import Lazy

build = Lazy("cpu.build")
norms = Lazy("cpu.norms")
activations = Lazy("cpu.activations")

Want = tuple[str, ...]

add_backend(
    Backend("cpu", "C++ kernels, compiled here at first use", ("cpu",), lambda: build.why_not()),
    before="aten",
)


class CPU(Fuser):
    """What all fusers over the C++ kernels share."""

    backend, dtypes = "cpu", (torch.float32, torch.bfloat16)


@register
class NormKernel(CPU):
    """[Residual add and] norm, each row read from memory once; hands out the sum."""

    pattern = dict(add=Add | None, norm=RMSNorm | LayerNorm)
    saves = ("norm_x", "norm_mean", "norm_rstd")
    wants = dict(norm_mean="mean", norm_rstd="rstd")

    def fwd(
        self, x: Tensor, add_other: Tensor | None, norm_weight: Tensor | None,
        norm_bias: Tensor | None, norm_eps: float, norm_zero_centered_gamma: bool,
        norm_center: bool, want: Want,
    ) -> Any:  # fmt: skip
        y, mean, rstd, total = norms.norm_forward(
            x, norm_weight, norm_bias, norm_eps, norm_zero_centered_gamma, add_other, norm_center,
            want,
        )  # fmt: skip
        return y, (total, mean, rstd)


@register
class NormBackward(CPU):
    """Backward of a norm, with the residual's gradient added to dx where there is one."""

    pattern = dict(tee=Tee | None, norm=RMSNorm | LayerNorm)
    wants = dict(norm_weight="weight", norm_bias="bias")

    def bwd(
        self, dy: Tensor, tee_d: Tensor | None, norm_x: Tensor, norm_mean: Tensor | None,
        norm_rstd: Tensor, norm_weight: Tensor | None, norm_bias: Tensor | None,
        norm_zero_centered_gamma: bool, want: Want,
    ) -> Any:  # fmt: skip
        dx, dweight, dbias, _ = norms.norm_backward(
            dy, norm_x, norm_mean, norm_rstd, norm_weight, norm_bias, norm_zero_centered_gamma,
            tee_d, want,
        )  # fmt: skip
        return dx, (dweight, dbias)


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
