"""Activations times a scale for each row, an extra input: a router's weights, for instance."""

from collections.abc import Collection, Iterable

from torch import Tensor

from ..kernels.reference import activations as reference
from ..kernels.reference import wide
from ..op import Op
from ..spec import ROWS, Spec
from .activations import (
    GEGLU,
    QGEGLU,
    Activation,
    ClampedSwiGLU,
    GatedActivation,
    ReGLU,
    SReLU,
    SwiGLU,
)

Gradients = tuple[Tensor | None, tuple[Tensor | None]]


class _Scaled(Op):
    """`y = act(x) * scales[:, None]`; scales: `[*]`, a float for each row, of any float dtype."""

    extra_inputs = ("scales",)
    as_stored = ("scales",)

    def extra_spec(self, name: str, x: Spec) -> Spec | None:
        return Spec((ROWS,), x.dtype, x.device)

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(),)


class ScaledGatedActivation(_Scaled, GatedActivation):
    """A gated activation times a scale for each row."""

    def fwd(  # type: ignore[override]
        self, x: Tensor, scales: Tensor, kernel: str, params: tuple[float, ...],
        glu_interleave_size: int | None,
    ) -> tuple[Tensor, tuple[()]]:  # fmt: skip
        y = reference.gated_forward(wide(x), kernel, params, glu_interleave_size)
        return (y * wide(scales)[:, None]).to(x.dtype), ()

    def bwd(  # type: ignore[override]
        self, dy: Tensor, x: Tensor, scales: Tensor, kernel: str, params: tuple[float, ...],
        glu_interleave_size: int | None, want: Collection[str],
    ) -> Gradients:  # fmt: skip
        shape = kernel, params, glu_interleave_size
        g = wide(dy)
        scaled = g * wide(scales)[:, None]
        dx, y = reference.gated_backward_and_y(scaled, wide(x), *shape, "scales" in want)
        dscales = None if y is None else (g * y).sum(-1).to(scales.dtype)
        return dx.to(x.dtype), (dscales,)


class ScaledActivation(_Scaled, Activation):
    """An activation times a scale for each row."""

    def fwd(self, x: Tensor, scales: Tensor, kernel: str) -> tuple[Tensor, tuple[()]]:  # type: ignore[override]
        y = reference.activation_forward(wide(x), kernel)
        return (y * wide(scales)[:, None]).to(x.dtype), ()

    def bwd(  # type: ignore[override]
        self, dy: Tensor, x: Tensor, scales: Tensor, kernel: str, want: Collection[str]
    ) -> Gradients:
        g, h = wide(dy), wide(x)
        dx = reference.activation_backward(g * wide(scales)[:, None], h, kernel)
        dscales = None
        if "scales" in want:
            dscales = (g * reference.activation_forward(h, kernel)).sum(-1).to(scales.dtype)
        return dx.to(x.dtype), (dscales,)


class ScaledSwiGLU(ScaledGatedActivation, SwiGLU):
    """`a * sigmoid(a) * b * scales[:, None]`"""


class ScaledGEGLU(ScaledGatedActivation, GEGLU):
    """`gelu(a) * b * scales[:, None]`"""


class ScaledReGLU(ScaledGatedActivation, ReGLU):
    """`max(a, 0) * b * scales[:, None]`"""


class ScaledQGEGLU(ScaledGatedActivation, QGEGLU):
    """`a * sigmoid(1.702 * a) * b * scales[:, None]`"""


class ScaledClampedSwiGLU(ScaledGatedActivation, ClampedSwiGLU):
    """ClampedSwiGLU times `scales[:, None]`; TransformerEngine's ScaledClampedQGeGLU."""


class ScaledSReLU(ScaledActivation, SReLU):
    """`max(x, 0)^2 * scales[:, None]`"""
