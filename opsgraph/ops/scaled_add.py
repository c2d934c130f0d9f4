"""Sums with a scaled residual: ScaledAdd by a number, WeightedAdd by a factor for each column."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from ..guards.validation import finite, text
from ..kernels.reference import scales, wide
from ..op import Op, Spec
from .layer_scale import LayerScale


class ScaledAdd(Op):
    """`y = x + scale * other`; other is the value of the Tee of that name, or an extra input.

    scale: a finite number. It is rounded once, where PyTorch rounds the product too. other may be
    of another float dtype, as Add's may: each gradient has its own input's.
    """

    keeps_width = True
    extra_inputs = promotes = ("other",)
    constants = ("scale",)

    def __init__(self, name: str | None = None, scale: float = 1.0) -> None:
        super().__init__()
        who = type(self).__name__
        self.channels["other"] = text(who, "name", name)
        self.scale = finite(who, "scale", scale)

    def reject(self, x: Spec) -> str | None:
        finite(type(self).__name__, "scale", self.scale)  # it may have been set since construction
        return None

    def out(self, x: Spec) -> Spec:
        return x

    def fwd(self, x: Tensor, other: Tensor, scale: float) -> tuple[Tensor, tuple[()]]:
        dtype = scales.dtype_of(x.dtype, other.dtype)
        if scales.beyond(dtype, scale):
            return (wide(x) + wide(other) * scale).to(dtype), ()
        return torch.add(x, other, alpha=scale), ()

    def bwd(self, dy: Tensor, scale: float) -> tuple[Tensor, tuple[Tensor]]:
        return dy, (dy * scale,)

    def extra_repr(self) -> str:
        return f"{self.channels['other']!r}, scale={self.scale}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(scale=0.5),)


class WeightedAdd(LayerScale):
    """`y = x + other * weight`: LayerScale of what is added, as Doge scales its residual.

    other: the value of the Tee of that name, or an extra input. width, init_value and weight
    `[width]`: as LayerScale's. All three may differ in dtype: y has the one to which PyTorch
    promotes, and each gradient its own input's.
    """

    extra_inputs = promotes = ("other",)
    required = as_stored = typed_by = ("weight",)

    def __init__(
        self,
        name: str | None = None,
        width: int | None = None,
        init_value: float = 1.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(width, init_value, device=device, dtype=dtype)
        self.channels["other"] = text(type(self).__name__, "name", name)

    def fwd(  # type: ignore[override]
        self, x: Tensor, other: Tensor, weight: Tensor
    ) -> tuple[Tensor, tuple[()]]:
        return scales.scale_forward(other, weight, x), ()

    def bwd(  # type: ignore[override]
        self, dy: Tensor, other: Tensor, weight: Tensor, want: Collection[str]
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        names = ({"x"} if "other" in want else set()) | {"weight"}.intersection(want)
        dother, dweight = scales.scale_backward(dy, other, weight, names)
        return dy, (dother, dweight)

    def extra_repr(self) -> str:
        return f"{self.channels['other']!r}, {super().extra_repr()}"
