"""Adaptive norms: scale and shift come for each sample, as extra inputs (Peebles and Xie, 2023)."""

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor

from ..base.errors import OpError
from ..kernels.reference import wide
from ..op import Lowered, Op, Spec
from .norms import LayerNorm, RMSNorm


def _spread(value: Tensor, rows: int) -> Tensor:
    """`[samples, width]` as `[samples, 1, width]`, for x seen as `[samples, rows each, width]`."""
    value = value.flatten(0, -2) if value.dim() > 1 else value[None]
    samples = value.shape[0]
    if rows % samples if samples else rows:
        raise OpError("Modulate", f"{samples} samples", f"a divisor of {rows} rows")
    return wide(value)[:, None]


def _by_sample(x: Tensor, samples: int) -> Tensor:
    """`[rows, width]` as `[samples, rows each, width]`; no sample has no rows."""
    return wide(x).reshape(samples, x.shape[0] // max(samples, 1), x.shape[1])


class Modulate(Op):
    """`y = x * (1 + scale) + shift`, scale and shift `[samples, width]` as extra inputs.

    x: `[samples, *, width]`: its leading dimension counts the samples, or a multiple of them.
    """

    keeps_width = True
    extra_inputs = ("scale", "shift")
    as_stored = ("scale", "shift")

    def extra_spec(self, name: str, x: Spec) -> Spec | None:
        return None

    def example_extra(self, name: str, x: Spec, rows: int) -> Tensor:
        return torch.zeros(1, x.width, dtype=x.dtype, device=x.device)

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(self, x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, tuple[()]]:
        if scale.shape[-1] != x.shape[-1] or shift.shape != scale.shape:
            got = f"scale {tuple(scale.shape)} and shift {tuple(shift.shape)}"
            raise OpError("Modulate", got, f"two of [samples, {x.shape[-1]}]")
        factor = 1 + _spread(scale, x.shape[0])
        h = _by_sample(x, factor.shape[0])
        y = torch.addcmul(_spread(shift, x.shape[0]), h, factor)
        return y.reshape(x.shape).to(x.dtype), ()

    def bwd(
        self, dy: Tensor, x: Tensor, scale: Tensor, shift: Tensor, want: Collection[str]
    ) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None]]:
        factor = 1 + _spread(scale, x.shape[0])
        samples = factor.shape[0]
        g, h = _by_sample(dy, samples), _by_sample(x, samples)
        dx = (g * factor).reshape(x.shape).to(x.dtype) if "x" in want else None
        dscale = (g * h).sum(1).reshape(scale.shape).to(scale.dtype) if "scale" in want else None
        dshift = g.sum(1).reshape(shift.shape).to(shift.dtype) if "shift" in want else None
        return dx, (dscale, dshift)


class AdaptiveRMSNorm(RMSNorm):
    """RMSNorm without weight, then Modulate: `rmsnorm(x) * (1 + scale) + shift`."""

    extra_inputs = ("scale", "shift")
    lowers_subclasses = False

    def __init__(self, normalized_shape: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine=False)

    def lower(self) -> Sequence[Lowered]:
        return Lowered(RMSNorm, self), Lowered(Modulate, self)

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(),)


class AdaptiveLayerNorm(LayerNorm):
    """LayerNorm without weight and bias, then Modulate: `layernorm(x) * (1 + scale) + shift`."""

    extra_inputs = ("scale", "shift")
    lowers_subclasses = False

    def __init__(self, normalized_shape: int | None = None, eps: float = 1e-5) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine=False)

    def lower(self) -> Sequence[Lowered]:
        return Lowered(LayerNorm, self), Lowered(Modulate, self)

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(),)
