"""Activations, plain and gated, forward and backward, with the bias before them.

Formulas: `kernels/reference/activations.py`, `y = f(x)` or `y = f(a) * g(b)`. Arithmetic and sums
are in fp32; the activation that a backward computes again has the forward's bits. Tensors are
`[rows, width]`, fp32 or bf16, their rows at any stride; results are contiguous.
"""

from collections.abc import Collection
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference import activations as reference
from .launch import DTYPES, Kernel, address, direct, floats, lines, rows_of
from .memory import empty

FIELDS = "9q 3P 2q 4P P 3d"  # struct Activation in source/activations.h
_forward_kernel = Kernel("opsgraph_activation_forward", FIELDS, "activations")
_backward_kernel = Kernel("opsgraph_activation_backward", FIELDS, "activations")
FUNCTIONS = (
    "swish", "gelu", "gelu_erf", "relu", "srelu", "sigmoid", "clamped", "situ", "clamped_any",
)  # fmt: skip
"""The functions f, with their g, in the order of `kinds` in source/activations.h."""


class Kind(NamedTuple):
    """A function, whether it gates, and its three constants."""

    function: str
    gated: bool
    params: tuple[float, float, float] = (1.0, 0.0, 0.0)


KINDS = {
    "gelu": Kind("gelu", False),
    "gelu_erf": Kind("gelu_erf", False),
    "qgelu": Kind("swish", False, (1.702, 0.0, 0.0)),
    "relu": Kind("relu", False),
    "srelu": Kind("srelu", False),
    "silu": Kind("swish", False),
    "geglu": Kind("gelu", True),
    "geglu_erf": Kind("gelu_erf", True),
    "qgeglu": Kind("swish", True, (1.702, 0.0, 0.0)),
    "reglu": Kind("relu", True),
    "sreglu": Kind("srelu", True),
    "swiglu": Kind("swish", True),
    "glu": Kind("sigmoid", True),
    "clamped_swiglu": Kind("clamped", True, (7.0, 1.702, 1.0)),
    "situglu": Kind("situ", True, (4.0, 25.0, 0.0)),
}


class Row(NamedTuple):
    """What the kernels take of a kind."""

    function: int
    gated: bool
    rounded: bool
    second: bool
    params: tuple[float, float, float]

    def width(self, total: int) -> int:
        """Of y, for an input that is `total` wide."""
        return total // 2 if self.gated else total

    def head(
        self, dtype: torch.dtype, rows: int, width: int, period: int, value: int
    ) -> tuple[int, ...]:
        """The integers of struct Activation."""
        rounded = self.rounded and dtype == torch.bfloat16
        threads, shift = torch.get_num_threads(), -value if self.second else value
        kind = DTYPES[dtype], self.function, self.gated, rounded
        return *kind, threads, rows, width, period, shift


@cache
def row(kind: str, params: tuple[float, ...] = ()) -> Row:
    """A kind's row of the table, with params in the place of its own. Raises ValueError."""
    name, rounded, second = reference.gate_of(kind)
    if name not in KINDS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(KINDS)}")
    function, gated, own = KINDS[name]
    count = {"clamped": 3, "situ": 2}.get(function, 0)
    if params and len(params) != count:
        raise ValueError(f"activation {name!r} got params {params}, expected {count} or none")
    a, b, c = (*params, *own[len(params) :])
    if function == "clamped" and not b > 0:
        function = "clamped_any"
    index, constants = FUNCTIONS.index(function), (float(a), float(b), float(c))
    return Row(index, gated, rounded, second, constants)


