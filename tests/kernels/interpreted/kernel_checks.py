"""What the kernel tests share: inputs in every layout, and comparison with fp64."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCES = {  # rtol, atol
    torch.float32: (1.3e-6, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.bfloat16: (1.6e-2, 1e-5),
}


def close(actual: Tensor, expected: Tensor, magnitude: Tensor | float = 0.0) -> None:
    """Compares with an fp64 result, by the tolerance of actual's dtype.

    magnitude: of the fp32 terms that actual is a sum of. Where they cancel, the sum keeps their
    rounding errors, of which a few units in their last place are granted on top of atol.
    """
    assert actual.shape == expected.shape
    rtol, atol = TOLERANCES[actual.dtype]
    largest = torch.as_tensor(magnitude, dtype=torch.float64).abs().amax().item()
    atol += 4 * torch.finfo(torch.float32).eps * largest
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=rtol, atol=atol)


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


LAYOUTS = ["contiguous", "strided", "offset", "transposed", "expanded", "scalar"]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of x's shape in that layout; of x's values too, unless expanded from fewer."""
    rows, width = x.shape
    if layout in ("strided", "offset"):
        # Rows 8 elements apart keep the kernels' 16-byte alignment, a start at element 1 breaks it.
        start = 8 if layout == "strided" else 1
        stride = (width + 15) // 8 * 8 + 8
        wide = torch.full((rows, stride), float("nan"), dtype=x.dtype, device=x.device)
        wide[:, start : start + width] = x
        return wide[:, start : start + width]
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "expanded":
        return x[:1].expand(rows, width)
    if layout == "scalar":  # the gradient that `out.sum().backward()` gives
        return x[:1, :1].expand(rows, width)
    return x


def bits(x: Tensor) -> Tensor:
    """The bytes of x, for comparisons in which a NaN equals itself."""
    return x.contiguous().flatten().view(torch.uint8)


def twice(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """function's results; they repeat bit for bit, and function writes to none of its arguments."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    before = [t.clone() for t in tensors]
    first, second = function(*args, **kwargs), function(*args, **kwargs)
    for a, b in zip(tree_leaves(first), tree_leaves(second), strict=True):
        assert (a is None and b is None) or torch.equal(bits(a), bits(b))
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(tensors, before, strict=True))
    return first
