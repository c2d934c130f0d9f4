"""Activations, plain (`y = f(x)`) and gated (`y = f(a) * g(b)`, a and b the halves of the columns).

`FUNCTIONS` holds f with its derivative as `gradient(dy, x) = dy * f'(x)`; `GATED` says which f a
gated kind uses. g is the identity but for clamped_swiglu, `clamp(b, -limit, limit) + offset`, and
situglu, `beta2 * tanh(b / beta2)`.

A kind is a name and, after spaces, the words of `Form` that say what is other than usual:
`"swiglu rounded"`.
"""

from collections.abc import Callable
from functools import cache
from math import pi, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...guards.torch_private import constant_under_compile
from . import wide

aten = torch.ops.aten


class Function(NamedTuple):
    """A scalar function and its gradient."""

    value: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]


def _vanishing(factor: Tensor, x: Tensor) -> Tensor:
    """The product, but 0 where the factor is: the limit at infinity, where PyTorch gives NaN."""
    return torch.where(factor == 0, factor, factor * x)


def _swish(alpha: float) -> Function:
    def gradient(dy: Tensor, x: Tensor) -> Tensor:
        return dy * (torch.sigmoid(alpha * x) + _vanishing(_sigmoid_slope(alpha * x), alpha * x))

    return Function(lambda x: _vanishing(torch.sigmoid(alpha * x), x), gradient)


def _sigmoid_slope(x: Tensor) -> Tensor:
    """1 - sigmoid(x) is sigmoid(-x), which does not cancel."""
    return torch.sigmoid(x) * torch.sigmoid(-x)


def _tanh_slope(x: Tensor) -> Tensor:
    """1 - tanh(x)^2; where that would cancel, by tanh(x) = 2 * sigmoid(2x) - 1."""
    t = torch.tanh(x)
    return torch.where(x.abs() < 0.75, 1 - t * t, 4 * _sigmoid_slope(2 * x))


def _srelu_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return aten.threshold_backward(dy * (2 * torch.relu(x)), x, 0)  # type: ignore[no-any-return]


def _hardswish(x: Tensor) -> Tensor:
    """PyTorch's, whose factor 1/6 is fp32's on CUDA in fp64 too."""
    return x * F.relu6(x + 3) / 6 if x.dtype == torch.float64 else F.hardswish(x)


def _hardswish_gradient(dy: Tensor, x: Tensor) -> Tensor:
    if x.dtype != torch.float64:
        return aten.hardswish_backward(dy, x)  # type: ignore[no-any-return]
    slope = torch.where(x > 3, 1, x / 3 + 0.5)
    return torch.where(x > -3, dy * slope, 0)


FLAT = 1e4
"""Beyond it SiLU and GELU are 0 or x and their slopes 0 or 1, and no power of x overflows."""


def _flat(
    value: Callable[[Tensor], Tensor], gradient: Callable[[Tensor, Tensor], Tensor]
) -> Function:
    """A function of PyTorch's with the limits at infinity, where its own are NaN."""
    return Function(
        lambda x: torch.where(x >= FLAT, x, value(x.clamp(-FLAT, FLAT))),
        lambda dy, x: gradient(dy, x.clamp(-FLAT, FLAT)),
    )


def _normal(x: Tensor) -> Tensor:
    """The normal distribution function; PyTorch's GELU has 1 + erf, which cancels far below 0."""
    phi: Tensor = 0.5 * torch.special.erfc(x * -sqrt(0.5))
    return phi


def _erf_gradient(dy: Tensor, x: Tensor) -> Tensor:
    density = torch.exp(-0.5 * x * x) * (1 / sqrt(2 * pi))
    return dy * (_normal(x) + x * density)


