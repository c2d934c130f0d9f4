"""xIELU and its gradients, each in one pass. Formulas: `kernels/reference/xielu.py`.

Tensors are `[rows, width]`, fp32 or bf16, their rows at any stride; results are contiguous.
"""

from collections.abc import Collection

import torch
from torch import Tensor

from ..reference import xielu as reference
from .launch import DTYPES, Kernel, address, direct, floats, lines, rows_of
from .memory import empty

_FIELDS = "4q 2P 2P 2q 2P 2P 2d"  # struct Xielu in source/xielu.h
_forward_kernel = Kernel("opsgraph_xielu_forward", _FIELDS, "xielu")
_backward_kernel = Kernel("opsgraph_xielu_backward", _FIELDS, "xielu")


def xielu_forward(x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float) -> Tensor:
    """y of x's dtype; alpha_p, alpha_n: `[1]`, of any float dtypes."""
    if not direct(x, alpha_p, alpha_n) or x.dtype not in DTYPES:
        return reference.xielu_forward(x, alpha_p, alpha_n, beta, eps)
    rows, width = x.shape
    y = empty((rows, width), x.dtype)
    if y.numel():
        x, stride = lines(x)
        p, n = floats(alpha_p, 1), floats(alpha_n, 1)
        _forward_kernel(
            DTYPES[x.dtype], torch.get_num_threads(), rows, width, x.data_ptr(), 0, address(p),
            address(n), stride, 0, y.data_ptr(), 0, 0, 0, beta, eps,
        )  # fmt: skip
    return y


def xielu_backward(
    dy: Tensor, x: Tensor, alpha_p: Tensor, alpha_n: Tensor, beta: float, eps: float,
    want: Collection[str] = ("x", "alpha_p", "alpha_n"),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dx and the sums dalpha_p, dalpha_n, each of its tensor's dtype; both sums or none."""
    if not direct(dy, x, alpha_p, alpha_n) or x.dtype not in DTYPES:
        return reference.xielu_backward(dy, x, alpha_p, alpha_n, beta, eps, want)
    rows, width = x.shape
    dx = empty((rows, width), x.dtype) if "x" in want else None
    above = below = None
    if {"alpha_p", "alpha_n"}.intersection(want):
        above, below = empty((1,), torch.float32), empty((1,), torch.float32)
    if rows and width:
        x, stride = lines(x)
        dy, dy_stride = rows_of(dy, (rows, width), x.dtype)
        p, n = floats(alpha_p, 1), floats(alpha_n, 1)
        _backward_kernel(
            DTYPES[x.dtype], torch.get_num_threads(), rows, width, x.data_ptr(), dy.data_ptr(),
            address(p), address(n), stride, dy_stride, 0, address(dx), address(above),
            address(below), beta, eps,
        )  # fmt: skip
    elif above is not None and below is not None:
        above.zero_(), below.zero_()
    if above is None or below is None:
        return dx, None, None
    return dx, above.to(alpha_p.dtype), below.to(alpha_n.dtype)
