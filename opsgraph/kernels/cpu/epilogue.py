"""A linear and the activation after it, where nobody wants the value between them.

oneDNN applies a function to a product's fp32 sums before they are rounded and stored, or multiplies
them by another tensor. So a gated activation is two products of half the width, `f(x @ A.T)` and
`(x @ B.T) * that`, and no pass over the pre-activation is left, nor that value itself. Whether this
is faster than a product and a pass is measured for each class of products (`choices`); small ones,
and those of few rows, go the second way.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial

import torch
from torch import Tensor

from . import activations, gemm
from .launch import direct
from .memory import pool

EPILOGUES = {
    "swish": ("swish", ""),
    "gelu": ("gelu", "tanh"),
    "sigmoid": ("sigmoid", ""),
}
"""The library's functions that are ours, of `activations.FUNCTIONS`: its name and its algorithm.

Its relu is none: it makes 0 of NaN. Nor is its gelu by erf, which makes NaN of infinity.
"""

_chosen: dict[tuple[object, ...], bool] = {}


def linear_activation(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, params: tuple[float, ...] = (),
    interleave: int | None = None,
) -> Tensor:  # fmt: skip
    """`activation_forward` of `x @ weight.T + bias`, `[rows, out]`, or `[rows, out / 2]` if gated.

    x: `[rows, in]`; weight: `[out, in]`; bias: `[out]` or None, all of one dtype; kind, params and
    interleave as there. Sums are fp32; in the epilogue only the gate and the result are rounded.
    """
    if interleave is None and _in_epilogue(x, weight, bias, kind):
        return _by_epilogue(x, weight, bias, kind)
    return _by_pass(x, weight, bias, kind, params, interleave)


def _by_pass(
    x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, params: tuple[float, ...] = (),
    interleave: int | None = None,
) -> Tensor:  # fmt: skip
    pre = gemm.linear(x, weight, bias)
    return activations.activation_forward(pre, kind, params, interleave)[0]


def _by_epilogue(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    function, gated, _ = activations.KINDS[kind]
    name, algorithm = EPILOGUES[function]
    linear = torch.ops.mkldnn._linear_pointwise
    x, weight, bias = (
        x.contiguous(),
        weight.contiguous(),
        bias if bias is None else bias.contiguous(),
    )
    if not gated:
        return linear(x, weight, bias, name, [], algorithm)  # type: ignore[no-any-return]
    (a, b), (c, d) = weight.chunk(2), (None, None) if bias is None else bias.chunk(2)
    gate = linear(x, a, c, name, [], algorithm)
    return linear.binary(x, gate, b, d, "mul")  # type: ignore[no-any-return]


@cache
def _known(kind: str) -> bool:
    """Whether the library has a kind's function, with the constant that it has there."""
    function, _, params = activations.KINDS[kind]
    return function in EPILOGUES and params[0] == 1.0


def _in_epilogue(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> bool:
    """Whether to compute a product's activation so. Measured at a class's first use."""
    (rows, depth), width = x.shape, weight.shape[0]
    if gemm.small(rows, width, depth) or not _known(kind) or not direct(x, weight, bias):
        return False
    if not gemm.onednn(x.dtype):
        return False
    key = kind, gemm.class_of(rows), width, depth, x.dtype, bias is not None
    threads = torch.get_num_threads()
    if (key, threads) not in _chosen:
        gemm.layout_of(gemm.FORWARD, x, width, depth, bias is not None)  # not while measuring
        sizes = f"{key[1]} {width} {depth} {str(x.dtype).removeprefix('torch.')}"
        text = f"{kind}{' bias' * key[-1]} {sizes} threads {threads}"
        made = gemm.choices.choose(text, partial(_candidates, *key))
        _chosen[key, threads] = made == "epilogue"
        pool.release()  # of what was measured with
    return _chosen[key, threads]


def _candidates(
    kind: str, rows: int, width: int, depth: int, dtype: torch.dtype, bias: bool
) -> Mapping[str, Callable[[], object]]:
    """Both ways, over operands made when the first of them runs.

    The epilogue is the usual one: it holds less memory, so it needs not be the faster.
    """

    @cache
    def operands() -> tuple[Tensor, Tensor, Tensor | None]:
        sizes = (rows, depth), (width, depth), (width,)
        x, weight, added = (torch.full(s, 0.5, dtype=dtype, device="cpu") for s in sizes)
        return x, weight, added if bias else None

    return {
        "epilogue": lambda: _by_epilogue(*operands(), kind),
        "pass": lambda: _by_pass(*operands(), kind),
    }