def _tanh_gelu(x: Tensor) -> Tensor:
    """PyTorch's; not in fp64, which is to be exact: 1 + tanh(u) is 0 far below 0, 2 sigmoid(2u) no.

    u: `sqrt(2 / pi) * (x + 0.044715 * x^3)`.
    """
    if x.dtype != torch.float64:
        return F.gelu(x, approximate="tanh")
    return x * torch.sigmoid(x * (1 + 0.044715 * x * x) * sqrt(8 / pi))


def _tanh_gelu_gradient(dy: Tensor, x: Tensor) -> Tensor:
    if x.dtype != torch.float64:
        return aten.gelu_backward(dy, x, approximate="tanh")  # type: ignore[no-any-return]
    twice = x * (1 + 0.044715 * x * x) * sqrt(8 / pi)
    slope = x * (1 + 3 * 0.044715 * x * x) * sqrt(8 / pi)
    return dy * torch.sigmoid(twice) * (1 + torch.sigmoid(-twice) * slope)


def _gelu(approximate: str) -> Function:
    if approximate == "none":
        return _flat(lambda x: x * _normal(x), _erf_gradient)
    return _flat(_tanh_gelu, _tanh_gelu_gradient)


def _leaky_relu(slope: float) -> Function:
    return Function(
        lambda x: F.leaky_relu(x, slope),
        lambda dy, x: aten.leaky_relu_backward(dy, x, slope, False),
    )


def _between(x: Tensor, limit: float) -> Tensor:
    """x clamped. Not torch.clamp, whose gradient at a limit is 1 up to PyTorch 2.13 and 0 since."""
    return torch.where(x > limit, limit, torch.where(x < -limit, -limit, x))


def _clipped(limit: float) -> Function:
    """GELU, exact, clipped to `-limit` and limit."""
    gelu = _gelu("none")
    return Function(
        lambda x: _between(gelu.value(x), limit),
        lambda dy, x: torch.where(gelu.value(x).abs() > limit, 0, gelu.gradient(dy, x)),
    )


FUNCTIONS = {
    "gelu": _gelu("tanh"),
    "gelu_erf": _gelu("none"),
    "qgelu": _swish(1.702),
    "relu": Function(torch.relu, lambda dy, x: aten.threshold_backward(dy, x, 0)),
    "srelu": Function(lambda x: torch.relu(x).square(), _srelu_gradient),
    "gelu_fast": _gelu("tanh"),
    "silu": _flat(F.silu, aten.silu_backward.default),
    "sigmoid": Function(torch.sigmoid, lambda dy, x: dy * _sigmoid_slope(x)),
    "tanh": Function(torch.tanh, lambda dy, x: dy * _tanh_slope(x)),
    "relu6": Function(F.relu6, lambda dy, x: aten.hardtanh_backward(dy, x, 0, 6)),
    "hardswish": _flat(_hardswish, _hardswish_gradient),
    "mish": _flat(F.mish, aten.mish_backward.default),
}

OF_ONE: dict[str, Callable[[float], Function]] = {
    "leaky_relu": _leaky_relu,
    "gelu_clipped": _clipped,
}
"""Functions with a parameter."""
PLAIN = FUNCTIONS.keys() | OF_ONE.keys()

GATED = {
    "geglu": "gelu",
    "geglu_erf": "gelu_erf",
    "qgeglu": "qgelu",
    "reglu": "relu",
    "sreglu": "srelu",
    "swiglu": "silu",
    "glu": "sigmoid",
}


def _situ(beta: float) -> Function:
    def gradient(dy: Tensor, x: Tensor) -> Tensor:
        s, t = torch.sigmoid(x), torch.tanh(x / beta)
        return dy * (s * _tanh_slope(x / beta) + beta * t * _sigmoid_slope(x))

    return Function(lambda x: beta * torch.tanh(x / beta) * torch.sigmoid(x), gradient)


def _soft_clip(beta: float) -> Function:
    def gradient(dy: Tensor, x: Tensor) -> Tensor:
        return dy * _tanh_slope(x / beta)

    return Function(lambda x: beta * torch.tanh(x / beta), gradient)


