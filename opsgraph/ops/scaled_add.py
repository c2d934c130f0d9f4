"""Sums with a scaled residual: ScaledAdd by a number, WeightedAdd by a factor for each column."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor

from ..guards.validation import finite, text
from ..kernels.reference import scales
from ..op import Op, Spec
from .layer_scale import LayerScale


class _Promoting(Op):
    """What both share: y has the dtype to which PyTorch promotes, and dx has that of x."""

    extra_inputs = promotes = ("other",)
    x_dtype = ""
    """What x is of in the plan."""

    def constant(self, name: str, x: Spec) -> Any:
        own = name == "x_dtype"
        return str(x.dtype).removeprefix("torch.") if own else super().constant(name, x)


class ScaledAdd(_Promoting):
    """`y = x + scale * other`; other is the value of the Tee of that name, or an extra input.

    scale: a finite number. It is rounded once, where PyTorch rounds the product too. other may be
    of another float dtype, as Add's may. Its gradient has the dtype of y; a linear layer right
    behind a Tee of a narrower one does not take that, and PyTorch raises a RuntimeError.
    """

    constants = ("scale", "x_dtype")

    def __init__(self, name: str | None = None, scale: float = 1.0) -> None:
        super().__init__()
        self.channels["other"] = text("ScaledAdd", "name", name)
        self.scale = finite("ScaledAdd", "scale", scale)

    def reject(self, x: Spec) -> str | None:
        finite("ScaledAdd", "scale", self.scale)  # it may have been set since construction
        return None

    def out(self, x: Spec) -> Spec:
        return x

    def width_before(self, out_width: int) -> int | None:
        return out_width

    def fwd(self, x: Tensor, other: Tensor, scale: float, x_dtype: str) -> tuple[Tensor, tuple[()]]:
        return torch.add(x, other, alpha=scale), ()

    def bwd(self, dy: Tensor, scale: float, x_dtype: str) -> tuple[Tensor, tuple[Tensor]]:
        return dy.to(getattr(torch, x_dtype)), (dy * scale,)

    def extra_repr(self) -> str:
        return f"{self.channels['other']!r}, scale={self.scale}"

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return (cls(scale=0.5),)


class WeightedAdd(_Promoting, LayerScale):
    """`y = x + other * weight`: LayerScale of what is added, as Doge scales its residual.

    other: the value of the Tee of that name, or an extra input. width, init_value and weight
    `[width]`: as LayerScale's. All three may differ in dtype: y has the one to which PyTorch
    promotes, and each gradient its own input's.
    """

    required = as_stored = typed_by = ("weight",)
    constants = ("x_dtype",)

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
        self.channels["other"] = text("WeightedAdd", "name", name)

    def fwd(  # type: ignore[override]
        self, x: Tensor, other: Tensor, weight: Tensor, x_dtype: str
    ) -> tuple[Tensor, tuple[()]]:
        return scales.scale_forward(other, weight, x), ()

    def bwd(  # type: ignore[override]
        self, dy: Tensor, other: Tensor, weight: Tensor, x_dtype: str, want: Collection[str]
    ) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
        names = ({"x"} if "other" in want else set()) | {"weight"}.intersection(want)
        dother, dweight = scales.scale_backward(dy, other, weight, names)
        return dy.to(getattr(torch, x_dtype)), (dother, dweight)

    def extra_repr(self) -> str:
        return f"{self.channels['other']!r}, {super().extra_repr()}"
