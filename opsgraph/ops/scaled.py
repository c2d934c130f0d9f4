"""Activations times a scale for each row, an extra input: a router's weights, for instance.

activation_recompute_in_mlp is TransformerEngine's hint to make the activation again in the
backward. Plans do so anyway where it is cheap, and it changes nothing.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..guards.validation import Checked, flag, positive
from ..kernels.reference import activations as reference
from ..kernels.reference import wide
from ..op import ROWS, Lowered, Op, Spec
from .activations import (
    GEGLU,
    QGEGLU,
    Activation,
    AnyActivation,
    ClampedSwiGLU,
    GatedActivation,
    Params,
    ReGLU,
    SiTUGLU,
    SReLU,
    SwiGLU,
)

Gradients = tuple[Tensor | None, tuple[Tensor | None]]


class _Scaled(Op):
    """`y = act(x) * scales[:, None]`; scales: `[*]`, a float for each row, of any float dtype."""

    extra_inputs = ("scales",)
    as_stored = ("scales",)

    def __init__(
        self, *args: Any, activation_recompute_in_mlp: bool = False, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        who, name = type(self).__name__, "activation_recompute_in_mlp"
        self.activation_recompute_in_mlp = flag(who, name, activation_recompute_in_mlp)

    def extra_spec(self, name: str, x: Spec) -> Spec | None:
        return Spec((ROWS,), x.dtype, x.device)


class _ScaledFunction(_Scaled, AnyActivation):
    """The reference of a function of `kernels/reference/activations.py`, plain or gated."""

    def fwd(  # type: ignore[override]
        self, x: Tensor, scales: Tensor, kernel: str, params: Params = (),
        glu_interleave_size: int | None = None,
    ) -> tuple[Tensor, tuple[()]]:  # fmt: skip
        y = reference.activation_forward(wide(x), kernel, params, glu_interleave_size, x.dtype)
        return (y * wide(scales)[:, None]).to(x.dtype), ()

    def bwd(  # type: ignore[override]
        self, dy: Tensor, x: Tensor, scales: Tensor, kernel: str, params: Params = (),
        glu_interleave_size: int | None = None, *, want: Collection[str],
    ) -> Gradients:  # fmt: skip
        g, function = wide(dy), (kernel, params, glu_interleave_size)
        dact = g * wide(scales)[:, None]
        dx, y = reference.activation_backward_and_y(
            dact, wide(x), *function, "scales" in want, x.dtype
        )
        dscales = None if y is None else (g * y).sum(-1).to(scales.dtype)
        return dx.to(x.dtype), (dscales,)


class ScaledGatedActivation(_ScaledFunction, GatedActivation):
    """A gated activation times a scale for each row."""


class ScaledActivation(_ScaledFunction, Activation):
    """An activation times a scale for each row."""


class ScaledSwiGLU(ScaledGatedActivation, SwiGLU):
    """`a * sigmoid(a) * b * scales[:, None]`"""


class ScaledGEGLU(ScaledGatedActivation, GEGLU):
    """`gelu(a) * b * scales[:, None]`"""


class ScaledReGLU(ScaledGatedActivation, ReGLU):
    """`max(a, 0) * b * scales[:, None]`"""


class ScaledQGEGLU(ScaledGatedActivation, QGEGLU):
    """`a * sigmoid(1.702 * a) * b * scales[:, None]`"""


class ScaledSiTUGLU(ScaledGatedActivation, SiTUGLU):
    """SiTUGLU times `scales[:, None]`."""

    def __init__(
        self,
        glu_interleave_size: int | None = None,
        *,
        beta1: float = 4.0,
        beta2: float = 25.0,
        **options: Any,
    ) -> None:
        super().__init__(beta1, beta2, glu_interleave_size, **options)


class ScaledClampedSwiGLU(ScaledGatedActivation, ClampedSwiGLU):
    """ClampedSwiGLU times `scales[:, None]`.

    limit, alpha, glu_linear_offset, glu_interleave_size: as ClampedSwiGLU's.
    """


class ScaledClampedQGeGLU(ScaledClampedSwiGLU):
    """ScaledClampedSwiGLU by TransformerEngine's name, with its order of arguments."""

    def __init__(
        self,
        glu_interleave_size: int | None = None,
        *,
        limit: float = 7.0,
        alpha: float = 1.702,
        glu_linear_offset: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(limit, alpha, glu_linear_offset, glu_interleave_size, **options)

    def lower(self) -> Sequence[Lowered]:
        return (Lowered(ScaledClampedSwiGLU, self),)


class ScaledSReLU(ScaledActivation, SReLU):
    """`max(x, 0)^2 * scales[:, None]`"""


class ScaledTanhSReLU(_Scaled):
    """`(s * tanh(max(x, 0) / s))^2 * scales[:, None]`, s = tanh_clamp_scale, finite and above 0."""

    keeps_width = True
    constants = ("tanh_clamp_scale",)
    tanh_clamp_scale = Checked(positive)

    def __init__(self, tanh_clamp_scale: float, **options: Any) -> None:
        super().__init__(**options)
        self.tanh_clamp_scale = tanh_clamp_scale

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(self, x: Tensor, scales: Tensor, tanh_clamp_scale: float) -> tuple[Tensor, tuple[()]]:
        clamped = tanh_clamp_scale * torch.tanh(torch.relu(wide(x)) / tanh_clamp_scale)
        return (clamped.square() * wide(scales)[:, None]).to(x.dtype), ()

    def bwd(
        self, dy: Tensor, x: Tensor, scales: Tensor, tanh_clamp_scale: float, want: Collection[str]
    ) -> Gradients:
        g, t = wide(dy), torch.tanh(torch.relu(wide(x)) / tanh_clamp_scale)
        clamped = tanh_clamp_scale * t
        dx = g * wide(scales)[:, None] * 2 * clamped * (1 - t * t)
        dscales = (g * clamped.square()).sum(-1).to(scales.dtype) if "scales" in want else None
        return dx.to(x.dtype), (dscales,)

    def extra_repr(self) -> str:
        return f"tanh_clamp_scale={self.tanh_clamp_scale}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(2.0),)