def _composed(name: str, alpha: float, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function's value as transformers composes it of PyTorch's operations, in that dtype."""

    def value(x: Tensor) -> Tensor:
        wide_x, x = x, x.to(dtype)
        if name == "gelu":
            y = 0.5 * x * (1.0 + torch.tanh(sqrt(2 / pi) * (x + 0.044715 * torch.pow(x, 3.0))))
        elif name == "gelu_fast":
            y = 0.5 * x * (1.0 + torch.tanh(x * 0.7978845608 * (1.0 + 0.044715 * x * x)))
        elif name == "gelu_erf":
            y = x * 0.5 * (1.0 + torch.erf(x / sqrt(2.0)))
        else:
            y = x * torch.sigmoid(alpha * x)
        return y.to(wide_x.dtype)

    return value


COMPOSED = "gelu", "gelu_fast", "gelu_erf", "qgelu"
"""Functions, with that of clamped_swiglu, that a kind with the word "steps" may have."""


def _function(name: str, params: tuple[float, ...], steps: torch.dtype | None) -> Function:
    function = OF_ONE[name](*params) if name in OF_ONE else FUNCTIONS[name]
    return function if steps is None else function._replace(value=_composed(name, 1.702, steps))


def _clamped(
    limit: float, alpha: float, offset: float, after: bool, steps: torch.dtype | None
) -> tuple[Function, Function]:
    """Gradients are masked beyond the limit, not at it.

    So are those that autograd makes of the values, for double_backward: torch.clamp's own gradient
    at the limit is 1 up to PyTorch 2.13 and 0 since. after: the gate is clamped when it is made.
    """
    swish = _swish(alpha)
    if steps is not None:
        swish = swish._replace(value=_composed("swish", alpha, steps))

    def below(x: Tensor) -> Tensor:
        return torch.where(x > limit, limit, x)

    def gate_gradient(dy: Tensor, a: Tensor) -> Tensor:
        if after:
            return torch.where(swish.value(a) > limit, 0, swish.gradient(dy, a))
        return torch.where(a > limit, 0, swish.gradient(dy, below(a)))

    gate = Function(
        lambda a: below(swish.value(a)) if after else swish.value(below(a)), gate_gradient
    )
    line = Function(
        lambda b: torch.where(b < -limit, -limit, below(b)) + offset,
        lambda dy, b: torch.where(b.abs() > limit, 0, dy),
    )
    return gate, line


class Form(NamedTuple):
    """A kind without its words, and what they say."""

    name: str
    gated: bool = False
    """`f(a) * b` of the function with that name."""
    rounded: bool = False
    """f(a) and g(b) are rounded to x's dtype, as PyTorch's own ops store them, and so is what the
    backward multiplies with one of them."""
    second: bool = False
    """The gate a comes after the value b."""
    after: bool = False
    """f(a) is clamped, not a."""
    steps: bool = False
    """Each operation of f's formula is rounded to x's dtype; the gradient is that of f."""

    def __str__(self) -> str:
        words = [word for word in self._fields[1:] if getattr(self, word)]
        return " ".join([self.name, *words])


@constant_under_compile  # Dynamo warns of a cache that it comes to
def form_of(kind: str) -> Form:
    """What a kind says. Raises ValueError for a word that `Form` does not have."""
    return _form_of(kind)


@cache
def _form_of(kind: str) -> Form:
    name, *words = kind.split(" ")
    known = Form._fields[1:]
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"activation {kind!r}: got {unknown}, expected some of {list(known)}")
    return Form(name, **dict.fromkeys(words, True))


def gates(
    form: Form, params: tuple[float, ...], stored: torch.dtype
) -> tuple[Function, Function | None]:
    """f and g of a gated kind; g is None where it is the identity."""
    steps = stored if form.steps else None
    if form.name == "clamped_swiglu":
        limit, alpha, offset = params
        return _clamped(limit, alpha, offset, form.after, steps)
    if form.name == "situglu":
        return _situ(params[0]), _soft_clip(params[1])
    name = form.name if form.gated else GATED[form.name]
    function = _function(name, params, steps)
    if name == "gelu_erf" and form.rounded and not form.steps:
        function = function._replace(value=_flat(F.gelu, _erf_gradient).value)
    return function, None


def halves(x: Tensor, block: int | None, second: bool = False) -> tuple[Tensor, Tensor]:
    """Gate and value of `[rows, 2 * width]`: halves, or blocks of `block` columns in turns."""
    if block is None:
        a, b = x.chunk(2, -1)
    else:
        # reshape: batched gradients have no rule for unflatten and flatten.
        rows, width = x.shape[0], x.shape[1] // 2
        split = x.reshape(rows, width // block, 2, block)
        a, b = split[:, :, 0].reshape(rows, width), split[:, :, 1].reshape(rows, width)
    return (b, a) if second else (a, b)


def joined(a: Tensor, b: Tensor, block: int | None, second: bool = False) -> Tensor:
    """The inverse of `halves`."""
    if second:
        a, b = b, a
    if block is None:
        return torch.cat((a, b), -1)
    rows, width = a.shape
    blocks = rows, width // block, block
    return torch.stack((a.reshape(blocks), b.reshape(blocks)), 2).reshape(rows, 2 * width)


def _stored(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """x as it is read again from a tensor of a dtype; None: x itself."""
    return x if dtype is None or dtype == x.dtype else x.to(dtype).to(x.dtype)


def activation_forward(
    x: Tensor, kind: str, params: tuple[float, ...] = (), block: int | None = None,
    stored: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """`y = f(x)`, or `f(a) * g(b)` `[rows, width / 2]` of a gated kind, in x's dtype.

    stored: what a kind that rounds rounds to, where that is not x's dtype.
    """
    form, to = form_of(kind), stored or x.dtype
    if form.name in PLAIN and not form.gated:
        y = _function(form.name, params, to if form.steps else None).value(wide(x))
    else:
        f, g = gates(form, params, to)
        a, b = halves(wide(x), block, form.second)
        rounded = to if form.rounded else None
        y = _stored(f.value(a), rounded) * (b if g is None else _stored(g.value(b), rounded))
    return y if y.dtype == x.dtype else y.to(x.dtype)


def activation_backward(
    dy: Tensor, x: Tensor, kind: str, params: tuple[float, ...] = (), block: int | None = None
) -> Tensor:
    """`dx = dy * f'(x)`, or `(dy * g(b) * f'(a), dy * f(a) * g'(b))`, in x's dtype."""
    return activation_backward_and_y(dy, x, kind, params, block, False)[0]


def activation_backward_and_y(
    dy: Tensor, x: Tensor, kind: str, params: tuple[float, ...], block: int | None,
    want_y: bool = True, stored: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """dx, and y computed again, of a gated kind from what both need."""
    form, to = form_of(kind), stored or x.dtype
    y: Tensor | None
    if form.name in PLAIN and not form.gated:
        dx = _function(form.name, params, None).gradient(wide(dy), wide(x))
        y = activation_forward(x, kind, params, stored=to) if want_y else None
    else:
        f, g = gates(form, params, to)
        a, b = halves(wide(x), block, form.second)
        rounded = to if form.rounded else None
        line = b if g is None else _stored(g.value(b), rounded)
        gate = _stored(f.value(a), rounded)
        y = (gate * line).to(x.dtype) if want_y else None
        dy = wide(dy)
        da, db = _stored(dy * line, rounded), _stored(dy * gate, rounded)
        db = db if g is None else g.gradient(db, b)
        dx = joined(f.gradient(da, a), db, block, form.second)
    return (dx if dx.dtype == x.dtype else dx.to(x.dtype)), y
