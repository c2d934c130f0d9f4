"""Values at the edge of what floats hold, and what activations and norms make of them, in fp64."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from opsgraph.testing.formulas import clamp

INF, NAN = math.inf, math.nan
SIZES = (
    0.0,
    1e-40,
    1.0,
    7.0,
    9.0,
    10.05,
    13.3,
    20.0,
    88.0,
    100.0,
    1e4,
    65504.0,
    1.9e19,
    1e20,
    3e38,
)
GATES = (*SIZES, *(-size for size in SIZES), INF, -INF, NAN)
OTHERS = (1.5, INF, -INF, NAN, 0.0, 3e38)


def _qgelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": _gelu, "gelu_erf": F.gelu, "qgelu": _qgelu, "silu": F.silu, "geglu": _gelu,
    "geglu_erf": F.gelu, "qgeglu": _qgelu, "swiglu": F.silu,
}  # fmt: skip
"""Functions that go to 0 at -inf and to x at inf; of a gated kind, that of the gate."""


def _clamped_swiglu(a: Tensor, b: Tensor) -> Tensor:
    return _qgelu(clamp(a, -INF, 7)) * (clamp(b, -7, 7) + 1)


MASKED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "relu": lambda a, b: torch.relu(a),
    "srelu": lambda a, b: torch.relu(a).square(),
    "reglu": lambda a, b: torch.relu(a) * b,
    "sreglu": lambda a, b: torch.relu(a).square() * b,
    "clamped_swiglu": _clamped_swiglu,
}
"""Kinds whose gradient is 0 somewhere, whatever it is multiplied with, as in plain PyTorch."""


def smooth_limits(kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x `[n, 1]` of the dtype, f(x) and f'(x) in fp64, by their limits where x is far out."""
    x = torch.tensor(GATES).to(dtype)[:, None]
    wide = x.double()
    near = wide.clamp(-1e4, 1e4).requires_grad_()
    value = SMOOTH[kind](near)
    (slope,) = torch.autograd.grad(value.sum(), near)
    return x, torch.where(wide > 1e4, wide, value.detach()), slope


def masked_cases(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """dy, a, b: every combination of edges, fp32 `[n, 1]`."""
    cases = torch.tensor([(dy, a, b) for dy in OTHERS for a in GATES for b in OTHERS])
    return tuple(cases[:, i : i + 1] for i in range(3))  # type: ignore[return-value]


def masked_gradients(kind: str, dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y, da, db of plain PyTorch in fp32; db is 0 of a kind that is not gated."""
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    y = MASKED[kind](a, b)
    da, db = torch.autograd.grad(y, (a, b), dy, allow_unused=True)
    return y.detach(), da, torch.zeros_like(b) if db is None else db


def no_worse(found: Tensor, expected: Tensor) -> bool:
    """Equal, but for anything of ours where PyTorch has NaN, and a number where it overflows."""
    same = torch.isclose(found, expected, rtol=1e-4, atol=1e-6, equal_nan=True)
    return bool((same | expected.isnan() | (expected.isinf() & found.isfinite())).all())


def norm_rows(width: int) -> dict[str, Tensor]:
    """Rows `[2, width]` in fp32 whose norm is easy to get wrong."""
    signs = torch.tensor([1.0, -1.0]).repeat(width)[: 2 * width].view(2, width)
    noise = torch.randn(2, width)
    return {
        "zero": torch.zeros(2, width), "tiny": torch.full((2, width), 1e-40),
        "equal": torch.full((2, width), 3.3), "equal, 5e4": torch.full((2, width), 5e4),
        "equal, 1e6": torch.full((2, width), 1e6), "equal, 1e9": torch.full((2, width), 1.2345e9),
        "equal, 3e38": torch.full((2, width), 3e38), "signs": 3.3 * signs,
        "nearly equal": 1000 + 0.3 * signs, "huge": 3e19 * noise, "huge signs": 3e38 * signs,
    }  # fmt: skip


def norm64(x: Tensor, dy: Tensor, weight: Tensor, center: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx and dweight, eps 1e-5."""
    wide, factor = x.double().requires_grad_(), weight.double().requires_grad_()
    h = wide - wide.mean(1, keepdim=True) if center else wide
    y = h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-5) * factor
    dx, dweight = torch.autograd.grad(y, (wide, factor), dy.double())
    return y.detach(), dx, dweight
