"""Fusers over PyTorch's own calls, for any device: cublasLt on CUDA, oneDNN and MKL on the CPU."""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fuser import Fuser, register
from ..kernels.reference import activations
from ..op import Op
from ..ops import (
    GEGLU,
    GELU,
    GLU,
    QGEGLU,
    Add,
    BasicLinear,
    Bias,
    ClampedSwiGLU,
    ReGLU,
    ReLU,
    SiTUGLU,
    SReGLU,
    SwiGLU,
)
from ..spec import Spec

Gated = GEGLU | GLU | QGEGLU | ReGLU | SReGLU | SwiGLU | ClampedSwiGLU | SiTUGLU


@register
class LinearBias(Fuser):
    """`x @ weight.T + bias`, the bias in the GEMM's epilogue."""

    backend, pattern = "aten", dict(fc=BasicLinear, bias=Bias)

    def fwd(self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor) -> Any:
        return F.linear(x, fc_weight, bias_bias), ()


@register
class LinearBiasActivation(Fuser):
    """GEMM, bias and GELU or ReLU in one call; it cannot hand out the pre-activation."""

    backend, pattern = "aten", dict(fc=BasicLinear, bias=Bias, act=GELU | ReLU)

    def reject(self, fc: Op, bias: Op, act: Op, x: Spec) -> str | None:
        there = "gelu" if x.device.type == "cuda" else "gelu_erf"  # found by trying, see the tests
        if act.kernel not in ("relu", there):
            return f"on {x.device.type} the library's epilogue is {there}, not {act.kernel}"
        if x.device.type == "cuda" and x.dtype == torch.float64:
            return "cublasLt has no such epilogue in fp64"
        return None

    def fwd(self, act: Op, x: Tensor, fc_weight: Tensor, bias_bias: Tensor) -> Any:
        gelu = act.kernel != "relu"
        return torch._addmm_activation(bias_bias, x, fc_weight.t(), use_gelu=gelu), ()


@register
class LinearAdd(Fuser):
    """`x @ weight.T + other`, the sum in the GEMM's accumulator (beta = 1)."""

    backend, pattern = "aten", dict(fc=BasicLinear, add=Add)

    def fwd(self, x: Tensor, fc_weight: Tensor, add_other: Tensor) -> Any:
        return torch.addmm(add_other, x, fc_weight.t()), ()


@register
class GatedLinearBackward(Fuser):
    """Backward of a gated activation and the linear after it.

    The linear's input is computed again in the pass that computes the activation's gradient.
    """

    backend, pattern = "aten", dict(act=Gated, fc=BasicLinear)

    def bwd(
        self, dy: Tensor, fc: Any, act_x: Tensor, fc_weight: Tensor, fc_weight_stored: Tensor,
        act_kernel: str, act_params: tuple[float, ...], act_glu_interleave_size: int | None,
        want: Collection[str],
    ) -> Any:  # fmt: skip
        shape = act_kernel, act_params, act_glu_interleave_size
        weighs = "fc_weight" in want
        dx, y = activations.gated_backward_and_y(dy @ fc_weight, act_x, *shape, weighs)
        return dx, (None if y is None else fc.wgrad(dy, y, fc_weight_stored),)