def activation_forward(
    x: Tensor, kind: str, params: tuple[float, ...] = (), interleave: int | None = None,
    bias: Tensor | None = None, pre: bool = False, y_t: Tensor | None = None,
    columns: slice | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`y = f(x + bias)`, or `f(a) * g(b)` with a, b the halves of `x + bias`; the sum is rounded.

    x: `[rows, width]`; y: `[rows, width]`, or `[rows, width / 2]` for gated kinds, of x's dtype.
    kind: a key of `KINDS`, with the words of `Gate` after it. params: for clamped_swiglu (limit,
    alpha, offset), for situglu (beta1, beta2). interleave: gate and value alternate in blocks of
    `interleave` columns. bias: `[width]`. columns: the range of y's columns to compute, without a
    bias; from and to multiples of interleave. y_t: `[width of y, rows]`, gets the transpose of y,
    which then is a view of it.
    Returns (y, x + bias if pre and there is a bias, else None).
    Raises ValueError for an unknown kind, or params that it does not take.
    """
    if not direct(x, bias):
        return _forward_by_formula(x, kind, params, interleave, bias, pre, y_t, columns)
    made = row(kind, params)
    dtype, (rows, total) = x.dtype, x.shape
    width = made.width(total)
    value = interleave or width
    if columns is not None:
        width = columns.stop - columns.start
    y = empty((rows, width), dtype) if y_t is None else y_t.t()
    sums = empty((rows, total), dtype) if pre and bias is not None else None
    if not rows or not width:
        return y, sums
    x, stride = lines(x)
    if columns is not None:
        x = x[:, columns.start * (2 if made.gated and interleave else 1) :]
    bias = floats(bias, total)
    _forward_kernel(
        *made.head(dtype, rows, width, interleave or width, value), x.data_ptr(), 0,
        address(bias), stride, 0, 0 if y_t is not None else y.data_ptr(), address(y_t),
        address(sums), 0, 0, *made.params,
    )  # fmt: skip
    return y, sums


def activation_backward(
    dy: Tensor, x: Tensor, kind: str, params: tuple[float, ...] = (),
    interleave: int | None = None, want: Collection[str] = ("x",),
    bias_dtype: torch.dtype = torch.float32, out: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradient of `activation_forward` by its input, in one pass over dy and x.

    x: the pre-activation (bias included). Returns (dx like x, y, dbias), None for what is not in
    want ("x", "y", "bias"): y is the activation, computed again; dbias `[width of x]` is the column
    sum of the unrounded dx in fp32, in an order that depends on the number of rows alone, then cast
    to bias_dtype. out: contiguous, gets dx; it may be x itself or, of a plain kind, dy.
    """
    if not direct(dy, x):
        return _backward_by_formula(dy, x, kind, params, interleave, want, bias_dtype, out)
    made = row(kind, params)
    dtype, (rows, total) = x.dtype, x.shape
    width = made.width(total)
    dx = None
    if "x" in want:
        dx = empty((rows, total), dtype) if out is None else out
    y = empty((rows, width), dtype) if "y" in want else None
    dbias = empty((total,), torch.float32) if "bias" in want else None
    if rows and width:
        dy, dy_stride = rows_of(dy, (rows, width), dtype)
        x, stride = lines(x)
        block = interleave or width
        _backward_kernel(
            *made.head(dtype, rows, width, block, block), x.data_ptr(), dy.data_ptr(), 0, stride,
            dy_stride, address(y), 0, 0, address(dx), address(dbias), *made.params,
        )  # fmt: skip
    elif dbias is not None:
        dbias.zero_()
    if dbias is not None and bias_dtype != torch.float32:
        dbias = dbias.to(bias_dtype)
    return dx, y, dbias


def _forward_by_formula(
    x: Tensor, kind: str, params: tuple[float, ...], interleave: int | None, bias: Tensor | None,
    pre: bool, y_t: Tensor | None, columns: slice | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    x = x if bias is None else x + bias.to(x.dtype)
    y = reference.activation_forward(x, kind, params, interleave)
    y = y if columns is None else y[:, columns]
    y = y if y_t is None else y_t.copy_(y.t()).t()
    return y, x if pre and bias is not None else None


def _backward_by_formula(
    dy: Tensor, x: Tensor, kind: str, params: tuple[float, ...], interleave: int | None,
    want: Collection[str], bias_dtype: torch.dtype, out: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    dx, y = reference.activation_backward_and_y(dy, x, kind, params, interleave, "y" in want)
    dbias = dx.sum(0, dtype=torch.float32).to(bias_dtype) if "bias" in want else None
    dx = dx if out is None else out.copy_(dx)
    return dx if "x" in want else None, y, dbias
