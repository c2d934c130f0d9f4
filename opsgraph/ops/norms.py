"""Normalizations over the last dimension."""

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from ..kernels.reference import norms
from ..op import Op
from ..spec import ROWS, Spec
from .parameters import empty_parameter


class _Norm(Op):
    """What RMSNorm and LayerNorm share: one width, and weights around 1."""

    as_stored = ("weight", "bias")
    constants = ("eps", "zero_centered_gamma")
    names: tuple[str, ...] = ()

    def __init__(
        self,
        normalized_shape: int | Iterable[int] | None = None,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        *,
        zero_centered_gamma: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if normalized_shape is not None and not isinstance(normalized_shape, int):
            (normalized_shape,) = normalized_shape
        self.width = normalized_shape
        self.eps = eps
        self.zero_centered_gamma = zero_centered_gamma
        self.elementwise_affine = elementwise_affine
        for name in self.names:
            self.register_parameter(name, None)
            if elementwise_affine:
                setattr(self, name, empty_parameter((normalized_shape,), device, dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight 1, or 0 when zero_centered_gamma; bias 0."""
        for name, parameter in self._parameters.items():
            if parameter is not None and not isinstance(parameter, UninitializedParameter):
                one = name == "weight" and not self.zero_centered_gamma
                torch.nn.init.constant_(parameter, 1.0 if one else 0.0)

    @property
    def in_width(self) -> int | None:
        return self.width

    def width_before(self, out_width: int) -> int | None:
        return out_width

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        width = in_width or out_width
        if self.width is None and width is not None:
            self.width = width
            for parameter in self._parameters.values():
                if isinstance(parameter, UninitializedParameter):
                    parameter.materialize((width,))
            self.reset_parameters()

    def sizes_from(self, name: str, shape: torch.Size) -> None:
        self.width = shape[0]

    def out(self, x: Spec) -> Spec:
        return x

    def saved(self, x: Spec) -> dict[str, Spec]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return dict.fromkeys(self.saves, Spec((ROWS, 1), dtype, x.device))

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}, zero_centered_gamma={self.zero_centered_gamma}"


class RMSNorm(_Norm):
    """`y = x * rsqrt(mean(x^2) + eps) * weight` (`1 + weight` if zero_centered_gamma).

    x: `[*, width]`; weight: `[width]`, of any float dtype, or None without elementwise_affine.
    Statistics in fp32. The width may be left out. (Zhang and Sennrich, 2019)
    """

    saves = ("rstd",)
    names = ("weight",)

    def fwd(self, x: Tensor, weight: Tensor | None, eps: float, zero_centered_gamma: bool) -> Any:
        y, rstd = norms.rmsnorm_forward(x, weight, eps, zero_centered_gamma)
        return y, (rstd,)

    def again(
        self, x: Tensor, rstd: Tensor, weight: Tensor | None, zero_centered_gamma: bool
    ) -> Any:
        """y from the saved rstd."""
        return norms.rmsnorm_again(x, rstd, weight, zero_centered_gamma)

    def bwd(
        self, dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None,
        zero_centered_gamma: bool, want: Collection[str],
    ) -> tuple[Tensor | None, tuple[Tensor | None]]:  # fmt: skip
        dx, dweight, _ = norms.rmsnorm_backward(
            dy, x, rstd, weight, zero_centered_gamma, "x" in want, "weight" in want
        )
        return dx, (dweight,)

    @classmethod
    def sample(cls) -> Iterable[Op]:
        return cls(), cls(zero_centered_gamma=True), cls(elementwise_affine=False)


class LayerNorm(_Norm):
    """`y = (x - mean) * rsqrt(var + eps) * weight + bias` (`1 + weight` if zero_centered_gamma).

    x: `[*, width]`; weight, bias: `[width]`, of any float dtype, or None without elementwise_affine
    (bias also with `bias=False`). Statistics in fp32. The width may be left out. (Ba et al., 2016)
    """

    saves = ("mean", "rstd")
    names = ("weight", "bias")

    def __init__(
        self,
        normalized_shape: int | Iterable[int] | None = None,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        zero_centered_gamma: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            normalized_shape,
            eps,
            elementwise_affine,
            zero_centered_gamma=zero_centered_gamma,
            device=device,
            dtype=dtype,
        )
        if not bias:
            self.bias = None

    def fwd(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        zero_centered_gamma: bool,
    ) -> Any:
        y, mean, rstd = norms.layernorm_forward(x, weight, bias, eps, zero_centered_gamma)
        return y, (mean, rstd)

    def bwd(
        self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
        bias: Tensor | None, zero_centered_gamma: bool, want: Collection[str],
    ) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None]]:  # fmt: skip
        wanted = "x" in want, "weight" in want, "bias" in want
        dx, dweight, dbias = norms.layernorm_backward(
            dy, x, mean, rstd, weight, bias, zero_centered_gamma, wanted
        )
        return dx, (dweight, dbias)

    @classmethod
    def sample(cls) -> Iterable[Op]:
        plain = cls(elementwise_affine=False)
        return cls(), cls(zero_centered_gamma=True), cls(bias=False), plain


class L2Normalization(Op):
    """`y = x * rsqrt(sum(x^2) + eps)` over the last dimension, x of any width."""

    saves = ("scale",)
    constants = ("eps",)

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def out(self, x: Spec) -> Spec:
        return x

    def saved(self, x: Spec) -> dict[str, Spec]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        return {"scale": Spec((ROWS, 1), dtype, x.device)}

    def fwd(self, x: Tensor, eps: float) -> Any:
        y, scale = norms.l2norm_forward(x, eps)
        return y, (scale,)

    def bwd(self, dy: Tensor, x: Tensor, scale: Tensor) -> Any:
        return norms.l2norm_backward(dy, x, scale), ()
