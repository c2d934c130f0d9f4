"""RMSNorm and LayerNorm, over the last dimension or the last few."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from copy import copy
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from ..base.errors import OpError
from ..guards.validation import Checked, choice, epsilon, flag, place, whole
from ..kernels.reference import norms
from ..op import Lowered, Op, Spec
from .parameters import empty_parameter, known


def _sizes(who: str, name: str, shape: Any) -> tuple[int, ...] | None:
    """normalized_shape as a tuple, None where the width is left out."""
    if shape is None:
        return None
    one = (
        isinstance(shape, str | bytes)
        or not isinstance(shape, Iterable)
        or getattr(shape, "ndim", 1) == 0
    )
    given = (shape,) if one else tuple(shape)
    if not given:
        raise OpError(who, f"{name}={shape!r}", "a width, or several sizes")
    return tuple(whole(who, name, n, 0, ", or several") for n in given)


def _normalized_dtype(who: str, name: str, value: Any) -> Any:
    return choice(who, name, value, (None, "input", "weight"))


class _Norm(Op):
    """What RMSNorm and LayerNorm share: the last dimensions, and weights around 1.

    normalized_dtype: the dtype to which the normalized value is rounded before the weight
    multiplies it. None: it is not rounded, and y has x's dtype, as torch.nn has it. "input": x's
    (Llama, DeBERTa); y has the dtype to which PyTorch promotes x's, the weight's and the bias's.
    "weight": the weight's, where that has 16 bits (T5); y has the weight's dtype. Product and sum
    are rounded as well then, so that the bits are those of PyTorch's single operations.
    round_gamma: `1 + weight` is rounded to the weight's dtype (Nemotron), which without
    zero_centered_gamma changes nothing. sm_margin is TransformerEngine's hint to leave
    multiprocessors to others; it changes nothing.
    """

    keeps_width = True
    as_stored = ("weight", "bias")
    typed_by = ("weight", "bias")
    lowers_subclasses: ClassVar[bool] = True
    constants: ClassVar[tuple[str, ...]] = (
        "eps", "zero_centered_gamma", "center", "normalized_dtype"
    )  # fmt: skip
    center: ClassVar[bool]
    """Whether rows are freed of their mean."""
    names: tuple[str, ...] = ()
    normalized_shape = Checked(_sizes)
    zero_centered_gamma = Checked(flag)
    round_gamma = Checked(flag)
    normalized_dtype = Checked(_normalized_dtype)
    eps_by_dtype: ClassVar[bool] = False
    """Whether eps may be None, for the epsilon of the dtype that statistics are in."""

    def __init__(
        self,
        normalized_shape: int | Iterable[int] | None = None,
        eps: float | None = 1e-5,
        elementwise_affine: bool = True,
        *,
        zero_centered_gamma: bool = False,
        round_gamma: bool = False,
        normalized_dtype: str | None = None,
        sm_margin: int | Mapping[str, int] = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        who = type(self).__name__
        place(who, device, dtype)
        self.normalized_shape = normalized_shape
        self._verify_shape()
        shape = self.normalized_shape
        self.eps = eps if eps is None and self.eps_by_dtype else epsilon(who, "eps", eps)
        self.zero_centered_gamma, self.round_gamma = zero_centered_gamma, round_gamma
        self.normalized_dtype = normalized_dtype
        self.elementwise_affine = flag(who, "elementwise_affine", elementwise_affine)
        margins = sm_margin if isinstance(sm_margin, Mapping) else {"sm_margin": sm_margin}
        for name, margin in margins.items():
            whole(who, name, margin, 0)
        for name in self.names:
            self.register_parameter(name, None)
            if elementwise_affine:
                setattr(self, name, empty_parameter(shape or (None,), device, dtype))
        self.reset_parameters()

    def _verify_shape(self) -> None:
        """Raises OpError for several sizes of a class that takes one."""
        if self.trailing() and self._several() is None:
            expected = "one size, as the classes derived from a norm take"
            got = f"normalized_shape={self.normalized_shape}"
            raise OpError(type(self).__name__, got, expected)

    def lower(self) -> Sequence[Lowered]:
        if not self.trailing():
            return super().lower()
        self._verify_shape()
        return (Lowered(self._several() or type(self), self),)

    def _several(self) -> type[Op] | None:
        """What computes over several dimensions, None for a class with functions of its own.

        A parametrized norm is of a class that PyTorch has derived, with all functions of its base.
        """
        pairs = (LayerNorm, _LayerNormOfSeveral), (RMSNorm, _RMSNormOfSeveral)
        named = "fwd", "bwd", "again", "lower", "extra_inputs"
        for base, several in pairs:
            if all(getattr(type(self), name) is getattr(base, name, None) for name in named):
                return several
        return None

    def reject(self, x: Spec) -> str | None:
        if self.eps is not None or not self.eps_by_dtype:
            epsilon(type(self).__name__, "eps", self.eps)  # it may have been set since construction
        self._verify_shape()
        return super().reject(x)

    def trailing(self) -> tuple[int, ...]:
        return (self.normalized_shape or ())[:-1]

    def constant(self, name: str, x: Spec) -> Any:
        if name == "eps" and self.eps is None:
            return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        if name == "zero_centered_gamma" and self.zero_centered_gamma and self.round_gamma:
            return norms.ROUNDED
        return super().constant(name, x)

    def result(self, dtype: torch.dtype, others: Mapping[str, torch.dtype]) -> torch.dtype:
        weight, bias = others.get("weight"), others.get("bias")
        return norms.dtypes(dtype, weight, bias, self.normalized_dtype).y

    def reset_parameters(self) -> None:
        """Weight 1, or 0 when zero_centered_gamma; bias 0."""
        for name, parameter in self._parameters.items():
            if parameter is not None and not isinstance(parameter, UninitializedParameter):
                one = name == "weight" and not self.zero_centered_gamma
                torch.nn.init.constant_(parameter, 1.0 if one else 0.0)

    @property
    def width(self) -> int | None:
        """The last of its sizes, which a row has between ops; None where it is left out."""
        return self.normalized_shape[-1] if self.normalized_shape else None

    @property
    def in_width(self) -> int | None:
        return self.width

    def complete(self, in_width: int | None, out_width: int | None) -> None:
        width = known(in_width, out_width)
        if self.width is None and width is not None:
            self.normalized_shape = width
            for parameter in self._parameters.values():
                if isinstance(parameter, UninitializedParameter):
                    parameter.materialize((width,))
            self.reset_parameters()

    def sizes_from(self, name: str, shape: torch.Size) -> None:
        self.normalized_shape = shape

    def shape_of(self, name: str) -> tuple[int | None, ...] | None:
        return (*self.trailing(), self.width)

    def out(self, x: Spec) -> Spec:
        return x.like(dtype=norms.dtypes(x.dtype, None, None, self.normalized_dtype).y)

    def rounded_once(self, dtype: torch.dtype) -> "_Norm":
        """The same norm, of whatever it reads, with a y that is rounded once, to a dtype."""
        other = copy(self)
        name = str(dtype).removeprefix("torch.")
        other.__dict__ |= {"normalized_dtype": f"{norms.ONCE}{name}"}
        return other

    def saved(self, x: Spec) -> dict[str, Spec]:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        rows = -prod(self.trailing())  # this many rows of a plan share one mean and one rstd
        return dict.fromkeys(self.saves, Spec((rows, 1), dtype, x.device))

    def extra_repr(self) -> str:
        shape = self.width if not self.trailing() else self.normalized_shape
        shown = f"{shape}, eps={self.eps}, zero_centered_gamma={self.zero_centered_gamma}"
        shown += ", round_gamma=True" if self.round_gamma else ""
        first = self.normalized_dtype
        return shown if first is None else f"{shown}, normalized_dtype={first!r}"


class RMSNorm(_Norm):
    """`y = x * rsqrt(mean(x^2) + eps) * weight` (`1 + weight` if zero_centered_gamma).

    x: `[*, width]`; weight: `[width]`, of any float dtype, or None without elementwise_affine.
    Statistics in fp32 (fp64 for fp64). The width may be left out. With several sizes, `(4, 16)`,
    mean and weight are over as many dimensions, as in nn.RMSNorm. eps=None is the epsilon of the
    statistics' dtype, as in nn.RMSNorm. (Zhang and Sennrich, 2019)
    """

    saves, center = ("rstd",), False
    names = ("weight",)
    eps_by_dtype = True

    def fwd(
        self, x: Tensor, weight: Tensor | None, eps: float, zero_centered_gamma: int,
        normalized_dtype: str | None = None,
    ) -> Any:  # fmt: skip
        y, rstd = norms.rmsnorm_forward(x, weight, eps, zero_centered_gamma, normalized_dtype)
        return y, (rstd,)

    def again(
        self, x: Tensor, rstd: Tensor, weight: Tensor | None, zero_centered_gamma: int,
        normalized_dtype: str | None = None,
    ) -> Any:  # fmt: skip
        """y from the saved rstd."""
        return norms.rmsnorm_again(x, rstd, weight, zero_centered_gamma, normalized_dtype)

    def bwd(
        self, dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None,
        zero_centered_gamma: int, normalized_dtype: str | None, want: Collection[str],
    ) -> tuple[Tensor | None, tuple[Tensor | None]]:  # fmt: skip
        dx, dweight, _ = norms.rmsnorm_backward(
            dy, x, rstd, weight, zero_centered_gamma, "x" in want, "weight" in want,
            normalized_dtype=normalized_dtype,
        )  # fmt: skip
        return dx, (dweight,)

    @classmethod
    def sample(cls) -> Iterable[Op]:
        rounded = cls(zero_centered_gamma=True, round_gamma=True, normalized_dtype="input")
        plain = cls(elementwise_affine=False)
        return cls(), cls(zero_centered_gamma=True), plain, rounded


class LayerNorm(_Norm):
    """`y = (x - mean) * rsqrt(var + eps) * weight + bias` (`1 + weight` if zero_centered_gamma).

    x: `[*, width]`; weight, bias: `[width]`, of any float dtype, or None without elementwise_affine
    (bias also with `bias=False`). Statistics in fp32 (fp64 for fp64). The width may be left out.
    With several sizes, `(4, 16)`, statistics, weight and bias are over as many dimensions, as in
    nn.LayerNorm. (Ba et al., 2016)
    """

    saves, center = ("mean", "rstd"), True
    names = ("weight", "bias")

    def __init__(
        self,
        normalized_shape: int | Iterable[int] | None = None,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(normalized_shape, eps, elementwise_affine, **options)
        if not flag(type(self).__name__, "bias", bias):
            self.bias = None

    def fwd(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        zero_centered_gamma: int,
        normalized_dtype: str | None = None,
    ) -> Any:
        y, mean, rstd = norms.layernorm_forward(
            x, weight, bias, eps, zero_centered_gamma, normalized_dtype
        )
        return y, (mean, rstd)

    def bwd(
        self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
        bias: Tensor | None, zero_centered_gamma: int, normalized_dtype: str | None,
        want: Collection[str],
    ) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None]]:  # fmt: skip
        wanted = "x" in want, "weight" in want, "bias" in want
        dx, dweight, dbias = norms.layernorm_backward(
            dy, x, mean, rstd, weight, bias, zero_centered_gamma, wanted, normalized_dtype
        )
        return dx, (dweight, dbias)

    @classmethod
    def sample(cls) -> Iterable[Op]:
        plain, rounded = cls(elementwise_affine=False), cls(normalized_dtype="input")
        return cls(), cls(zero_centered_gamma=True), cls(bias=False), plain, rounded


def _wide(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Rows of a plan as rows of `prod(sizes)` values each; where that is 0, as many as it can."""
    width = prod(sizes)
    return x.reshape(-1 if width else x.shape[0] // max(1, prod(sizes[:-1])), width)


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.reshape(-1)


def _like(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.reshape(like.shape)


class _RMSNormOfSeveral(RMSNorm):
    """RMSNorm over several dimensions. A class of its own, which no fused kernel takes."""

    constants = (*RMSNorm.constants, "normalized_shape")

    def fwd(  # type: ignore[override]
        self, x: Tensor, weight: Tensor | None, eps: float, zero_centered_gamma: int,
        normalized_dtype: str | None, normalized_shape: tuple[int, ...],
    ) -> Any:  # fmt: skip
        rows, flat = _wide(x, normalized_shape), _flat(weight)
        y, rstd = norms.rmsnorm_forward(rows, flat, eps, zero_centered_gamma, normalized_dtype)
        return y.reshape(x.shape), (rstd,)

    def again(  # type: ignore[override]
        self, x: Tensor, rstd: Tensor, weight: Tensor | None, zero_centered_gamma: int,
        normalized_dtype: str | None, normalized_shape: tuple[int, ...],
    ) -> Any:  # fmt: skip
        rows, flat = _wide(x, normalized_shape), _flat(weight)
        y = norms.rmsnorm_again(rows, rstd, flat, zero_centered_gamma, normalized_dtype)
        return y.reshape(x.shape)

    def bwd(  # type: ignore[override]
        self, dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor | None,
        zero_centered_gamma: int, normalized_dtype: str | None,
        normalized_shape: tuple[int, ...], want: Collection[str],
    ) -> tuple[Tensor | None, tuple[Tensor | None]]:  # fmt: skip
        wanted = "x" in want, "weight" in want
        dx, dweight, _ = norms.rmsnorm_backward(
            _wide(dy, normalized_shape), _wide(x, normalized_shape), rstd, _flat(weight),
            zero_centered_gamma, *wanted, normalized_dtype=normalized_dtype,
        )  # fmt: skip
        return _like(dx, x), (_like(dweight, weight),)


class _LayerNormOfSeveral(LayerNorm):
    """LayerNorm over several dimensions. A class of its own, which no fused kernel takes."""

    constants = (*LayerNorm.constants, "normalized_shape")

    def fwd(  # type: ignore[override]
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float,
        zero_centered_gamma: int, normalized_dtype: str | None,
        normalized_shape: tuple[int, ...],
    ) -> Any:  # fmt: skip
        rows, flat = _wide(x, normalized_shape), (_flat(weight), _flat(bias))
        rounding = zero_centered_gamma, normalized_dtype
        y, mean, rstd = norms.layernorm_forward(rows, *flat, eps, *rounding)
        return y.reshape(x.shape), (mean, rstd)

    def bwd(  # type: ignore[override]
        self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None,
        bias: Tensor | None, zero_centered_gamma: int, normalized_dtype: str | None,
        normalized_shape: tuple[int, ...], want: Collection[str],
    ) -> tuple[Tensor | None, tuple[Tensor | None, Tensor | None]]:  # fmt: skip
        wanted = "x" in want, "weight" in want, "bias" in want
        dx, dweight, dbias = norms.layernorm_backward(
            _wide(dy, normalized_shape), _wide(x, normalized_shape), mean, rstd, _flat(weight),
            _flat(bias), zero_centered_gamma, wanted, normalized_dtype,
        )  # fmt: skip
        return _like(dx, x), (_like(dweight, weight), _like(dbias, bias))
