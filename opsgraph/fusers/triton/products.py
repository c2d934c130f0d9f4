"""Fusers with a matrix product and an activation: in one kernel, or a pass beside a library's.

The library has the faster main loop, an activation beside a product saves one pass over the
pre-activation. On Hopper two groups of warps do both at once, which is taken wherever it can be.
Elsewhere an activation is the epilogue of a Triton GEMM, which holds up its main loop: the shorter
that is, the more the pass counts. So on CUDA each epilogue declines beyond a depth (the length of
the rows that its GEMM multiplies), and leaves the run to the library's GEMM and a pointwise kernel.
`benchmarks/gpu_gemm.py` measures all three.
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
from ...ops import BasicLinear, Bias, GroupedLinear
from ...ops.activations import Activation, GatedActivation, Params
from .passes import ActivationFuser, activations

gemms, pairs, library = Lazy("triton.gemm"), Lazy("triton.pairs"), Lazy("cublaslt.gemm")

DEPTH = 512
FP32_DEPTH = 128
"""The longest rows for which the epilogue is taken, and in fp32."""


class Paired(ActivationFuser):
    """A product with an activation beside it, by two groups of warps in turn, on Hopper.

    What its kernels do not take at run time, few tiles or rows that begin at no multiple of 16
    bytes, goes the usual way: a product and a pass.
    """

    dtypes = (torch.float16, torch.bfloat16)  # type: ignore[assignment]

    def reject(self, act: Any, fc: Any, x: Spec) -> str | None:  # type: ignore[override]
        if reason := super().reject(act):
            return reason
        if fc.reads_transposed:
            return "its kernels read a weight by rows"
        out = fc.out_features if isinstance(fc, GroupedLinear) else fc.local_out_features
        depth, total = (x.width, out) if self.bwd is None else (out, x.width)
        width = total // 2 if isinstance(act, GatedActivation) else total
        return pairs.none_for(x.device, depth, width)  # type: ignore[no-any-return]


@register
class PairedActivation(Paired):
    """A product with bias and activation beside it; hands out what act reads.

    In inference a bias with GELU or ReLU is an epilogue of the library's product, as in
    `cublaslt.linear`.
    """

    pattern = dict(fc=BasicLinear, bias=Bias | None, act=Activation | GatedActivation)
    saves, wants = ("act_x",), dict(act_x="pre")

    def fwd(
        self, x: Tensor, fc_weight: Tensor, bias_bias: Tensor | None, act_kernel: str,
        act_params: Params, want: Collection[str],
    ) -> Any:  # fmt: skip
        if "pre" not in want and bias_bias is not None and act_kernel in library.EPILOGUES:
            return library.matmul(x, fc_weight.t(), bias_bias, activation=act_kernel), (None,)
        if pairs.why_not(fc_weight.size(0), x, fc_weight):
            pre = library.matmul(x, fc_weight.t(), bias_bias)
            return activations.activation_forward(pre, act_kernel, act_params), (pre,)
        y, pre = pairs.activation(x, fc_weight, bias_bias, act_kernel, act_params, want)
        return y, (pre,)


def _product_and_pass(
    dy: Tensor, weight: Tensor, act_x: list[Tensor], kernel: str, params: Params,
    want: Collection[str], bias_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """The pre-activation's gradient, the activation again, and the bias's sums, as wanted."""
    pre = act_x.pop()
    dact = library.matmul(dy, weight)
    out = in_place_of(pre) if "x" in want else None
    return activations.activation_backward(  # type: ignore[no-any-return]
        dact, pre, kernel, params, want, bias_dtype, (out, dact)
    )


@register
class PairedActivationBackward(Paired):
    """Backward of activation and linear: the activation's gradient beside the linear's dgrad.

    It writes the pre-activation's gradient over the pre-activation, if that has no other use, and
    the linear's input computed again; the gradient between the two never reaches memory.
    """

    pattern = dict(act=Activation | GatedActivation, fc=BasicLinear)
    consumes, gives, wants = ("act_x",), ("fc_x",), dict(fc_weight="y")

    def bwd(
        self, dy: Tensor, act_x: list[Tensor], act_kernel: str, act_params: Params,
        fc_weight: Tensor, want: Collection[str],
    ) -> Any:  # fmt: skip
        if "x" not in want or pairs.why_not(fc_weight.size(1), dy, fc_weight, act_x[0]):
            dx, y, _ = _product_and_pass(dy, fc_weight, act_x, act_kernel, act_params, want)
            return dx, (y,)
        pre = act_x.pop()
        out = in_place_of(pre)
        dx, y = pairs.gradient(dy, fc_weight, pre, out, act_kernel, act_params, want)
        return dx, (y,)


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
        more = act_kernel, act_params, want, None if bias_bias is None else bias_bias.dtype
        dx, y, dbias = _product_and_pass(dy, fc_weight, act_x, *more)
        return dx, (dbias, y)
