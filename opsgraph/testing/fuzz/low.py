"""Formulas with products in FP8, with PyTorch's norms, or whose results are off by a rounding: how
far results may be from fp64.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ... import ops
from ...ops.activations import AnyActivation
from .. import formulas

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


SHARES = (1.0, 0.5, None)
"""Of a value's amax, what its scale is made of: all of it; less, as a scale from earlier calls may
be; or a scale of 1, as at a start."""


def cast(x: Tensor, dtype: torch.dtype, share: float | None) -> Tensor:
    """x rounded to FP8, by a scale that brings a share of its largest value to the format's."""
    amax, largest = float(x.abs().max()) if x.numel() else 0.0, LARGEST[dtype]
    scale = largest / (amax * share) if share and amax else 1.0
    return ((x * scale).clamp(-largest, largest).to(dtype).to(x.dtype) / scale).to(x.dtype)


class Product(torch.autograd.Function):
    """`x @ w.T` of values in E4M3; its gradients from one in E5M2, or of values as they were."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, share: float | None, exact: bool, ways: Any) -> Any:
        """x: [..., in]; w: [out, in]. ways: in which direction each result is off; or None."""
        low = [cast(value, torch.float8_e4m3fn, share) for value in (x, w)]
        ctx.save_for_backward(*((x, w) if exact else low))
        ctx.share, ctx.exact = share, exact
        y = low[0] @ low[1].T
        if ways is None or not y.numel():
            return y
        return y + (y - x @ w.T).abs().max() * ways(y)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> Any:
        """dy: [..., out]."""
        x, w = ctx.saved_tensors
        dy = dys[0] if ctx.exact else cast(dys[0], torch.float8_e5m2, ctx.share)
        return dy @ w, dy.flatten(0, -2).T @ x.flatten(0, -2), None, None, None


@contextmanager
def in_low_precision(
    share: float | None, exact: bool = False, way: int | None = None
) -> Iterator[None]:
    """Let the formulas' Linear multiply in FP8; share: see `SHARES`; exact: not in the backward.

    There gradients of other values than the forward's meet, and what should cancel does not. way:
    1 or -1, each result of a product is also off by the largest error of all, up or down by chance,
    with -1 the other way. So each value that may be on the other side of a bend is so in one of the
    two: alone it may have all of a gradient.
    """
    generator = torch.Generator().manual_seed(0)

    def ways(y: Tensor) -> Tensor:
        up = torch.randint(2, y.shape, generator=generator).to(y.device, y.dtype) * 2 - 1
        return up if way == 1 else -up

    def linear(op: Any, x: Tensor, get: Any) -> Tensor:
        given = x, get("weight"), share, exact, None if way is None else ways
        y: Tensor = Product.apply(*given)  # type: ignore[no-untyped-call]
        bias = get("bias")
        return y if bias is None else y + bias

    def transposed(op: Any, x: Tensor, get: Any) -> Tensor:
        return linear(op, x, formulas.turned(get))

    table = {ops.Linear: linear, ops.BasicLinear: linear, ops.TransposedLinear: transposed}
    with mock.patch.dict(formulas.FORMULAS, table):
        yield


BANDS: tuple[type[Any], ...] = (
    ops.ClippedGELU, ops.ReLU6, ops.Sigmoid, ops.Tanh, ops.GLU, ops.ClampedSwiGLU, ops.SiTUGLU,
    ops.Gated,
)  # fmt: skip
"""Functions that are level on both sides of a band: of large values few have a gradient."""


@contextmanager
def with_inputs_of_bands(seen: list[Tensor]) -> Iterator[None]:
    """Note what goes into each of `BANDS`, in turn."""

    def noting(formula: Any) -> Any:
        def noted(op: Any, x: Tensor, get: Any) -> Any:
            seen.append(x.detach().double())
            return formula(op, x, get)

        return noted

    with mock.patch.dict(
        formulas.FORMULAS, {kind: noting(formulas.FORMULAS[kind]) for kind in BANDS}
    ):
        yield


def _layernorm(op: Any, x: Tensor, get: Any) -> Tensor:
    y = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=op.eps)
    return formulas.affine(op, y, get)


@contextmanager
def with_norms_of_pytorch() -> Iterator[None]:
    """Let LayerNorm be PyTorch's: in its gradient other terms cancel than in that of a formula."""
    table = mock.patch.dict(formulas.FORMULAS, {ops.LayerNorm: _layernorm})
    with table, mock.patch.object(formulas, "layernorm", _layernorm):  # LayerNormMLP's
        yield


@contextmanager
def with_activations_rounded_once(dtype: torch.dtype) -> Iterator[None]:
    """Let each activation be computed in fp64 and rounded to a dtype at its end, as kernels do.

    Of many in a row each may then lose a whole unit where its formula lost a part of one, or none.
    """

    def rounded(formula: Any) -> Any:
        def once(op: Any, x: Tensor, get: Any) -> Tensor:
            y: Tensor = formula(op, x.double(), get)
            return y.to(dtype)

        return once

    kinds = [kind for kind in formulas.FORMULAS if issubclass(kind, AnyActivation)]
    with mock.patch.dict(formulas.FORMULAS, {k: rounded(formulas.FORMULAS[k]) for k in kinds}):
        yield


@contextmanager
def with_roundings(dtype: torch.dtype, seed: int) -> Iterator[None]:
    """Let each result of a formula be off by up to half a unit of a dtype, as rounded it may be.

    Kernels of several ops round elsewhere than formulas do, and a function behind such a value,
    as a sine of thousands, may have another result for each of its neighbours.
    """
    generator = torch.Generator().manual_seed(seed)

    def rounded(formula: Any) -> Any:
        def off(op: Any, x: Tensor, get: Any) -> Tensor:
            y: Tensor = formula(op, x, get)
            way = torch.rand(y.shape, generator=generator, dtype=torch.float64).to(y.device) - 0.5
            return (y.double() * (1 + way * torch.finfo(dtype).eps)).to(y.dtype)

        return off

    table = {kind: rounded(formula) for kind, formula in formulas.FORMULAS.items()}
    with mock.patch.dict(formulas.FORMULAS, table):
        yield
