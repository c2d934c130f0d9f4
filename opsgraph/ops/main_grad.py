"""The main_grad protocol: weight gradients accumulated into a buffer that an optimizer owns.

The buffer is the parameter's attribute `main_grad`, of any dtype; the attribute
`overwrite_main_grad=True` has it overwritten. A parameter with the attribute
`grad_added_to_main_grad` has it set to True and gets a dummy gradient from autograd, zeros if it
has `zero_out_wgrad`; any other gets none.
"""

import torch
from torch import Tensor

from ..errors import OpsgraphError


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """`a @ b` in a dtype, without rounding to the operands' first."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return a.to(dtype) @ b.to(dtype)


def accumulate(a: Tensor, b: Tensor, weight: Tensor, overwrite: bool) -> Tensor | None:
    """Add `a @ b` to `weight.main_grad`; returns what autograd is given.

    Raises OpsgraphError if the weight has no main_grad of its shape.
    """
    main = _main_grad(weight)
    if overwrite or getattr(weight, "overwrite_main_grad", False):
        main.copy_(_product(a, b, main.dtype))
    elif main.dtype == a.dtype:
        torch.addmm(main, a, b, out=main)
    else:
        main.add_(_product(a, b, main.dtype))
    return _dummy(weight)


def add_to_main_grad(gradient: Tensor, weight: Tensor, overwrite: bool) -> Tensor | None:
    """`accumulate` for a gradient that was computed already."""
    main = _main_grad(weight)
    if overwrite or getattr(weight, "overwrite_main_grad", False):
        main.copy_(gradient)
    else:
        main.add_(gradient)
    return _dummy(weight)


def _main_grad(weight: Tensor) -> Tensor:
    main = getattr(weight, "main_grad", None)
    if not isinstance(main, Tensor) or main.shape != weight.shape:
        got = tuple(main.shape) if isinstance(main, Tensor) else main
        raise OpsgraphError(
            f"Linear: got main_grad {got}, expected a tensor {tuple(weight.shape)} on the weight"
        )
    return main


def _dummy(weight: Tensor) -> Tensor | None:
    """What autograd is given for a weight whose gradient went elsewhere."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    new = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
    return new(weight.shape, dtype=weight.dtype, device=weight.device)
