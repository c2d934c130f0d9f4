"""How far a result may be from fp64: as far as the same formulas in the result's own dtype."""

from collections.abc import Callable, Sequence
from traceback import clear_frames
from typing import Any, NamedTuple

import torch
from torch import Tensor

UNITS = {torch.float64: 10**7, torch.float32: 1000, torch.float16: 16, torch.bfloat16: 16}
"""Units of a dtype's precision, of the largest element, that any result may be off by."""
LEAST = {torch.float64: 1000.0, torch.float32: 16.0, torch.float16: 4.0, torch.bfloat16: 4.0}
"""How many units of 1 each element may be off by: what cancels was of that size on the way, or of a
few times that behind norms of small values. In fp64 more, for its formulas round as well."""
RATIO = 10.0
"""How many times the error of plain formulas an error may be."""


MANY = 200
"""Results that say how a kernel rounds."""


class Answer(NamedTuple):
    """Outputs and gradients by name, None for a leaf that gets none."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor | None]


class Wrong(AssertionError):
    """A result that is not what the formulas give."""


def drop(error: BaseException | None) -> None:
    """Let go of what the frames hold that an error, and what it came of, passed through.

    In PyTorch 2.11 hooks for saved tensors are among it, of a checkpoint whose function raised: as
    long as they are held, other backwards raise its error. An error held by a frame of contextlib's
    in Python 3.12 is such a case.
    """
    while error is not None:
        clear_frames(error.__traceback__)
        error = error.__context__


def check(
    what: str,
    found: Tensor | None,
    exact: Tensor | None,
    dtype: torch.dtype,
    plain: Callable[[], Tensor | None],
    terms: int = 1,
) -> None:
    """Compare a value with the fp64 one.

    dtype: in which it was computed. plain: gives it by the same formulas in that dtype; asked only
    where the value is further off than a few units. terms: how many are added up in each element,
    as rows are in a parameter's gradient; their errors add up as those of chance do. Raises Wrong
    with the error that came and the one allowed. A gradient of None has to be None.
    """
    if found is None or exact is None:
        if found is not exact:
            raise Wrong(f"{what}: got {_kind(found)}, expected {_kind(exact)}")
        return
    if found.shape != exact.shape:
        raise Wrong(f"{what}: got shape {tuple(found.shape)}, expected {tuple(exact.shape)}")
    if not found.numel():
        return
    error, size = (found.double() - exact).norm(), exact.norm()
    least = LEAST[dtype] * (terms * found.numel()) ** 0.5
    allowed = torch.finfo(dtype).eps * (float(UNITS[dtype] * size) + least)
    if error <= allowed:
        return
    if (other := plain()) is not None:
        if not other.isfinite().all():
            return  # formulas in this dtype overflow as well
        off = float((other.double() - exact).norm())
        if off > size:
            return  # what cancels is lost to formulas in this dtype
        allowed += RATIO * off
    if exact.abs().max() > torch.finfo(found.dtype).max / 16:
        return
    if not error <= allowed:  # a NaN is wrong too
        raise Wrong(f"{what}: off by {error:.3g} of {size:.3g}, allowed {allowed:.3g}")


def check_rounding(what: str, found: Tensor, exact: Tensor) -> None:
    """Of many results of 16 bits that are the nearest number, or the next, as many are above.

    Raises Wrong if most are rounded towards 0.
    """
    value = exact.unique()
    value = value[value.isfinite() & (value.abs() > torch.finfo(found.dtype).tiny)]
    if value.numel() < MANY:
        return
    unit = exact.abs().clamp_min(torch.finfo(found.dtype).tiny).log2().floor().exp2()
    off = (found.double().abs() - exact.abs()) / (unit * torch.finfo(found.dtype).eps)
    near = off[(off.abs() <= 1) & (exact != 0)]
    if near.numel() >= MANY and near.mean() < -0.35:
        raise Wrong(f"{what}: rounded towards 0, by {-near.mean():.2g} units each")


def worse(exact: Answer, one: Answer, other: Answer) -> Answer:
    """Of two answers, for each value, the one further from the exact one."""

    def further(value: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if value is None or a is None or b is None:
            return a
        if not a.isfinite().all():
            return a
        closer = (b.double() - value).norm() <= (a.double() - value).norm()  # not if it is NaN
        return a if closer else b.to(a.dtype)

    outputs: Sequence[Any] = list(map(further, exact.outputs, one.outputs, other.outputs))
    gradients = {
        name: further(value, one.gradients[name], other.gradients[name])
        for name, value in exact.gradients.items()
    }
    return Answer(list(outputs), gradients)


def anything(answer: Answer) -> Answer:
    """An answer with which any other of the same shapes agrees."""

    def endless(value: Tensor | None) -> Tensor | None:
        return None if value is None else torch.full_like(value, float("inf"))

    return Answer([torch.full_like(y, float("inf")) for y in answer.outputs],
                  {name: endless(g) for name, g in answer.gradients.items()})  # fmt: skip


def _kind(value: Tensor | None) -> str:
    return "None" if value is None else f"a tensor {tuple(value.shape)}"
