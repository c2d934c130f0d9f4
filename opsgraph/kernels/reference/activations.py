"""Activations, plain (`y = f(x)`) and gated (`y = f(a) * g(b)`, a and b the halves of the columns).

`FUNCTIONS` holds f with its derivative as `gradient(dy, x) = dy * f'(x)`; `GATED` says which f a
gated kind uses. g is the identity but for clamped_swiglu, `clamp(b, -limit, limit) + offset`, and
situglu, `beta2 * tanh(b / beta2)`.

A gated kind is a name and, after spaces, the words of `Gate` that say what is other than usual:
`"swiglu rounded"`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

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
        s = torch.sigmoid(alpha * x)
        return dy * (s + _vanishing(s * (1 - s), alpha * x))

    return Function(lambda x: _vanishing(torch.sigmoid(alpha * x), x), gradient)


def _sigmoid_gradient(dy: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(x)
    return dy * s * (1 - s)


def _srelu_gradient(dy: Tensor, x: Tensor) -> Tensor:
    return aten.threshold_backward(dy * (2 * torch.relu(x)), x, 0)  # type: ignore[no-any-return]


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


def _gelu(approximate: str) -> Function:
    return _flat(
        partial(F.gelu, approximate=approximate),
        partial(aten.gelu_backward.default, approximate=approximate),
    )


FUNCTIONS = {
    "gelu": _gelu("tanh"),
    "gelu_erf": _gelu("none"),
    "qgelu": _swish(1.702),
    "relu": Function(torch.relu, lambda dy, x: aten.threshold_backward(dy, x, 0)),
    "srelu": Function(lambda x: torch.relu(x).square(), _srelu_gradient),
    "silu": _flat(F.silu, aten.silu_backward.default),
    "sigmoid": Function(torch.sigmoid, _sigmoid_gradient),
}

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
        return dy * (s * (1 - t * t) + beta * t * s * (1 - s))

    return Function(lambda x: beta * torch.tanh(x / beta) * torch.sigmoid(x), gradient)


def _soft_clip(beta: float) -> Function:
    def gradient(dy: Tensor, x: Tensor) -> Tensor:
        t = torch.tanh(x / beta)
        return dy * (1 - t * t)

    return Function(lambda x: beta * torch.tanh(x / beta), gradient)


def _clamped(limit: float, alpha: float, offset: float) -> tuple[Function, Function]:
    """Gradients are masked beyond the limit, not at it.

    So are those that autograd makes of the values, for double_backward: torch.clamp's own gradient
    at the limit is 1 up to PyTorch 2.13 and 0 since.
    """
    swish = _swish(alpha)

    def below(x: Tensor) -> Tensor:
        return torch.where(x > limit, limit, x)

    def gate_gradient(dy: Tensor, a: Tensor) -> Tensor:
        return torch.where(a > limit, 0, swish.gradient(dy, below(a)))

    gate = Function(lambda a: swish.value(below(a)), gate_gradient)
    line = Function(
        lambda b: torch.where(b < -limit, -limit, below(b)) + offset,
        lambda dy, b: torch.where(b.abs() > limit, 0, dy),
    )
    return gate, line


class Gate(NamedTuple):
    """A gated kind without its words, and what they say."""

    name: str
    rounded: bool = False
    """f(a) and g(b) are rounded to x's dtype, as PyTorch's own ops store them, and so is what the
    backward multiplies with one of them."""
    second: bool = False
    """The gate a comes after the value b."""

    def __str__(self) -> str:
        words = [word for word in self._fields[1:] if getattr(self, word)]
        return " ".join([self.name, *words])


@cache
def gate_of(kind: str) -> Gate:
    """What a kind says. Raises ValueError for a word that `Gate` does not have."""
    name, *words = kind.split(" ")
    known = Gate._fields[1:]
    if unknown := [word for word in words if word not in known]:
        raise ValueError(f"activation {kind!r}: got {unknown}, expected some of {list(known)}")
    return Gate(name, **dict.fromkeys(words, True))


def gates(kind: str, params: tuple[float, ...]) -> tuple[Function, Function | None]:
    """f and g of a gated kind; g is None where it is the identity."""
    if kind == "clamped_swiglu":
        return _clamped(*params)
    if kind == "situglu":
        return _situ(params[0]), _soft_clip(params[1])
    return FUNCTIONS[GATED[kind]], None


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
    if kind in FUNCTIONS:
        y = FUNCTIONS[kind].value(wide(x))
    else:
        name, rounded, second = gate_of(kind)
        f, g = gates(name, params)
        a, b = halves(wide(x), block, second)
        to = stored or x.dtype if rounded else None
        y = _stored(f.value(a), to) * (b if g is None else _stored(g.value(b), to))
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
    y: Tensor | None
    if kind in FUNCTIONS:
        dx = FUNCTIONS[kind].gradient(wide(dy), wide(x))
        y = activation_forward(x, kind) if want_y else None
    else:
        name, rounded, second = gate_of(kind)
        f, g = gates(name, params)
        a, b = halves(wide(x), block, second)
        to = stored or x.dtype if rounded else None
        line = b if g is None else _stored(g.value(b), to)
        gate = _stored(f.value(a), to)
        y = (gate * line).to(x.dtype) if want_y else None
        dy = wide(dy)
        da, db = _stored(dy * line, to), _stored(dy * gate, to)
        dx = joined(f.gradient(da, a), db if g is None else g.gradient(db, b), block, second)
    return (dx if dx.dtype == x.dtype else dx.to(x.dtype)), y
