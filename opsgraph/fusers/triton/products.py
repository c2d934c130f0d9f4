"""Fusers with a matrix product and an activation: in one Triton GEMM, or a pass beside a library's.

cuBLAS has the faster main loop, an activation in the epilogue saves one pass over the
pre-activation: the shorter the main loop, the more that pass counts. So on CUDA each epilogue
declines beyond a depth (the length of the rows that its GEMM multiplies), and leaves the run to the
library's GEMM and a pointwise kernel. On an H100, with 8192 rows and depths of 1024 and 2048, the
library was 1% to 9% faster (`benchmarks/gpu_gemm.py` measures it).
"""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from ...fuser import register
from ...guards.owned import in_place_of
from ...kernels.lazy import Lazy
from ...kernels.triton import interpreting
from ...op import Spec
from ...ops import BasicLinear, Bias
from ...ops.activations import Activation, GatedActivation, Params
from .passes import ActivationFuser, activations

gemms, library = Lazy("triton.gemm"), Lazy("cublaslt.gemm")

DEPTH = 512
FP32_DEPTH = 128
"""The longest rows for which the epilogue is taken, and in fp32."""


class _Epilogue(ActivationFuser):
    """A GEMM with an activation in its epilogue."""

    def reject(self, act: Any, fc: Any, x: Spec) -> str | None:  # type: ignore[override]
        if reason := super().reject(act):
            return reason
        if fc.reads_transposed:
            return "its kernels read a weight by rows, the library reads it as it is"
        depth = x.width if self.bwd is None else fc.local_out_features
        limit = FP32_DEPTH if x.dtype == torch.float32 else DEPTH
        if x.device.type == "cuda" and depth > limit and not interpreting():
            library = f"a GEMM of depth {depth} is faster in the library"
            return f"{library}, the epilogue is taken up to {limit}"
        return None


@register
class LinearActivation(_Epilogue):
    """GEMM with bias and activation, plain or gated, in its epilogue; hands out what act reads."""

    pattern = dict(fc=BasicLinear, bias=Bias | None, act=Activation | GatedActivation)
    saves, wants = ("act_x",), dict(act_x="pre")

    def fwd(
        self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor | None, act_kernel: str,
        act_params: Params, want: Collection[str],
    ) -> Any:  # fmt: skip
        y, pre = gemms.linear_activation(x, fc_weight, bias_bias, act_kernel, act_params, want)
        return y, (pre,)


@register
class ActivationEpilogueBackward(_Epilogue):
    """Backward of [bias,] activation and linear, the activation's gradient in the linear's dgrad.

    One GEMM writes the pre-activation's gradient, the linear's input computed again, and the bias's
    sums; the gradient that arrives at the activation never reaches memory.
    """

    pattern = dict(bias=Bias | None, act=Activation | GatedActivation, fc=BasicLinear)
    gives, wants = ("fc_x",), dict(bias_bias="bias", fc_weight="y")

    def bwd(
        self, dy: Tensor, act_x: Tensor, act_kernel: str, act_params: Params,
        bias_bias: Tensor | None, fc_weight: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        more = act_kernel, act_params, want, None if bias_bias is None else bias_bias.dtype
        dx, y, dbias = gemms.linear_activation_backward(dy, fc_weight, act_x, *more)
        return dx, (dbias, y)


@register
class ActivationLinearBackward(ActivationFuser):
    """Backward of [bias,] activation and linear: one pass between the linear's two GEMMs.

    It writes the pre-activation's gradient over the pre-activation, if that has no other use, the
    linear's input computed again over the GEMM's result, and the bias's sums.
    ActivationEpilogueBackward, registered before it, is taken where it may pay.
    """

    pattern = dict(bias=Bias | None, act=Activation | GatedActivation, fc=BasicLinear)
    consumes, gives, wants = ("act_x",), ("fc_x",), dict(bias_bias="bias", fc_weight="y")

    def bwd(
        self, dy: Tensor, act_x: list[Tensor], act_kernel: str, act_params: Params,
        bias_bias: Tensor | None, fc_weight: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        pre = act_x.pop()
        dact = library.matmul(dy, fc_weight)
        out = in_place_of(pre) if "x" in want else None
        dx, y, dbias = activations.activation_backward(
            dact, pre, act_kernel, act_params, want,
            None if bias_bias is None else bias_bias.dtype, (out, dact),
        )  # fmt: skip
        return dx, (dbias, y)
