"""The main_grad protocol: weight gradients accumulated into a buffer that an optimizer owns.

The hook is `weight_gradient`, by which linear layers compute theirs, at once or when `backward_dw`
makes the call (`delayed`); `arriving` tells it then to which backward the gradient belongs.

The buffer is the parameter's attribute `main_grad`, or what its `get_main_grad()` returns where it
has one, of any dtype. A parameter with the attribute `grad_added_to_main_grad` has it set to True
and gets a dummy gradient from autograd, zeros if it has `zero_out_wgrad`; any other gets none.

Gradients are added. One that arrives overwrites instead where the buffer holds nothing of this
step, and never what has arrived since:

- after `expect_overwrite` (`is_first_microbatch=True`) the next one that arrives, whichever call of
  the module it comes from: backwards run in reverse;
- of a parameter with `overwrite_main_grad=True` the first one of every backward.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..base.errors import OpsgraphError
from ..guards.operands import cut
from ..guards.torch_private import forward_gradients, graph_task
from ..guards.validation import TRAINED
from ..kernels.lazy import Lazy

gemm = Lazy("cublaslt.gemm")

EXPECTED = "main_grad_to_overwrite"
"""Attribute of a weight whose next gradient overwrites."""
LATEST = "main_grad_backward"
"""Attribute of a weight: the last backward whose gradient has overwritten."""


class _Arriving(threading.local):
    backward: int | None = None
    """The backward that gradients belong to, where it is not the one that runs."""
    unwanted: frozenset[int] = frozenset()
    """Weights, by id, of which `backward(inputs=...)` asks no gradient."""


_arriving = _Arriving()


@contextmanager
def arriving(backward: int | None, unwanted: frozenset[int] = frozenset()) -> Iterator[None]:
    """Gradients that arrive belong to a backward, None for the one that runs."""
    before = _arriving.backward, _arriving.unwanted
    _arriving.backward, _arriving.unwanted = backward, unwanted
    try:
        yield
    finally:
        _arriving.backward, _arriving.unwanted = before


def expect_overwrite(weight: Tensor) -> None:
    """Have the next gradient that arrives overwrite main_grad, which holds nothing of this step.

    Without gradients it does nothing, unless inside the forward of an autograd.Function, as the
    reentrant kind of torch.utils.checkpoint is: a backward will come. A call inside a backward is a
    checkpoint's recomputation, whose first call has said so before.
    """
    inside = not forward_gradients() and not torch.is_inference_mode_enabled()
    if graph_task() >= 0:
        return
    if weight.requires_grad and (torch.is_grad_enabled() or inside):
        setattr(weight, EXPECTED, True)


def _overwrites(weight: Tensor, always: bool) -> bool:
    """Whether the gradient that arrives takes the place of what main_grad holds."""
    expected = weight.__dict__.pop(EXPECTED, False)
    if not (always or getattr(weight, "overwrite_main_grad", False)):
        return expected  # type: ignore[no-any-return]
    backward = graph_task() if _arriving.backward is None else _arriving.backward
    latest = weight.__dict__.get(LATEST)
    setattr(weight, LATEST, backward)
    return expected or backward < 0 or backward != latest


def accumulate(a: Tensor, b: Tensor, weight: Tensor, overwrite: bool) -> Tensor | None:
    """Add `a @ b` to `weight.main_grad`; returns what autograd is given.

    overwrite: as if the weight had `overwrite_main_grad`. Raises OpsgraphError if the weight has no
    main_grad of its shape.
    """
    if id(weight) in _arriving.unwanted:
        return None
    main = _main_grad(weight)
    gemm.multiply_into(main, a, b, not _overwrites(weight, overwrite))
    return dummy(weight)


def add_to_main_grad(gradient: Tensor, weight: Tensor, overwrite: bool) -> Tensor | None:
    """`accumulate` for a gradient that was computed already."""
    if id(weight) in _arriving.unwanted:
        return None
    main = _main_grad(weight)
    if _overwrites(weight, overwrite):
        main.copy_(gradient)
    else:
        main.add_(gradient)
    return dummy(weight)


def weight_gradient(
    fc: Any, product: Callable[..., Tensor], dy: Any, x: Any, weight: Tensor
) -> Tensor | None:
    """`product(dy, x)`, which is `dy.T @ x`, or that into `weight.main_grad`.

    fc: the layer, which says where it goes. Plain operands are multiplied into main_grad, in its
    dtype; of others `product(dy, x, True)` is added, the sums as they are before they are rounded.
    Of a weight that is stored as `[in, out]` the gradient is made as that, `x.T @ dy`.
    """
    plain = isinstance(dy, Tensor) and isinstance(x, Tensor)
    if not fc.accumulate_into_main_grad:
        return product(x, dy).t() if plain and fc.reads_transposed else product(dy, x)
    if plain:
        return accumulate(dy.t(), x, weight, fc.overwrite_main_grad)
    return add_to_main_grad(product(dy, x, True), weight, fc.overwrite_main_grad)


def exact_gradient(product: Callable[..., Tensor], dy: Any, x: Any, weight: Tensor) -> Tensor:
    """What `weight_gradient` adds to main_grad, of a part of the weight."""
    if isinstance(dy, Tensor) and isinstance(x, Tensor):
        dtype = _main_grad(weight).dtype
        gradient = torch.empty(dy.size(1), x.size(1), dtype=dtype, device=dy.device)
        gemm.multiply_into(gradient, dy.t(), x, False)
        return gradient
    return product(dy, x, True)


def _main_grad(weight: Tensor) -> Tensor:
    get = getattr(weight, "get_main_grad", None)
    main = get() if callable(get) else getattr(weight, "main_grad", None) if get is None else get
    if not isinstance(main, Tensor) or main.shape != weight.shape:
        got = tuple(main.shape) if isinstance(main, Tensor) else main
        raise OpsgraphError(
            f"Linear: got main_grad {got}, expected a tensor {tuple(weight.shape)} on the weight"
        )
    if reason := None if type(main) not in (Tensor, nn.Parameter) else _unwritable(main, weight):
        raise OpsgraphError(f"Linear: got a main_grad {reason}")
    return main


def _unwritable(main: Tensor, weight: Tensor) -> str | None:
    """Why no gradient can be added into a buffer, or None."""
    if main.dtype not in TRAINED:
        return f"of {main.dtype}, expected one of {', '.join(map(str, TRAINED))}"
    if main.device != weight.device:
        return f"on {main.device}, expected {weight.device}, where the weight is"
    if main.layout is not torch.strided:
        return f"of layout {main.layout}, expected a dense one"
    if not main.numel():
        return None
    if any(not step and size > 1 for size, step in zip(main.shape, main.stride(), strict=True)):
        return f"with strides {main.stride()}, expected memory of its own for each element"
    if lacking := cut(main):
        return f"with {lacking}, expected one with memory"
    return None


def dummy(weight: Tensor) -> Tensor | None:
    """What autograd is given for a weight whose gradient went elsewhere."""
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    new = torch.zeros if getattr(weight, "zero_out_wgrad", False) else torch.empty
    return new(weight.shape, dtype=weight.dtype, device=weight.device)
