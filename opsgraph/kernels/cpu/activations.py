"""Activations, plain and gated, forward and backward, with the bias before them.

Formulas: `kernels/reference/activations.py`, `y = f(x)` or `y = f(a) * g(b)`. Arithmetic and sums
are in fp32; the activation that a backward computes again has the forward's bits. Tensors are
`[rows, width]`, fp32 or bf16, their rows at any stride; results are contiguous.
"""

from collections.abc import Collection
from functools import lru_cache
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
    "tanh", "relu6", "hardswish", "leaky_relu", "mish", "gelu_clipped", "after", "after_any",
    "gelu_steps", "gelu_fast_steps", "gelu_erf_steps", "swish_steps", "clamped_steps",
    "after_steps",
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
    "gelu_fast": Kind("gelu", False),
    "sigmoid": Kind("sigmoid", False),
    "tanh": Kind("tanh", False),
    "relu6": Kind("relu6", False),
    "hardswish": Kind("hardswish", False),
    "mish": Kind("mish", False),
    "leaky_relu": Kind("leaky_relu", False, (0.01, 0.0, 0.0)),
    "gelu_clipped": Kind("gelu_clipped", False, (10.0, 0.0, 0.0)),
}
COUNTS = {"clamped_swiglu": 3, "situglu": 2, "leaky_relu": 1, "gelu_clipped": 1}
"""How many params a kind takes."""


class Row(NamedTuple):
    """What the kernels take of a kind."""

    function: int
    steps: int
    """The function in bf16: another where each of its steps is rounded."""
    form: reference.Form
    params: tuple[float, float, float]

    @property
    def gated(self) -> bool:
        return self.form.gated

    def width(self, total: int) -> int:
        """Of y, for an input that is `total` wide."""
        return total // 2 if self.gated else total

    def head(
        self, dtype: torch.dtype, rows: int, width: int, period: int, value: int
    ) -> tuple[int, ...]:
        """The integers of struct Activation."""
        half = dtype == torch.bfloat16
        threads, shift = torch.get_num_threads(), -value if self.form.second else value
        kind = self.steps if half else self.function, self.gated, self.form.rounded and half
        return DTYPES[dtype], *kind, threads, rows, width, period, shift


@lru_cache(maxsize=256)
def row(kind: str, params: tuple[float, ...] = ()) -> Row:
    """A kind's row of the table, with params in the place of its own. Raises ValueError."""
    form = reference.form_of(kind)
    name = form.name
    if name not in KINDS:
        raise ValueError(f"unknown activation {name!r}; known: {', '.join(KINDS)}")
    function, gated, own = KINDS[name]
    count = COUNTS.get(name, 0)
    if params and len(params) != count:
        raise ValueError(f"activation {name!r} got params {params}, expected {count} or none")
    a, b, c = (*params, *own[len(params) :])
    function = "after" if form.after and function == "clamped" else function
    plain = f"{function}_any" if function in ("clamped", "after") and not b > 0 else function
    stepped = f"{'gelu_fast' if name == 'gelu_fast' else function}_steps" if form.steps else plain
    indices = FUNCTIONS.index(plain), FUNCTIONS.index(stepped)
    form = form._replace(gated=gated or form.gated)
    return Row(*indices, form, (float(a), float(b), float(c)))


def activation_forward(
    x: Tensor, kind: str, params: tuple[float, ...] = (), interleave: int | None = None,
    bias: Tensor | None = None, pre: bool = False, y_t: Tensor | None = None,
    columns: slice | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`y = f(x + bias)`, or `f(a) * g(b)` with a, b the halves of `x + bias`; the sum is rounded.

    x: `[rows, width]`; y: `[rows, width]`, or `[rows, width / 2]` for gated kinds, of x's dtype.
    kind: a key of `KINDS`, with the words of `Form` after it. params: for clamped_swiglu (limit,
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
